"""Whole updates equal those of TRL 1.16 (scripts/peers/record_updates.py records them): the same weights after.

Each case has two updates, each of two optimiser steps that accumulate gradients over micro-batches, on completions of
unequal lengths, with groups whose scores are all equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from textgym.agents import GRPO, RLOO
from textgym.agents.common.rollout import Rollout
from textgym.models.actor_critic import ActorCritic
from textgym.models.letter_tokenizer import letter_tokenizer
from textgym.models.sequences import Sequences
from textgym.testing import assert_close, mock_lm

pytestmark = pytest.mark.numerics

FILE = Path(__file__).with_name("updates.safetensors")
GROUP, LONGEST, ROWS, MICRO = 4, 6, 24, 8
IN_LOSS = {"kl_in": "loss"}
CASES: dict[str, tuple[Any, dict[str, Any], float]] = {
    "grpo": (GRPO, {"loss_type": "grpo", "clip_range_high": 0.28}, 0.0),
    "grpo, kl": (GRPO, {"loss_type": "grpo", **IN_LOSS, "kl_gradient": "k3"}, 0.1),
    "dr_grpo": (GRPO, {"loss_type": "dr_grpo", "scale": "none"}, 0.0),
    "dapo": (GRPO, {"loss_type": "dapo", "clip_range_high": 0.28}, 0.0),
    "dapo, kl": (GRPO, {"loss_type": "dapo", **IN_LOSS, "kl_gradient": "token"}, 0.1),
    "bnpo": (GRPO, {"loss_type": "bnpo", "micro_batch_size": None}, 0.0),
    "gspo": (GRPO, {"loss_type": "grpo", "ratio": "sequence"}, 0.0),
    "cispo": (GRPO, {"surrogate": "cispo", "loss_type": "dapo", "clip_range_high": 0.28}, 0.0),
    "rloo": (RLOO, {}, 0.0),
    "rloo, kl": (RLOO, {}, 0.1),
    "gdpo": (GRPO, {"scale": "each"}, 0.0),
    "entropy": (GRPO, {"entropy_share": 0.5, "num_epochs": 1, "micro_batch_size": None}, 0.0),
    "importance": (GRPO, {"importance_cap": 1.5}, 0.0),
}
"""Agent, its settings and beta of each case of the script."""
FAST = ("grpo", "dapo, kl", "gspo", "rloo, kl", "gdpo")


def count_b(completions: list[str]) -> list[float]:
    return [float(text.count("b")) for text in completions]


def fewer_c(completions: list[str]) -> list[float]:
    return [-float(text.count("c")) for text in completions]


OBJECTIVES = (count_b, fewer_c)


def recorded(name: str) -> Tensor:
    with safe_open(FILE, framework="pt") as file:
        return file.get_tensor(name)


def flat(model: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def rollout_of(case: str, update: int, policy: ActorCritic) -> Rollout:
    """What TRL sampled, as a rollout; its log-probs are the policy's."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "scores")
    prompts, prompt_mask, completions, mask, scores = (recorded(f"{case}/{update}/{name}") for name in names)
    rows = [
        torch.cat([prompt[real.bool()], completion[own.bool()]])
        for prompt, real, completion, own in zip(prompts, prompt_mask, completions, mask, strict=True)
    ]
    lengths = mask.sum(1)
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    sequences = Sequences(input_ids, prompt_mask.sum(1), lengths)
    log_probs = policy.sequence_log_probs(sequences)
    if case == "importance":  # those of a sampler that differs from the trainer
        log_probs = log_probs - torch.where(mask.bool(), recorded(f"{case}/{update}/difference"), 0.0)
    rewards = torch.zeros_like(log_probs).scatter(1, (lengths - 1)[:, None], scores[:, None])
    zeros = torch.zeros_like(log_probs)
    components = {}
    if case == "gdpo":
        columns = recorded(f"{case}/{update}/rewards").double()
        components = {
            f"reward/{function.__name__}": column for function, column in zip(OBJECTIVES, columns, strict=True)
        }
    return Rollout(sequences, log_probs, zeros, rewards, scores, scores, lengths < LONGEST, components)


def make_agent(case: str) -> Any:
    kind, settings, beta = CASES[case]
    lm = mock_lm(8, hidden_size=8, num_layers=1)
    torch.nn.utils.vector_to_parameters(recorded(f"{case}/weights"), lm.parameters())
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=ROWS,
        prompts=["a"],
        tokenizer=letter_tokenizer(8),
        reward=list(OBJECTIVES) if case == "gdpo" else lambda completions, **_: np.zeros(len(completions)),
        reward_weights=[1.0, 0.5] if case == "gdpo" else None,
        max_prompt_tokens=4,
        max_new_tokens=LONGEST,
        kl_coef=beta,
        kl_mode="deferred",
    )
    common = {"learning_rate": 1.0, "anneal_learning_rate": False, "optimizer": "SGD", "max_grad_norm": 1e9}
    passes = {"num_epochs": 2, "minibatch_size": ROWS, "micro_batch_size": MICRO, "group_size": GROUP}
    return kind(ActorCritic(lm), envs, kind.config_class(episodes_per_update=ROWS, **{**common, **passes, **settings}))


def test_the_records_are_of_the_version_that_the_docstring_names() -> None:
    with safe_open(FILE, framework="pt") as file:
        assert file.metadata()["trl"] == "1.16.0"


def test_the_records_have_flat_groups_unequal_lengths_and_weights_that_move() -> None:
    flat_groups, lengths = [], set()
    for case in CASES:
        for update in range(2):
            groups = recorded(f"{case}/{update}/scores").view(-1, GROUP)
            flat_groups.append((groups == groups[:, :1]).all(1).any())
            lengths |= set(recorded(f"{case}/{update}/completion_mask").sum(1).tolist())
        moved = recorded(f"{case}/1/weights") - recorded(f"{case}/weights")
        assert moved.abs().max() > 0.01
    assert sum(map(bool, flat_groups)) >= 3
    assert lengths == set(range(1, LONGEST + 1))


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES])
def test_weights_after_whole_updates_are_those_of_trl(case: str) -> None:
    agent = make_agent(case)
    before = recorded(f"{case}/weights")
    for update in range(2):
        torch.nn.utils.vector_to_parameters(before, agent.policy.lm.parameters())  # so that rounding does not add up
        rollout = rollout_of(case, update, agent.policy)
        agent.update(rollout, agent.measure_kl(rollout))
        theirs = recorded(f"{case}/{update}/weights")
        if case not in ("entropy", "importance"):  # which give tokens of an episode other advantages
            assert_close(agent.advantages[:, 0], recorded(f"{case}/{update}/advantages"), terms=1000)
        assert_close(flat(agent.policy.lm), theirs, terms=1000)
        before = theirs
    assert (before - recorded(f"{case}/weights")).abs().max() > 0.01
