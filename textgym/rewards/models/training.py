"""train_reward_model: a reward model from preference pairs."""

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

from textgym.data.preferences import Pair, load_preferences
from textgym.models.loading import freeze, load_classifier, load_tokenizer
from textgym.models.machine.devices import Device
from textgym.models.machine.seeding import seeded
from textgym.rewards.models.last_token import LastTokenScorer
from textgym.rewards.models.pairwise import RewardModelConfig, fit
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
    """Trains a reward model on preference pairs with `transformers.Trainer`; quiet, and it leaves no files.

    Pairs of one `group` (or else of one `prompt`) are trained on as one element of a batch, in which each text is
    encoded once however many pairs it stands in (Ouyang et al. 2022, section 3.5).

    Args:
        preferences: rows as `load_preferences` reads them: dicts with `chosen` and `rejected` (texts or conversations),
            and where they exist `prompt` (put before both), `margin`, `probability` and `group`.
        base: the language model or classifier to start from, as `load_classifier` knows it.
        config: learning rates, loss, length.
        heldout: pairs to measure accuracy on; `None` holds out a share of the groups.
        callbacks: of transformers, for progress; the trainer itself prints nothing.
        device: where it is trained, and stays; `"auto"` is the current GPU where there is one.

    Returns:
        The reward model, frozen, and its accuracy on the held-out pairs (NaN if there are none).

    Raises:
        ValueError: no pairs, or a pair without `chosen` or `rejected`.
    """
    config = (config or RewardModelConfig()).resolved(base)
    pairs = load_preferences(preferences)
    if heldout is None:
        pairs, heldout = split_preferences(pairs, config.heldout_fraction, config.seed)
    groups, heldout = _grouped(pairs), load_preferences(heldout) if heldout else []
    with seeded(config.seed), _torch_threads(config.num_threads):
        tokenizer = load_tokenizer(base)
        model = load_classifier(base, num_layers=config.num_layers, device=device)
        model.config.pad_token_id = tokenizer.pad_token_id
        reward_model = RewardModel(model, tokenizer, max_length=config.max_length)
        model.requires_grad_(True)
        fit(reward_model.scorer, groups, reward_model.encode, config, callbacks)
        reward_model.scorer = LastTokenScorer(freeze(model))  # without the wrapping that accelerate put on
        return reward_model, pairwise_accuracy(reward_model, heldout) if heldout else math.nan


def split_preferences(pairs: Sequence[Pair], fraction: float, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs held out, whole groups (or prompts) on one side; at least one group is trained on."""
    groups = _grouped(pairs)
    random.Random(seed).shuffle(groups)
    count = min(math.ceil(fraction * len(groups)), len(groups) - 1)
    train, heldout = ([dict(pair) for group in part for pair in group] for part in (groups[count:], groups[:count]))
    return train, heldout


def pairwise_accuracy(reward: Callable[..., Any], pairs: Sequence[Pair]) -> float:
    """Share of pairs whose `chosen` text a reward function scores above the `rejected` one; a tie counts one half."""
    differences = score_differences(reward, pairs)
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def score_differences(reward: Callable[..., Any], pairs: Sequence[Pair]) -> np.ndarray:
    """Score of `chosen` less that of `rejected`, `(P,)`. Each text is scored once, however many pairs it stands in."""
    keys = [[json.dumps([pair.get("prompt") or "", pair[side]]) for pair in pairs] for side in ("chosen", "rejected")]
    texts = {key: json.loads(key) for key in dict.fromkeys(keys[0] + keys[1])}
    completions = [completion for _, completion in texts.values()]
    # A conversation may have its prompt in it.
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
