"""overview: what a run is about to do, one line each: models, reward, prompts, responses, length, place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from textgym.envs.interface import RolloutEnv, TextProperties
from textgym.models.token_model import TokenModel

from ...common.rollout_agent import RolloutAgent
from ...common.supervised import SupervisedAgent
from ...machine.distributed import count


def overview(agent: RolloutAgent | SupervisedAgent, total_episodes: int = 0) -> dict[str, str]:
    """Return what a run is about to do, as titles and texts in the order in which to show them.

    Args:
        agent: The agent, before its first update or resumed.
        total_episodes: Episodes of the whole run; SFT and DPO do not play any.
    """
    policy = agent.policy
    parts = {"agent": type(agent).__name__, "policy": f"{policy.lm.config.model_type}, {_size_of(policy.lm)}"}
    parts["critic"] = "in the policy's trunk" if policy.critic is None else f"separate, {_size_of(policy.critic)}"
    if isinstance(agent, RolloutAgent):
        parts |= _played(agent, total_episodes)
    else:
        parts["critic"] += ", not trained"
        lengths = [len(text.prompt) + len(text.completion) for text in agent.texts]
        parts["data"] = f"{len(agent):,} rows, texts of {_span(lengths)}"
        parts["training"] = f"{agent.total_updates:,} updates of {agent.config.batch_size} rows"
    threads = torch.get_num_threads()
    processes = f", {count()} processes" if count() > 1 else ""
    parts["numbers"] = f"{_dtype(policy.lm)}, {threads} thread(s){processes}"
    parts["seed"] = str(agent.config.seed)
    if agent.updates:
        parts["resumed"] = f"after update {agent.updates}"
    return parts


def _played(agent: RolloutAgent, total_episodes: int) -> dict[str, str]:
    env = agent.base_env
    scorer, controller = env.scorer, agent.penalty.controller
    rewards = [
        name if weight == 1 else f"{weight:g} x {name}"
        for name, weight in zip(scorer.names, scorer.weights, strict=True)
    ]
    stops = [repr(env.tokenizer.decode([token])) for token in env.stop.ids]
    return {
        "reference": _reference(agent),
        "KL penalty": f"beta {agent.penalty.coef:g} ({type(controller).__name__}), estimator {agent.penalty.estimator}",
        "reward": ", ".join(rewards),
        "prompts": _prompts(env),
        "responses": f"up to {env.max_new_tokens} tokens, end at {', '.join(stops) or 'that length alone'}",
        "training": f"{_training(agent, total_episodes)}, {agent.envs.num_envs} at a time",
    }


def _prompts(env: RolloutEnv) -> str:
    """Say how many prompts there are, how long they are, and how many of them are cut."""
    number = f"{len(env.prompts):,}"
    if not isinstance(env, TextProperties) or env.prompt_tokens is None:
        return number
    cut = f"{env.num_cut_prompts:,} cut at their beginning" if env.num_cut_prompts else "none cut"
    return f"{number} of {_span(env.prompt_tokens)}, {cut}"


def _span(lengths: Sequence[int] | np.ndarray) -> str:
    return f"{min(lengths):,} to {max(lengths):,} tokens ({np.mean(lengths):.1f} on average)"


def _training(agent: RolloutAgent, total_episodes: int) -> str:
    """Say how many episodes a run has, and in updates of which size; those before a resumption count as they were."""
    size, left = agent.config.episodes_per_update, agent.updates_left(total_episodes)
    before_last = agent.episodes + size * max(left - 1, 0)
    last = agent.size_of_update(total_episodes - before_last) if left else 0
    updates, episodes = agent.updates + left, before_last + last
    smaller = f", the last one of {last}" if 0 < last < size and updates > 1 else ""
    return f"{episodes:,} episodes: {updates:,} update(s) of {min(size, episodes)} episodes{smaller}"


def _reference(agent: RolloutAgent) -> str:
    """Say what the reference is, and how much memory it needs in addition to the policy."""
    reference = agent.penalty.reference
    mine = {weight.data_ptr() for weight in agent.policy.parameters()}
    own = [weight for weight in reference.parameters() if weight.data_ptr() not in mine]
    if not own:
        return "shares all weights with the policy"
    size = sum(weight.numel() * weight.element_size() for weight in own)
    shared = "" if len(own) == len(list(reference.parameters())) else ", shares the others with the policy"
    return f"frozen, {_millions(sum(weight.numel() for weight in own))} of its own ({size / 2**20:,.0f} MiB){shared}"


def _size_of(model: nn.Module | TokenModel) -> str:
    weights = list(model.parameters())
    total = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    return f"{_millions(total)}, {'all' if trained == total else _millions(trained)} trained"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f}M parameters" if number < 1e9 else f"{number / 1e9:,.2f}B parameters"


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
