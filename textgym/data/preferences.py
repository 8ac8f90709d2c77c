"""Preference pairs: loaded from data, or made from texts that people rated.

A pair is a plain dict in TRL's format. `chosen` and `rejected` are texts or conversations; `prompt` is optional. Other
optional keys are `margin` (how much better the chosen text is), `probability` (how likely a rater prefers it) and
`group` (shared by texts that were compared with each other). `textgym.rewards.models.train_reward_model` trains on such
pairs.
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
    """Load preference pairs and check that all have `chosen` and `rejected`.

    Args:
        preferences: A list of dicts, the path of a `.jsonl` file (one dict per line), a `datasets.Dataset` or any other
            iterable of mappings with `column_names`, or the `"module:attribute"` of one of these.

    >>> load_preferences([{"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No."}])
    [{'prompt': 'Is it good?', 'chosen': ' Yes.', 'rejected': ' No.'}]

    Raises:
        ValueError: If the source or one of its pairs has another form, or if there are no pairs. The message names the
            row or the line.
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
    """Make preference pairs from rated snippets, which are compared within shuffled groups.

    A group of K snippets has up to K(K-1)/2 pairs and is one element of a training batch, so that each text is encoded
    once for all of its comparisons (Ouyang et al., 2022, section 3.5).

    Args:
        snippets: The rated texts.
        min_gap: Minimum difference of ratings. Raters would not agree on pairs with a smaller one.
        group_size: K, the number of snippets that are compared with each other.
        pairs_per_group: Maximum number of pairs per group; they are sampled at random.
        rounds: How often each snippet is put into a group.
        seed: Seed of the shuffles.

    >>> make_preferences([Snippet("dull", -2.0), Snippet("a joy", 3.0)], rounds=1)
    [{'chosen': 'a joy', 'rejected': 'dull', 'margin': 5.0, 'group': 0}]

    Raises:
        ValueError: If `group_size` is below 2, or no two snippets differ by `min_gap`.
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
        raise ValueError(f"no ratings of the {len(snippets)} snippets differ by {min_gap} or more: lower min_gap")
    return pairs


def heldout_pairs(
    snippets: Sequence[Snippet], *, num_pairs: int = 20_000, min_gap: float = 1.0, seed: int = 0
) -> list[Pair]:
    """Sample random pairs for evaluation, whose ratings differ by more than `min_gap`.

    Pairs are sampled with replacement and depend on `seed` alone, so all reward functions are evaluated on the same
    pairs. Each pair is its own `group`.

    Raises:
        ValueError: If no two snippets differ by more than `min_gap`.
    """
    distinct = list({snippet.text: snippet for snippet in snippets}.values())
    ratings = [snippet.rating for snippet in distinct]
    if not ratings or max(ratings) - min(ratings) <= min_gap:
        raise ValueError(f"no ratings of the {len(ratings)} snippets differ by more than {min_gap}: lower min_gap")
    rng = random.Random(seed)
    pairs: list[Pair] = []
    while len(pairs) < num_pairs:
        first, second = rng.choice(distinct), rng.choice(distinct)
        if abs(first.rating - second.rating) > min_gap:
            pairs.append(_pair(first, second, len(pairs)))
    return pairs


def preference_probability(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the probability that a random rating of the first text is higher than a random rating of the second.

    A tie counts as one half.

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
        raise ValueError(f"'probability' of {place} is {probability!r}: it must be between 0 and 1")
    return dict(row)
