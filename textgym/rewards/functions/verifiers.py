"""Rewards computed by other libraries: the VADER lexicon, the tasks of reasoning_gym."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from textgym.data.messages import Text, plain


def lexicon_sentiment(prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
    """Return the sentiment of prompt and completion by the VADER lexicon, from -1 (negative) to 1 (positive).

    It is an independent judge for policies that were trained with a learned reward model.
    Source: Hutto and Gilbert, ICWSM 2014 (`compound` score).

    Raises:
        ImportError: If the vaderSentiment package is missing; the message says how to install it.
    """
    analyzer = _vader()
    return [
        float(analyzer.polarity_scores(prompt + completion)["compound"])
        for prompt, completion in zip(plain(prompts), plain(completions), strict=True)
    ]


def reasoning_gym_score(
    completions: Sequence[Text], entry: Sequence[Mapping[str, Any] | None], **_: Any
) -> list[float | None]:
    """Return the score of an answer, from 0 to 1, by its task of reasoning_gym (extra `tasks`).

    The column `entry` is the entry of reasoning_gym's data set, with `question`, `answer` and `metadata`.

    Raises:
        ImportError: If the reasoning-gym package is missing; the message says how to install it.
    """
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError as error:
        raise ImportError("reasoning_gym_score needs reasoning-gym: pip install 'textgym[tasks]'") from error
    return [
        None if row is None else float(get_score_answer_fn(row["metadata"]["source_dataset"])(text.strip(), row))
        for text, row in zip(plain(completions), entry, strict=True)
    ]


@lru_cache(maxsize=1)
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("lexicon_sentiment needs vaderSentiment: pip install 'textgym[metrics]'") from error
    return SentimentIntensityAnalyzer()
