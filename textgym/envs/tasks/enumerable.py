"""textgym/Enumerable-v0: a task whose every text can be listed, so that the best one is known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from textgym.envs.tasks.base import Settings, TaskEnv, TaskVectorEnv
from textgym.models.letter_tokenizer import letter_tokenizer

VOCAB_SIZE, LENGTH, EOS = 12, 4, 10


class EnumerableEnv(TaskEnv):
    """Up to 4 of 12 tokens, and a table that says what each text is worth.

    ## Description
    A text earns something for each token at its place and for each pair of neighbours, so choosing the best token at
    each place on its own is not the best text. `texts_by_score()` lists all of them, best first.

    ## Action Space
    `Discrete(12)`: ten letters, the end of the text (10) and padding (11).

    ## Observation Space
    As `TextEnv`, `W = 1 + 4`.

    ## Rewards
    On the last token the text's worth (`table_score`), shifted and scaled so that the best text scores 1 and uniformly
    random tokens score 0 on average. No reference.

    Metric: the reward itself.

    ## Starting State
    The prompt `"a"`.

    ## Episode End
    The end-of-text token, or 4 tokens.

    ## Arguments
    Args:
        kwargs: arguments of `TextEnv`; the defaults are described above. A model of 12 tokens is
            `textgym.testing.mock_lm(12)`.

    Raises:
        ValueError: a tokenizer of another vocabulary, when the first text is scored.
    """

    metrics = ("textgym.envs.tasks.enumerable:table_score",)

    @classmethod
    def settings(cls, **kwargs: Any) -> Settings:
        """The arguments of `TextEnv`."""
        return {
            "prompts": ["a"],
            "tokenizer": letter_tokenizer(VOCAB_SIZE),
            "reward": table_score,
            "max_prompt_tokens": 1,
            "max_new_tokens": LENGTH,
            **kwargs,
        }


class EnumerableVectorEnv(TaskVectorEnv):
    """Many rows of `EnumerableEnv`, see there."""

    single = EnumerableEnv


def table_score(completion_ids: Sequence[Sequence[int]]) -> list[float]:
    """What texts are worth; the best one scores 1.

    >>> best = max(texts_by_score(), key=texts_by_score().get)
    >>> best, table_score([best])
    ((2, 7, 5, 11), [1.0])

    Raises:
        ValueError: a text that is none of the task's.
    """
    scores = texts_by_score()
    unknown = next((list(ids) for ids in completion_ids if tuple(ids) not in scores), None)
    if unknown is not None:
        raise ValueError(
            f"the tokens {unknown} are no text of up to {LENGTH} of {VOCAB_SIZE} tokens: "
            "use the task's own tokenizer, `textgym.testing.letter_tokenizer(12)`, and its max_new_tokens"
        )
    return [scores[tuple(ids)] for ids in completion_ids]


@lru_cache(maxsize=1)
def texts_by_score() -> dict[tuple[int, ...], float]:
    """Every text, as ids, and its score, best first; a text ends with EOS or has 4 tokens."""
    rng = np.random.default_rng(0)
    places, pairs = rng.normal(size=(LENGTH, VOCAB_SIZE)), rng.normal(size=(VOCAB_SIZE, VOCAB_SIZE))
    worth: dict[tuple[int, ...], float] = {}
    for ids in itertools.product(range(VOCAB_SIZE), repeat=LENGTH):
        text = ids[: ids.index(EOS) + 1] if EOS in ids else ids
        if text not in worth:
            at_places = sum(places[place, token] for place, token in enumerate(text))
            worth[text] = float(at_places + sum(pairs[pair] for pair in itertools.pairwise(text)))
    mean = sum(value * float(VOCAB_SIZE) ** -len(text) for text, value in worth.items())
    best = max(worth.values()) - mean
    ranked = sorted(worth.items(), key=lambda item: -item[1])
    return {text: (value - mean) / best for text, value in ranked}
