"""Environments of agents made of names, `PPO("tiny", "textgym/Sentiment-v0")`, and prompts kept from training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym

from textgym.data.overlap import key_of_prompt
from textgym.data.rows import Row
from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic
from textgym.models.fitting import tokenizer_of

from ..configs.policy_gradient import PromptGroupConfig
from ..configs.rollout import RolloutAgentConfig
from .distributed import count

SHARE = 10
"""At most one prompt in ten is held out."""
HELD_OUT = 64
MOST_ROWS = 64


@dataclass(frozen=True)
class NamedEnvs:
    """Environments of an agent that was made of names.

    Attributes:
        envs: The environment to train in.
        heldout: One with the prompts that are kept from training.
        env: Id of the environment.
        model: Name of the model, if the policy was one.
    """

    envs: Any
    heldout: Any
    env: str
    model: str | None


def make_named(env: str, policy: ActorCritic, model: str | None, config: RolloutAgentConfig) -> NamedEnvs:
    """Make the environments of an id as `textgym train` does: for the policy's tokenizer, with its start as reference.

    Args:
        env: Id of a registered environment.
        policy: The policy.
        model: Name that the policy was made of; `None` if it was not.
        config: Config of the agent, which the number of rows follows from.

    Raises:
        ConfigError: If there is no such environment, or the policy has no tokenizer.
    """
    tokenizer = tokenizer_of(policy.lm) if model is None else model
    if tokenizer is None:
        raise ConfigError(
            f"the policy has no tokenizer, which {env} needs: pass the environment, gym.make_vec({env!r}, "
            "num_envs=..., tokenizer=...)"
        )
    arguments = {**arguments_for(policy), "tokenizer": tokenizer, "reference": model}
    with known_environment(env):
        envs = gym.make_vec(env, num_rows(config), **arguments)
    return NamedEnvs(envs, heldout_envs(envs, HELD_OUT), env, model)


def arguments_for(policy: ActorCritic) -> dict[str, Any]:
    """Return what an environment of an id is told so that a policy can play in it, in training and in an evaluation."""
    arguments: dict[str, Any] = {"kl_mode": "deferred", "array": "torch"}
    if policy.decoder_start_ids:
        arguments["decoder_start_ids"] = policy.decoder_start_ids
    if policy.device.type != "cpu":
        arguments["device"] = str(policy.device)
    return arguments


@contextmanager
def known_environment(env: str) -> Iterator[None]:
    """Raise a `ConfigError` if gymnasium does not know an id."""
    try:
        yield
    except gym.error.Error as error:
        raise ConfigError(f"{env!r} is no environment: {error}") from error


def num_rows(config: RolloutAgentConfig) -> int:
    """Return how many rows play a config's episodes: up to 64, whole groups, which divide the episodes of an update."""
    each = config.episodes_per_update // count()
    group = config.group_size if isinstance(config, PromptGroupConfig) else 1
    fitting = [rows for rows in range(group, min(each, MOST_ROWS) + 1, group) if each % rows == 0]
    return max(fitting, default=max(group, 1))


def hold_out(rows: Sequence[Row], number: int) -> tuple[list[Row], list[Row]]:
    """Split prompts into those to train on and about `number` to measure on, at most a tenth.

    Prompts that differ only in case, punctuation and white space stay together. Which ones are held out depends on the
    prompts alone, so that a resumed run holds out the same.

    Returns:
        Both lists, in the order of `rows`; the second is empty if there are fewer than ten different prompts.
    """
    keys = [key_of_prompt(row["prompt"]) for row in rows]
    order = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode(errors="surrogatepass")).digest())
    chosen = set(order[: min(number, len(order) // SHARE)])
    train = [row for row, key in zip(rows, keys, strict=True) if key not in chosen]
    return train, [row for row, key in zip(rows, keys, strict=True) if key in chosen][:number]


def heldout_envs(envs: Any, number: int) -> Any:
    """Keep some prompts from training, and return another environment to measure a policy in.

    It has the prompts that are kept, or all of them if there are too few, and in games. Reward functions and reference
    are the same objects, since they may be large.

    Args:
        envs: The `TextVectorEnv` to train in, from `gym.make_vec`; it loses these prompts.
        number: How many prompts to keep, at most a tenth of them.
    """
    base, spec = envs.unwrapped, envs.spec
    arguments = {name: value for name, value in spec.kwargs.items() if name not in ("num_envs", "vectorization_mode")}
    if base.takes_whole_responses:
        train, heldout = hold_out(base.prompts, number)
        if heldout:
            base.replace_prompts(train)
            base.held_out = number
        arguments |= {"reward": base.scorer.functions, "reward_weights": base.scorer.weights}
        arguments |= {"reference": base.reference, "prompts": heldout or train}
    return gym.make_vec(spec.id, base.num_envs, **arguments)
