"""Train reward models on preference pairs, rankings and ratings."""

from __future__ import annotations

import contextlib
import math
import os
import random
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback

from textgym.data.completions import count_duplicates, count_faulty_texts
from textgym.data.faults import CUT_PROMPT, EQUAL_SIDES, OVERLAP, Faults, level_of_caller
from textgym.data.forms.pairs import Pair
from textgym.data.overlap import clusters_of_pairs, contents_of_pair
from textgym.data.preferences import PlacedPair, numbers_of, placed_preferences, text_of
from textgym.errors import DataWarning
from textgym.models.loading import freeze, load_classifier, load_tokenizer
from textgym.models.machine.devices import Device
from textgym.models.machine.seeding import seeded
from textgym.rewards.models.accuracy import Accuracy, pairwise_accuracy
from textgym.rewards.models.config import RewardModelConfig
from textgym.rewards.models.last_token import LastTokenScorer
from textgym.rewards.models.pairwise import Item, RatedPair, fit
from textgym.rewards.models.rankings import (
    PlacedRanking,
    clusters_of_rankings,
    heldout_pairs_of,
    normalised,
    placed_rankings,
    read_ranked_texts,
)
from textgym.rewards.models.reading import ids_of_texts, text_key
from textgym.rewards.models.reward_model import RewardModel

Row = TypeVar("Row", PlacedPair, PlacedRanking)


def train_reward_model(
    preferences: Any,
    base: str | os.PathLike[str] = "tiny",
    *,
    config: RewardModelConfig | None = None,
    heldout: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    device: Device = "auto",
    trust_remote_code: bool = False,
) -> tuple[RewardModel, Accuracy]:
    """Train a reward model on preferences with `transformers.Trainer`, without output or files.

    Pairs with the same `group` or prompt follow each other, and each text of a batch is encoded once, in however many
    pairs it occurs (Ouyang et al., 2022, section 3.5).

    Args:
        preferences: Any source that `load_preferences` accepts. Pairs have `chosen` and `rejected` (texts or
            conversations) and optionally `prompt` (put before both), `margin`, `probability` and `group`. Rankings have
            `completions` and `ranks` (1 is the best) or `ratings` (the highest is the best); other losses than
            "pairwise" learn whole rankings, of which a pair is one. "regression" learns `ratings`, also of single
            texts, `completion` and `rating`.
        base: The language model or classifier to start from: any name or path that `load_classifier` accepts.
        config: Hyperparameters.
        heldout: Pairs or rankings for evaluation; `None` holds out a share, whole prompts and groups.
        callbacks: Callbacks of transformers, for progress.
        device: Device of the training and of the model; `"auto"` is the current GPU if there is one.
        trust_remote_code: Whether to run code that comes with the base.

    Returns:
        The frozen reward model, and its accuracy on the held-out pairs, a float that prints its number of pairs and its
        interval (NaN if there are none).

    Raises:
        DataError: If there are no pairs, a pair has no `chosen` or `rejected`, or too many pairs have a fault.
        UnchangedWeightsError: If training changed no weight.
    """
    config = (config or RewardModelConfig()).resolved(base)
    rows, held = read_and_split(preferences, heldout, config)
    with seeded(config.seed), _torch_threads(config.num_threads):
        tokenizer = load_tokenizer(base)
        model = load_classifier(base, num_layers=config.num_layers, device=device, trust_remote_code=trust_remote_code)
        model.config.pad_token_id = tokenizer.pad_token_id
        reward_model = RewardModel(model, tokenizer, max_length=config.max_length)
        items, gain, bias = _read(rows, reward_model, config)
        model.requires_grad_(True)
        fit(reward_model.scorer, items, config, callbacks)
        reward_model.scorer = LastTokenScorer(freeze(model))  # accelerate has wrapped the forward of the old one
        reward_model.gain, reward_model.bias = gain, bias
        return reward_model, pairwise_accuracy(reward_model, held) if held else Accuracy(math.nan)


def read_and_split(preferences: Any, heldout: Any, config: RewardModelConfig) -> tuple[list[Any], list[Pair]]:
    """Return the rows to train on as the loss learns them, placed pairs or rankings, and held-out pairs.

    Args:
        preferences: See `train_reward_model`.
        heldout: Pairs or rankings for evaluation; `None` for a share of the preferences.
        config: The loss, the share, and the columns that it needs.
    """
    if config.loss == "pairwise":
        rows = placed_preferences(preferences)
        _columns(rows, config)  # before the split, so that all rows are counted
        if heldout is None:
            rows, held = split_preferences(rows, config.heldout_fraction, config.seed)
        else:
            held = placed_preferences(heldout) if heldout else []
            warn_of_overlap(rows, held)
        return rows, [row.pair for row in held]

    rated = config.loss == "regression"
    rankings = placed_rankings(preferences, rated=rated)
    if heldout is None:
        rankings, others = split_rows(rankings, clusters_of_rankings(rankings), config.heldout_fraction, config.seed)
        return rankings, heldout_pairs_of(others, rated=rated)
    others = placed_rankings(heldout, rated=False) if heldout else []
    warn_of_overlap(rankings, others)
    return rankings, heldout_pairs_of(others, rated=rated)


def _read(
    rows: Sequence[Any], reward_model: RewardModel, config: RewardModelConfig
) -> tuple[Sequence[Item], float, float]:
    """Return what the loss learns of rows, and the gain and bias that give its scores their unit."""
    if config.loss == "pairwise":
        pairs, faults = read_rated_pairs(rows, reward_model, config)
        faults.check(config.allow_faulty_rows)
        return pairs, 1.0, 0.0
    rankings, faults = read_ranked_texts(rows, reward_model, rated=config.loss == "regression")
    faults.check(config.allow_faulty_rows)
    if config.loss != "regression":
        return rankings, 1.0, 0.0
    scaled, mean, std = normalised(rankings)
    return scaled, std, mean


def read_rated_pairs(
    rows: Sequence[PlacedPair], reward_model: RewardModel, config: RewardModelConfig
) -> tuple[list[RatedPair], Faults]:
    """Return the token ids of pairs as a reward model reads them, and the faults of their rows."""
    faults = Faults("preferences", len(rows))
    texts = ((text_of(row.pair, side), row.place) for row in rows for side in ("chosen", "rejected"))
    ids = ids_of_texts(texts, reward_model)
    margins, probabilities = _columns(rows, config)
    cluster_of = {row: index for index, rows_ in enumerate(clusters_of_pairs([r.pair for r in rows])) for row in rows_}

    pairs = []
    for index, row in enumerate(rows):
        chosen, rejected = (ids[text_key(text_of(row.pair, side))] for side in ("chosen", "rejected"))
        pairs.append(RatedPair(chosen.kept, rejected.kept, margins[index], probabilities[index], cluster_of[index]))
        count_faulty_texts(faults, row)
        if chosen.kept == rejected.kept:
            faults.count(EQUAL_SIDES, row.place)
        if chosen.lost or rejected.lost:
            faults.count(CUT_PROMPT, row.place)
    # The same comparison in another group is meant: `make_preferences` puts each text into several groups.
    items = [(pair.chosen, pair.rejected, row.pair.get("group")) for pair, row in zip(pairs, rows, strict=True)]
    count_duplicates(faults, [row.place for row in rows], items)
    return pairs, faults


def _columns(rows: Sequence[PlacedPair], config: RewardModelConfig) -> tuple[list[float], list[float]]:
    """Return the margins and probabilities that the loss uses."""
    margins, probabilities = [0.0] * len(rows), [1.0] * len(rows)
    if config.use_margin:
        margins = numbers_of(rows, "margin", "use_margin")
    if config.use_probability:
        probabilities = numbers_of(rows, "probability", "use_probability")
    return margins, probabilities


def split_preferences(
    rows: Sequence[PlacedPair], fraction: float, seed: int = 0
) -> tuple[list[PlacedPair], list[PlacedPair]]:
    """Split pairs into training and held-out ones; pairs with a group or prompt in common stay together.

    Prompts are compared without case, punctuation and white space. One prompt is always kept for training; a warning
    says if nothing can be held out.
    """
    return split_rows(rows, clusters_of_pairs([row.pair for row in rows]), fraction, seed)


def split_rows(
    rows: Sequence[Row], clusters: list[list[int]], fraction: float, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Split rows into training and held-out ones, whole clusters each; see `split_preferences`."""
    random.Random(seed).shuffle(clusters)
    wanted = math.ceil(fraction * len(rows))
    held: list[int] = []
    for cluster in clusters[1:]:
        if len(held) + len(cluster) <= wanted:
            held += cluster
    if not held and wanted and len(clusters) > 1:  # all are larger than what is wanted
        held = min(clusters, key=len)
    if not held and wanted:
        warnings.warn(
            f"all {len(rows)} preferences have one prompt or group in common, so none is held out and the accuracy is "
            "unknown: pass held-out pairs with other prompts (heldout=, --heldout)",
            DataWarning,
            stacklevel=level_of_caller(),
        )
    chosen = set(held)
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(held)]


def warn_of_overlap(train: Sequence[Row], heldout: Sequence[Row]) -> None:
    """Warn if held-out rows have a prompt or, without prompts, a text that training rows have, too."""
    known = {key for row in train for key in _contents(row)}
    faults = Faults("held-out pairs", len(heldout))
    for row in heldout:
        if known.intersection(_contents(row)):
            faults.count(OVERLAP, row.place)
    faults.check(allowed=1.0)


def _contents(row: PlacedPair | PlacedRanking) -> list[Hashable]:
    return row.contents if isinstance(row, PlacedRanking) else contents_of_pair(row.pair)


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
