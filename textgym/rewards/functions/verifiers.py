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

    The column `entry` is the entry of reasoning_gym's data set, with `question`, `answer` and `metadata`, and with
    `config`, the settings of the data set, if they are not those of the task by default. An answer that the task's
    scorer cannot read scores 0.

    Raises:
        ImportError: If the reasoning-gym package is missing; the message says how to install it.
    """
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise ImportError("reasoning_gym_score needs reasoning-gym: pip install 'textgym[tasks]'") from error
    scores: list[float | None] = []
    for text, row in zip(plain(completions), entry, strict=True):
        if row is None:
            scores.append(None)
            continue
        dataset = create_dataset(row["metadata"]["source_dataset"], seed=0, **row.get("config", {}))
        scores.append(score_answer(dataset, text.strip(), row))
    return scores


def score_answer(dataset: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """Return the score of an answer by a data set of reasoning_gym; 0 if its scorer cannot read the answer."""
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:  # scorers read numbers, JSON or tables, and raise all kinds of errors where there are none
        return 0.0


@lru_cache(maxsize=1)
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("lexicon_sentiment needs vaderSentiment: pip install 'textgym[metrics]'") from error
    return SentimentIntensityAnalyzer()
