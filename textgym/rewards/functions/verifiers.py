"""Rewards by others' scorers: the VADER lexicon, reasoning_gym's tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from textgym.data.messages import Text, plain


def lexicon_sentiment(prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
    """Sentiment of prompt and completion together by the VADER lexicon, from -1 (negative) to 1 (positive).

    A policy trained against a learned reward model never sees it, which makes it an independent judge.
    Source: Hutto and Gilbert, ICWSM 2014 (`compound` score).

    Raises:
        ImportError: without the vaderSentiment package; the message is the pip line.
    """
    analyzer = _vader()
    return [
        float(analyzer.polarity_scores(prompt + completion)["compound"])
        for prompt, completion in zip(plain(prompts), plain(completions), strict=True)
    ]


def reasoning_gym_score(
    completions: Sequence[Text], entry: Sequence[Mapping[str, Any] | None], **_: Any
) -> list[float | None]:
    """The score, 0 to 1, that a task of reasoning_gym gives an answer (extra `tasks`).

    The column `entry` is the whole row that the task's data set made: `question`, `answer` and `metadata`.

    Raises:
        ImportError: without the reasoning-gym package; the message is the pip line.
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
