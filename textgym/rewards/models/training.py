"""Train reward models on preference pairs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from textgym.data.completions import count_duplicates, count_faulty_texts
from textgym.data.faults import CUT_PROMPT, EQUAL_SIDES, OVERLAP, Faults, level_of_caller
from textgym.data.messages import Text
from textgym.data.overlap import clusters_of_pairs, contents_of_pair
from textgym.data.preferences import PlacedPair, numbers_of, placed_preferences, text_of
from textgym.data.rows import encode_rows
from textgym.errors import DataWarning
from textgym.models.loading import freeze, load_classifier, load_tokenizer
from textgym.models.machine.devices import Device
from textgym.models.machine.seeding import seeded
from textgym.rewards.models.accuracy import Accuracy, pairwise_accuracy
from textgym.rewards.models.config import RewardModelConfig
from textgym.rewards.models.last_token import LastTokenScorer
from textgym.rewards.models.pairwise import RatedPair, fit
from textgym.rewards.models.reward_model import RewardModel

WITHOUT_LIMIT = 2**31
"""Tokens that no text has."""


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
    """Train a reward model on preference pairs with `transformers.Trainer`, without output or files.

    Pairs with the same `group` or prompt follow each other, and each text of a batch is encoded once, in however many
    pairs it occurs (Ouyang et al., 2022, section 3.5).

    Args:
        preferences: Any source that `load_preferences` accepts. Pairs have `chosen` and `rejected` (texts or
            conversations) and optionally `prompt` (put before both), `margin`, `probability` and `group`.
        base: The language model or classifier to start from: any name or path that `load_classifier` accepts.
        config: Hyperparameters.
        heldout: Pairs for evaluation; `None` holds out a share of the pairs, whole prompts and groups.
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
    rows = placed_preferences(preferences)
    _columns(rows, config)  # before the split, so that all rows are counted
    if heldout is None:
        rows, held = split_preferences(rows, config.heldout_fraction, config.seed)
    else:
        held = placed_preferences(heldout) if heldout else []
        warn_of_overlap(rows, held)
    with seeded(config.seed), _torch_threads(config.num_threads):
        tokenizer = load_tokenizer(base)
        model = load_classifier(base, num_layers=config.num_layers, device=device, trust_remote_code=trust_remote_code)
        model.config.pad_token_id = tokenizer.pad_token_id
        reward_model = RewardModel(model, tokenizer, max_length=config.max_length)
        pairs, faults = read_rated_pairs(rows, reward_model, config)
        faults.check(config.allow_faulty_rows)
        model.requires_grad_(True)
        fit(reward_model.scorer, pairs, config, callbacks)
        reward_model.scorer = LastTokenScorer(freeze(model))  # accelerate has wrapped the forward of the old one
        heldout_pairs = [row.pair for row in held]
        return reward_model, pairwise_accuracy(reward_model, heldout_pairs) if held else Accuracy(math.nan)


def read_rated_pairs(
    rows: Sequence[PlacedPair], reward_model: RewardModel, config: RewardModelConfig
) -> tuple[list[RatedPair], Faults]:
    """Return the token ids of pairs as a reward model reads them, and the faults of their rows."""
    faults = Faults("preferences", len(rows))
    ids = _ids_of_texts(rows, reward_model)
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


class _Ids(NamedTuple):
    """Token ids that the model reads of a text, and how many it does not read."""

    kept: tuple[int, ...]
    lost: int


def _ids_of_texts(rows: Sequence[PlacedPair], reward_model: RewardModel) -> dict[str, _Ids]:
    """Return the ids of each distinct text by its key."""
    texts: dict[str, tuple[Text, str]] = {}
    for row in rows:
        for text in (text_of(row.pair, "chosen"), text_of(row.pair, "rejected")):
            texts.setdefault(text_key(text), (text, row.place))
    places = [place for _, place in texts.values()]
    kept = encode_rows(reward_model.encode, [text for text, _ in texts.values()], places)

    # Only a text that fills the window may have lost something.
    found = {}
    for (key, (text, _)), ids in zip(texts.items(), kept, strict=True):
        full = len(ids) >= reward_model.max_length
        found[key] = _Ids(tuple(ids), len(reward_model.encode([text], WITHOUT_LIMIT)[0]) - len(ids) if full else 0)
    return found


def text_key(text: Text) -> str:
    """Return a hashable key that is the same for equal texts only."""
    return text if isinstance(text, str) else json.dumps(text)


def split_preferences(
    rows: Sequence[PlacedPair], fraction: float, seed: int = 0
) -> tuple[list[PlacedPair], list[PlacedPair]]:
    """Split pairs into training and held-out ones; pairs with a group or prompt in common stay together.

    Prompts are compared without case, punctuation and white space. One prompt is always kept for training; a warning
    says if nothing can be held out.
    """
    clusters = clusters_of_pairs([row.pair for row in rows])
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


def warn_of_overlap(train: Sequence[PlacedPair], heldout: Sequence[PlacedPair]) -> None:
    """Warn if held-out pairs have a prompt or, without prompts, a text that training pairs have, too."""
    known = {key for row in train for key in contents_of_pair(row.pair)}
    faults = Faults("held-out pairs", len(heldout))
    for row in heldout:
        if known.intersection(contents_of_pair(row.pair)):
            faults.count(OVERLAP, row.place)
    faults.check(allowed=1.0)


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
