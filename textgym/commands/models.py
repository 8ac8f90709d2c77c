"""What commands make before they begin: the device, the environment, and the models that it asks for."""

from __future__ import annotations

import json
from typing import Any

import gymnasium as gym
import torch

from textgym.agents.machine.distributed import device
from textgym.flags import Chat, Evaluate, Train, TrainReward
from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import load_causal_lm
from textgym.models.machine.devices import use_device


def place_of(command: Train | TrainReward | Evaluate | Chat) -> torch.device:
    """The device that a command asks for, made the current one; of several processes each has one of its own.

    Raises:
        ValueError: it is not on this machine, or the launcher has chosen another kind.
    """
    own = device()
    if own is None:
        return use_device(command.device)
    if command.device not in ("auto", own.type):
        raise ValueError(
            f"the launcher gives this process {own}, and --device asks for {command.device}: leave --device out, and "
            "choose with the launcher (accelerate launch --cpu, --gpu_ids)"
        )
    return own


def make_envs(env: str, num_envs: int, env_kwargs: str, place: torch.device, **kwargs: Any) -> Any:
    """The environment of a command, with its `--env-kwargs`."""
    try:
        further = json.loads(env_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--env-kwargs is not JSON: {error}") from error
    if not isinstance(further, dict):
        raise ValueError(f"--env-kwargs must be a JSON object of arguments, got {env_kwargs}")
    if "device" in further:
        raise ValueError(
            f"--env-kwargs has a device, which the policy would not share: leave it out, and give --device "
            f"{further['device']} for both"
        )
    if place.type != "cpu":  # the default of environments
        kwargs["device"] = str(place)
    try:
        return gym.make_vec(env, num_envs, **{"kl_mode": "deferred", "array": "torch", **kwargs, **further})
    except TypeError as error:
        raise ValueError(f"{env} cannot be made: {error}. Its further arguments go into --env-kwargs") from error


def reference_of(model: str, command: Train, place: torch.device) -> Any:
    """The reference as environments take it: a name, or a model whose own code the user trusts."""
    if not command.trust_remote_code:
        return model
    return load_causal_lm(model, device=place, trust_remote_code=True).requires_grad_(False)


def decoder_start(policy: ActorCritic) -> dict[str, Any]:
    """What the environment is told of an encoder-decoder model; nothing of others."""
    return {"decoder_start_ids": policy.decoder_start_ids} if policy.decoder_start_ids else {}
