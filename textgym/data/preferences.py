"""Preference pairs: read from wherever they are, or made from texts that people rated.

A pair is a plain dict in the format of TRL: `chosen` and `rejected` are texts or conversations, with or without a
`prompt` before both. Further keys, where they exist: `margin` (how much better the chosen one is), `probability` (how
likely a rater prefers it) and `group` (texts that were compared with each other share one).
`textgym.rewards.models.train_reward_model` takes such pairs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from textgym.data.corpora.sources import Snippet
from textgym.data.messages import is_messages
from textgym.data.rows import named, read_rows

Pair = dict[str, Any]
ACCEPTED = (
    "preferences are a list of dicts with 'chosen' and 'rejected', the path of a .jsonl file, "
    "one split of a `datasets` data set, or 'module:attribute'"
)


def load_preferences(preferences: Any) -> list[Pair]:
    """Pairs that all have `chosen` and `rejected`.

    Args:
        preferences: a list of dicts, the path of a `.jsonl` file (one such dict a line), a `datasets.Dataset` or any
            other iterable of mappings with `column_names`, or `"module:attribute"`, which names one of these.

    >>> load_preferences([{"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No."}])
    [{'prompt': 'Is it good?', 'chosen': ' Yes.', 'rejected': ' No.'}]

    Raises:
        ValueError: none of these, no pairs, or a pair that is not one; the message names the row or the line.
    """
    pairs = [_checked(row, place) for place, row in read_rows(preferences, "preferences", ACCEPTED)]
    if not pairs:
        raise ValueError(
            f"there are no preferences in {named(preferences)}: give at least one pair of 'chosen' and 'rejected'"
        )
    return pairs


def make_preferences(
    snippets: Sequence[Snippet],
    *,
    min_gap: float = 1.0,
    group_size: int = 128,
    pairs_per_group: int = 1024,
    rounds: int = 3,
    seed: int = 0,
) -> list[Pair]:
    """Comparisons within shuffled groups of snippets.

    A group of K snippets gives up to K(K-1)/2 pairs and is trained on as one element of a batch, so that each text is
    encoded once for all its comparisons (Ouyang et al. 2022, section 3.5).

    Args:
        min_gap: pairs whose ratings differ by less, in rating points, are left out: people would not agree on them.
        group_size: K, the number of snippets compared with each other.
        pairs_per_group: at most so many of a group's pairs, drawn at random.
        rounds: how often each snippet is compared, each time within another group.
        seed: of the shuffles.

    >>> make_preferences([Snippet("dull", -2.0), Snippet("a joy", 3.0)], rounds=1)
    [{'chosen': 'a joy', 'rejected': 'dull', 'margin': 5.0, 'group': 0}]

    Raises:
        ValueError: a group of fewer than two, or snippets of which no two differ by `min_gap`.
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: a comparison needs at least 2 snippets")
    rng = random.Random(seed)
    groups = [
        shuffled[start : start + group_size]
        for shuffled in (rng.sample(snippets, len(snippets)) for _ in range(rounds))
        for start in range(0, len(shuffled), group_size)
    ]
    pairs = []
    for index, group in enumerate(groups):
        found = [
            _pair(first, second, index)
            for first, second in itertools.combinations(group, 2)
            if abs(first.rating - second.rating) >= min_gap and first.text != second.text
        ]
        pairs += rng.sample(found, min(pairs_per_group, len(found)))
    if not pairs:
        raise ValueError(f"no two of the {len(snippets)} snippets differ by a rating gap of {min_gap}: lower min_gap")
    return pairs


def heldout_pairs(
    snippets: Sequence[Snippet], *, num_pairs: int = 20_000, min_gap: float = 1.0, seed: int = 0
) -> list[Pair]:
    """Random pairs to measure accuracy on: any two snippets whose ratings differ by more than `min_gap`.

    Draws with replacement, from `seed` only, so every scorer is measured on the same pairs; `group` numbers them.

    Raises:
        ValueError: snippets of which no two differ by more than `min_gap`.
    """
    distinct = list({snippet.text: snippet for snippet in snippets}.values())
    ratings = [snippet.rating for snippet in distinct]
    if not ratings or max(ratings) - min(ratings) <= min_gap:
        raise ValueError(f"no two of the {len(ratings)} snippets differ by a rating gap above {min_gap}: lower min_gap")
    rng = random.Random(seed)
    pairs: list[Pair] = []
    while len(pairs) < num_pairs:
        first, second = rng.choice(distinct), rng.choice(distinct)
        if abs(first.rating - second.rating) > min_gap:
            pairs.append(_pair(first, second, len(pairs)))
    return pairs


def preference_probability(first: Sequence[float], second: Sequence[float]) -> float:
    """How likely a rater drawn from those of the first text rates it above what one of the second rates the other.

    A tie counts one half.

    >>> preference_probability([3, 4], [1, 3])
    0.875
    """
    wins = sum((a > b) + 0.5 * (a == b) for a in first for b in second)
    return wins / (len(first) * len(second))


def _pair(first: Snippet, second: Snippet, group: int) -> Pair:
    chosen, rejected = (first, second) if first.rating > second.rating else (second, first)
    pair: Pair = {
        "chosen": chosen.text,
        "rejected": rejected.text,
        "margin": chosen.rating - rejected.rating,
        "group": group,
    }
    if chosen.ratings and rejected.ratings:
        pair["probability"] = preference_probability(chosen.ratings, rejected.ratings)
    return pair


def _checked(row: Any, place: str) -> Pair:
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} is {row!r}: a preference is a dict with 'chosen' and 'rejected'")
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(f"{place} has the keys {sorted(row)}: it needs 'chosen' and 'rejected'")
    for side in ("prompt", "chosen", "rejected"):
        text = row.get(side)
        if not (isinstance(text, str) or is_messages(text) or (side == "prompt" and text is None)):
            raise ValueError(f"{side!r} of {place} is {text!r}: it must be a text or a list of messages")
    probability = row.get("probability")
    if probability is not None and not 0 <= float(probability) <= 1:
        raise ValueError(f"'probability' of {place} is {probability!r}: it must be from 0 to 1")
    return dict(row)
