"""Preference pairs: loaded from data, or made from texts that people rated.

A pair is a plain dict in TRL's format. `chosen` and `rejected` are texts or conversations that continue the `prompt`;
without a prompt they are whole texts. Other optional keys are `margin` (how much better the chosen text is),
`probability` (how likely a rater prefers it) and `group` (shared by texts that were compared with each other).
`textgym.rewards.models.train_reward_model` trains on such pairs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from textgym.data.corpora.sources import Snippet
from textgym.data.forms.pairs import Pair, pairs_of_row
from textgym.data.forms.trees import with_whole_trees
from textgym.data.messages import Text
from textgym.data.rows import named, read_rows
from textgym.errors import DataError

ACCEPTED = (
    "preferences are a list of dicts with 'chosen' and 'rejected', the path of a .jsonl file, "
    "one split of a `datasets` data set, or 'module:attribute'"
)
PAIRS_PER_GROUP = 1024
"""Pairs that `make_preferences` makes of a group at most."""


class PlacedPair(NamedTuple):
    """A pair, and the description of its row for messages."""

    place: str
    pair: Pair

    @property
    def texts(self) -> list[Text]:
        """The whole texts of both sides, prompt included."""
        return [text_of(self.pair, side) for side in ("chosen", "rejected")]


def load_preferences(preferences: Any) -> list[Pair]:
    """Load preference pairs, each with a separate prompt if its texts are conversations or repeat their `prompt`.

    Args:
        preferences: A list of dicts, the path of a `.jsonl` file (one dict per line), a `datasets.Dataset` or any other
            iterable of mappings with `column_names`, or the `"module:attribute"` of one of these. `docs/data.md` lists
            the accepted forms of rows.

    >>> load_preferences([{"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No."}])
    [{'prompt': 'Is it good?', 'chosen': ' Yes.', 'rejected': ' No.'}]

    Raises:
        ValueError: If the source or one of its pairs has another form, or if there are no pairs. The message names the
            row or the line.
    """
    return [placed.pair for placed in placed_preferences(preferences)]


def placed_preferences(preferences: Any) -> list[PlacedPair]:
    """Load preference pairs as `load_preferences` does, with the place of each; placed ones keep theirs."""
    pairs: list[PlacedPair] = []
    for place, row in with_whole_trees(read_rows(preferences, "preferences", ACCEPTED)):
        pairs += (
            [row] if isinstance(row, PlacedPair) else [PlacedPair(place, pair) for pair in pairs_of_row(row, place)]
        )
    if not pairs:
        raise DataError(
            f"there are no preferences in {named(preferences)}: give at least one pair of 'chosen' and 'rejected'"
        )
    return pairs


def numbers_of(rows: Sequence[PlacedPair], name: str, setting: str) -> list[float]:
    """Return a number of each pair, such as its `probability`.

    Args:
        rows: The pairs.
        name: The key.
        setting: The setting that asks for it, for the error message.

    Raises:
        DataError: If a pair has none.
    """
    missing = [row.place for row in rows if row.pair.get(name) is None]
    if missing:
        raise DataError(
            f"{setting} needs a {name!r} in every preference; {len(missing)} of {len(rows)} have none, the first is "
            f"{missing[0]}"
        )
    return [float(row.pair[name]) for row in rows]


def text_of(pair: Pair, side: str) -> Text:
    """Return the whole text or conversation of a pair's `"chosen"` or `"rejected"` side, prompt included."""
    prompt, text = pair.get("prompt"), pair[side]
    if isinstance(text, str):
        if prompt is not None and not isinstance(prompt, str):
            return [*prompt, {"role": "assistant", "content": text}]
        return (prompt or "") + text
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else list(prompt or [])
    return [*said, *text]


def make_preferences(
    snippets: Sequence[Snippet],
    *,
    min_gap: float = 1.0,
    group_size: int = 128,
    pairs_per_group: int = PAIRS_PER_GROUP,
    rounds: int = 3,
    seed: int = 0,
) -> list[Pair]:
    """Make preference pairs from rated snippets, which are compared within shuffled groups.

    A group of K snippets has up to K(K-1)/2 pairs. They are trained on together, in batches of `pairs_per_group`, so
    that each text is encoded once for all of its comparisons (Ouyang et al., 2022, section 3.5).

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
