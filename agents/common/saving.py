"""A policy on disk, so that training can go on from it: language model, critic, and adapter if it has one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import is_twin
from textgym.models.machine.devices import Device, resolve_device

from ..machine import distributed

TRAINED = "trained.safetensors"


def save_policy(policy: ActorCritic, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Writes `policy/`, a plain transformers folder.

    Under LoRA, which is merged there, `base/` has the frozen weights, `adapter/` the policy's adapter as peft writes
    it, and a file beside them all weights that are trained.

    Returns:
        What `load_policy` has to be told, as plain values.
    """
    policy.save_pretrained(folder / "policy", tokenizer)
    if policy.lora is not None:
        critic = policy.critic
        if critic is not None and is_twin(critic, policy.lm):
            critic = None  # the same weights, and an adapter
        with torch.random.fork_rng(devices=[]):  # which a new value head would draw from
            base = ActorCritic(copy.deepcopy(policy.lora).unload(), critic, policy.temperature)
        base.save_pretrained(folder / "base")
        policy.lora.save_pretrained(folder / "adapter")
        trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        save_file({name: weight.detach().clone() for name, weight in trained.items()}, folder / TRAINED)
    return {
        "critic": "shared" if policy.critic is None else "separate",
        "temperature": policy.temperature,
        "dtype": str(policy.lm.dtype).removeprefix("torch."),
        "device": str(policy.device),
    }


def place_of(folder: Path, saved: dict[str, Any], device: Device = None, envs: Any = None) -> torch.device:
    """Return where an agent is loaded: where the caller says, else where its environment is, else where it was saved.

    Of several processes each has a device of its own.

    Args:
        folder: of the agent.
        saved: what `save_policy` returned.
        device: what the caller says.
        envs: the caller's environment.

    Raises:
        ValueError: the caller's device is not on this machine.
    """
    if (own := distributed.device()) is not None:
        return own
    if device is not None:
        return resolve_device(device)
    if envs is not None:
        return resolve_device(envs.unwrapped.task.device)
    try:
        return resolve_device(saved["device"])
    except ValueError as error:
        place = resolve_device("auto")
        warnings.warn(
            f"{folder} was saved on {saved['device']!r} and is loaded on {str(place)!r}: {error}",
            stacklevel=3,
        )
        return place


def load_policy(folder: Path, settings: dict[str, Any]) -> ActorCritic:
    """The policy that `save_policy` wrote, weight for weight, on `settings["device"]`."""
    settings = {**settings, "dtype": getattr(torch, settings["dtype"])}
    if not (folder / "adapter").exists():
        return ActorCritic.from_pretrained(folder / "policy", **settings)
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder / "adapter"))
    config.inference_mode = False
    policy = ActorCritic.from_pretrained(folder / "base", lora=config, **settings)
    trained = load_file(folder / TRAINED, device=str(policy.device))
    policy.load_state_dict(trained, strict=False)
    assert set(trained) == {name for name, weight in policy.named_parameters() if weight.requires_grad}
    return policy
