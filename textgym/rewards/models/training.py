"""Train and evaluate reward models on preference pairs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

<<<<<<< HEAD
from textgym.data.preferences import Pair, load_preferences
=======
from textgym.data.completions import count_duplicates, count_faulty_texts
from textgym.data.faults import CUT_PROMPT, EQUAL_SIDES, OVERLAP, Faults, level_of_caller
from textgym.data.messages import Text
from textgym.data.overlap import clusters_of_pairs, contents_of_pair
from textgym.data.preferences import PlacedPair, numbers_of, placed_preferences, text_of
from textgym.data.rows import encode_rows
from textgym.errors import DataWarning
>>>>>>> e6825e7 (textgym data FILE, the page Your data, and what is read of public data sets)
from textgym.models.loading import freeze, load_classifier, load_tokenizer
from textgym.models.machine.devices import Device
from textgym.models.machine.seeding import seeded
from textgym.rewards.models.last_token import LastTokenScorer
from textgym.rewards.models.pairwise import RewardModelConfig, cut_groups, fit
from textgym.rewards.models.reward_model import RewardModel


def train_reward_model(
    preferences: Any,
    base: str | os.PathLike[str] = "tiny",
    *,
    config: RewardModelConfig | None = None,
    heldout: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    device: Device = "auto",
) -> tuple[RewardModel, float]:
    """Train a reward model on preference pairs with `transformers.Trainer`, without output or files.

    Pairs with the same `group` (or the same `prompt`, if there are no groups) are one element of a batch, in which each
    text is encoded once, in however many pairs it occurs (Ouyang et al., 2022, section 3.5). A prompt with more than 16
    different texts makes several elements.

    Args:
        preferences: Any source that `load_preferences` accepts. Pairs have `chosen` and `rejected` (texts or
            conversations) and optionally `prompt` (put before both), `margin`, `probability` and `group`.
        base: The language model or classifier to start from: any name or path that `load_classifier` accepts.
        config: Hyperparameters.
        heldout: Pairs for evaluation; `None` holds out a share of the groups.
        callbacks: Callbacks of transformers, for progress.
        device: Device of the training and of the model; `"auto"` is the current GPU if there is one.

    Returns:
        The frozen reward model, and its accuracy on the held-out pairs (NaN if there are none).

    Raises:
        ValueError: If there are no pairs, or a pair has no `chosen` or `rejected`.
    """
    config = (config or RewardModelConfig()).resolved(base)
    pairs = load_preferences(preferences)
    if heldout is None:
        pairs, heldout = split_preferences(pairs, config.heldout_fraction, config.seed)
    groups, heldout = cut_groups(_grouped(pairs)), load_preferences(heldout) if heldout else []
    with seeded(config.seed), _torch_threads(config.num_threads):
        tokenizer = load_tokenizer(base)
        model = load_classifier(base, num_layers=config.num_layers, device=device)
        model.config.pad_token_id = tokenizer.pad_token_id
        reward_model = RewardModel(model, tokenizer, max_length=config.max_length)
        model.requires_grad_(True)
        fit(reward_model.scorer, groups, reward_model.encode, config, callbacks)
        reward_model.scorer = LastTokenScorer(freeze(model))  # accelerate has wrapped the forward of the old one
        return reward_model, pairwise_accuracy(reward_model, heldout) if heldout else math.nan


<<<<<<< HEAD
def split_preferences(pairs: Sequence[Pair], fraction: float, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into training and held-out pairs by whole groups (or prompts); keep a group for training."""
    groups = _grouped(pairs)
    random.Random(seed).shuffle(groups)
    count = min(math.ceil(fraction * len(groups)), len(groups) - 1)
    train, heldout = ([dict(pair) for group in part for pair in group] for part in (groups[count:], groups[:count]))
    return train, heldout
=======
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
        pairs.append(
            RatedPair(tuple(chosen.kept), tuple(rejected.kept), margins[index], probabilities[index], cluster_of[index])
        )
        count_faulty_texts(faults, row)
        if chosen.kept == rejected.kept:
            faults.count(EQUAL_SIDES, row.place)
        if chosen.lost or rejected.lost:
            faults.count(CUT_PROMPT, row.place)
    count_duplicates(faults, [row.place for row in rows], [pair[:2] for pair in pairs])
    return pairs, faults
>>>>>>> e6825e7 (textgym data FILE, the page Your data, and what is read of public data sets)


def pairwise_accuracy(reward: Callable[..., Any], pairs: Sequence[Pair]) -> float:
    """Return the share of pairs whose `chosen` text has the higher score; a tie counts as one half."""
    differences = score_differences(reward, pairs)
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def score_differences(reward: Callable[..., Any], pairs: Sequence[Pair]) -> np.ndarray:
    """Return the score of `chosen` minus that of `rejected`, `(P,)`; each text is scored once."""
    keys = [[json.dumps([pair.get("prompt") or "", pair[side]]) for pair in pairs] for side in ("chosen", "rejected")]
    texts = {key: json.loads(key) for key in dict.fromkeys(keys[0] + keys[1])}
    completions = [completion for _, completion in texts.values()]
    # A pair may have no separate prompt; the empty one has the same form as its completion.
    prompts = [prompt or ("" if isinstance(completion, str) else []) for prompt, completion in texts.values()]
    score_of = dict(zip(texts, reward(prompts=prompts, completions=completions), strict=True))
    return np.array([score_of[chosen] - score_of[rejected] for chosen, rejected in zip(*keys, strict=True)])


def _grouped(preferences: Sequence[Pair]) -> list[list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for index, pair in enumerate(preferences):
        same = json.dumps(pair["prompt"]) if pair.get("prompt") else ("pair", index)
        groups.setdefault(same if pair.get("group") is None else ("group", pair["group"]), []).append(pair)
    return list(groups.values())


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
