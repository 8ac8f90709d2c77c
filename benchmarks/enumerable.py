"""A task whose every text can be listed, so that the best one is known: 12 tokens, up to 4 of them.

    python benchmarks/enumerable.py      # the best texts and their scores

A text earns something for each token at its place and for each pair of neighbours, so choosing the best token at each
place on its own is not the best text. Scores are shifted and scaled so that the best text scores 1 and uniformly random
tokens score 0 on average.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np

VOCAB_SIZE, LENGTH, EOS = 12, 4, 10
PROMPT = "a"


@lru_cache
def tables(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What a token earns at its place `(4, 12)`, and a pair of neighbours `(12, 12)`."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(LENGTH, VOCAB_SIZE)), rng.normal(size=(VOCAB_SIZE, VOCAB_SIZE))


def raw_score(ids: tuple[int, ...]) -> float:
    places, pairs = tables()
    return float(sum(places[i, t] for i, t in enumerate(ids)) + sum(pairs[a, b] for a, b in itertools.pairwise(ids)))


@lru_cache
def all_texts() -> dict[tuple[int, ...], float]:
    """The raw score of every text: one that ends with EOS, or has 4 tokens."""
    texts: dict[tuple[int, ...], float] = {}
    for ids in itertools.product(range(VOCAB_SIZE), repeat=LENGTH):
        end = ids.index(EOS) + 1 if EOS in ids else LENGTH
        texts[ids[:end]] = raw_score(ids[:end])
    return texts


@lru_cache
def scale() -> tuple[float, float]:
    """Mean under uniformly random tokens, and the best text's distance from it."""
    texts = all_texts()
    mean = sum(score * float(VOCAB_SIZE) ** -len(ids) for ids, score in texts.items())
    return mean, max(texts.values()) - mean


def score(completion_ids: list[list[int]]) -> list[float]:
    """The reward function."""
    mean, best = scale()
    return [(raw_score(tuple(ids)) - mean) / best for ids in completion_ids]


def settings(folder: str) -> dict[str, Any]:
    """Arguments of `textgym/Text-v0`, for a model of 12 tokens in this folder."""
    return {
        "prompts": [PROMPT],
        "tokenizer": folder,
        "reward": score,
        "max_prompt_tokens": 1,
        "max_new_tokens": LENGTH,
    }


if __name__ == "__main__":
    mean, best = scale()
    for ids, raw in sorted(all_texts().items(), key=lambda item: -item[1])[:5]:
        print("".join("abcdefghij"[t] if t < 10 else f"<{t}>" for t in ids), round((raw - mean) / best, 4))
