"""Rankings for the training of reward models: loaded, split, and read as token ids."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from textgym.data.completions import count_duplicates, count_faulty_texts
from textgym.data.corpora.sources import Snippet
from textgym.data.faults import CUT_PROMPT, EQUAL_SIDES, NOT_RANKED, Faults
from textgym.data.forms.pairs import Pair, Ranking, pairs_of_row, rankings_of_row
from textgym.data.forms.trees import with_whole_trees
from textgym.data.messages import Text, content
from textgym.data.overlap import clusters, key_of_prompt, key_of_text
from textgym.data.preferences import PlacedPair, text_of
from textgym.data.rows import named, read_rows
from textgym.errors import DataError
from textgym.rewards.models.ranking_loss import RankedTexts
from textgym.rewards.models.reading import ids_of_texts, text_key
from textgym.rewards.models.reward_model import RewardModel

ACCEPTED = (
    "rankings are a list of dicts with 'prompt', 'completions' and 'ranks' or 'ratings', the path of a .jsonl file, "
    "one split of a `datasets` data set, or 'module:attribute'"
)
HELDOUT_PAIRS = 20_000
"""Pairs of held-out ratings at most."""


class PlacedRanking(NamedTuple):
    """A ranking, and the description of its row for messages."""

    place: str
    ranking: Ranking

    @property
    def texts(self) -> list[Text]:
        """The whole texts, prompt included."""
        prompt = {} if self.ranking.prompt is None else {"prompt": self.ranking.prompt}
        return [text_of({**prompt, "chosen": completion}, "chosen") for completion in self.ranking.completions]

    @property
    def contents(self) -> list[Hashable]:
        """What connects the ranking with others: its prompt, or without one its whole texts."""
        if self.ranking.prompt:
            return [("prompt", key_of_prompt(self.ranking.prompt))]
        return [("text", key_of_text(content(text))) for text in self.texts]


def placed_rankings(rankings: Any, *, rated: bool) -> list[PlacedRanking]:
    """Load rankings with the place of each; placed ones keep theirs.

    Args:
        rankings: Any source that `read_rows` accepts. Rows are rankings, preference pairs, which are rankings of two
            texts, or single texts with a rating: `completion` and `rating`, perhaps with a `prompt`.
        rated: Whether all values have to be ratings.

    Raises:
        DataError: If a row has another form, or if there are no rankings.
    """
    found: list[PlacedRanking] = []
    for place, row in with_whole_trees(read_rows(rankings, "rankings", ACCEPTED)):
        if isinstance(row, PlacedRanking):
            found.append(row)
        else:
            found += [PlacedRanking(place, ranking) for ranking in _rankings(row, place)]
    unrated = next((row for row in found if not row.ranking.rated), None)
    if rated and unrated is not None:
        raise DataError(
            f"loss='regression' learns ratings, and {unrated.place} has none: give 'completions' with 'ratings', or "
            "'completion' with 'rating', or use another loss"
        )
    if not found:
        raise DataError(f"there are no rankings in {named(rankings)}: give at least one")
    return found


def _rankings(row: Any, place: str) -> list[Ranking]:
    if isinstance(row, Mapping) and row.get("completion") is not None and row.get("rating") is not None:
        kept = {name: row.get(name) for name in ("prompt", "tools")}
        row = {**kept, "completions": [row["completion"]], "ratings": [row["rating"]]}
    rankings = rankings_of_row(row, place) if isinstance(row, Mapping) else None
    if rankings is not None:
        return [ranking for ranking in rankings if ranking.completions]
    pairs = pairs_of_row(row, place)
    return [Ranking(pair.get("prompt"), [pair["chosen"], pair["rejected"]], [1.0, 0.0], rated=False) for pair in pairs]


def clusters_of_rankings(rows: Sequence[PlacedRanking]) -> list[list[int]]:
    """Return the indices of rankings that have a prompt or, without prompts, a text in common."""
    return clusters([row.contents for row in rows])


def heldout_pairs_of(rows: Sequence[PlacedRanking], *, rated: bool, seed: int = 0) -> list[Pair]:
    """Return the comparisons that held-out rankings make.

    With `rated`, if all of them have ratings, these are random pairs of whole texts, whatever their prompts are;
    otherwise texts are compared only within a ranking.
    """
    if not rated or not all(row.ranking.rated for row in rows):
        return [pair for row in rows for pair in row.ranking.pairs()]
    texts = [both for row in rows for both in zip(row.texts, row.ranking.values, strict=True)]
    rng = random.Random(seed)
    couples = [rng.sample(texts, 2) for _ in range(min(HELDOUT_PAIRS, math.comb(len(texts), 2)))]
    pairs = []
    for (first, value), (second, other) in couples:
        alike = isinstance(first, str) == isinstance(second, str)
        pairs += list(Ranking(None, [first, second], [value, other], rated=True).pairs()) if alike else []
    return pairs


def read_ranked_texts(
    rows: Sequence[PlacedRanking], reward_model: RewardModel, *, rated: bool
) -> tuple[list[RankedTexts], Faults]:
    """Return the token ids of rankings as a reward model reads them, and the faults of their rows.

    Rankings of which nothing can be learned are left out and counted: without `rated` those in which no two values
    differ.
    """
    faults = Faults("rankings", len(rows))
    ids = ids_of_texts([(text, row.place) for row in rows for text in row.texts], reward_model)
    cluster_of = {row: index for index, rows_ in enumerate(clusters_of_rankings(rows)) for row in rows_}

    rankings, places = [], []
    for index, row in enumerate(rows):
        if not rated and len(set(row.ranking.values)) < 2:
            faults.count(NOT_RANKED, row.place)
            continue
        texts = [ids[text_key(text)] for text in row.texts]
        values = row.ranking.values
        _count_faults(faults, row)
        if any(text.lost for text in texts):
            faults.count(CUT_PROMPT, row.place)
        valued = {(text.kept, value) for text, value in zip(texts, values, strict=True)}
        if not rated and len({ids for ids, _ in valued}) < len(valued):
            faults.count(EQUAL_SIDES, row.place)
        rankings.append(RankedTexts(tuple(text.kept for text in texts), tuple(values), cluster_of[index]))
        places.append(row.place)
    if not rankings:
        raise DataError("none of the rankings has two texts with different values, so there is nothing to learn")
    count_duplicates(faults, places, [(ranking.texts, ranking.values) for ranking in rankings])
    return rankings, faults


def _count_faults(faults: Faults, row: PlacedRanking) -> None:
    """Count a ranking once for each fault of its texts."""
    own = Faults(faults.what, faults.total)
    prompt = {} if row.ranking.prompt is None else {"prompt": row.ranking.prompt}
    for text in row.ranking.completions:
        count_faulty_texts(own, PlacedPair(row.place, {**prompt, "chosen": text, "rejected": text}))
    for fault in own.places:
        faults.count(fault, row.place)


def normalised(rankings: Sequence[RankedTexts]) -> tuple[list[RankedTexts], float, float]:
    """Return rankings whose values have mean 0 and standard deviation 1 over all texts, and what they had before.

    Raises:
        DataError: If all values are equal.
    """
    values = [value for ranking in rankings for value in ranking.values]
    mean, std = statistics.fmean(values), statistics.pstdev(values)
    if std == 0:
        raise DataError(f"all {len(values)} ratings are {mean:g}, so there is nothing to learn: give different ones")
    scaled = [r._replace(values=tuple((value - mean) / std for value in r.values)) for r in rankings]
    return scaled, mean, std


def make_rankings(snippets: Sequence[Snippet], *, group_size: int = 8, seed: int = 0) -> list[Pair]:
    """Make rows of `group_size` rated snippets, in which each snippet is once.

    >>> make_rankings([Snippet("dull", -2.0), Snippet("a joy", 3.0)], group_size=2)
    [{'completions': ['a joy', 'dull'], 'ratings': [3.0, -2.0]}]
    """
    shuffled = random.Random(seed).sample(snippets, len(snippets))
    groups = [shuffled[start : start + group_size] for start in range(0, len(shuffled), group_size)]
    return [
        {"completions": [snippet.text for snippet in group], "ratings": [snippet.rating for snippet in group]}
        for group in groups
    ]
