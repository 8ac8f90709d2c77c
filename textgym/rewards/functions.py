"""Ready-made reward functions.

Each follows the protocol of DESIGN.md section 6: texts in, one number a text out, fewer keywords than offered are fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


def lexicon_sentiment(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Sentiment of prompt and completion together by the VADER lexicon, from -1 (negative) to 1 (positive).

    A policy trained against a learned reward model never sees it, which makes it an independent judge.
    Source: Hutto and Gilbert, ICWSM 2014 (`compound` score).

    Raises:
        ImportError: without the vaderSentiment package; the message is the pip line.
    """
    analyzer = _vader()
    return [
        float(analyzer.polarity_scores(prompt + completion)["compound"])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def completion_length(
    prompts: Sequence[str], completions: Sequence[str], *, completion_ids: Sequence[Sequence[int]], **_: Any
) -> list[float]:
    """Number of tokens sampled, the stop token included. With weight 0 it is a metric and no reward."""
    return [float(len(ids)) for ids in completion_ids]


@lru_cache(maxsize=1)
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("lexicon_sentiment needs vaderSentiment: pip install 'textgym[metrics]'") from error
    return SentimentIntensityAnalyzer()
