"""A policy on disk, so that training can go on from it: language model, critic, and adapter if it has one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import quiet


def save_policy(policy: ActorCritic, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Writes `policy/`, a plain transformers folder, and under LoRA `base/` and `adapter/`, which it has merged.

    Returns:
        What `load_policy` has to be told, as plain values.
    """
    policy.save_pretrained(folder / "policy", tokenizer)
    if policy.lora is not None:
        base = ActorCritic(copy.deepcopy(policy.lora).unload(), policy.critic, policy.temperature)
        base.value_head = policy.value_head
        base.save_pretrained(folder / "base")
        policy.lora.save_pretrained(folder / "adapter")
    return {
        "critic": "shared" if policy.critic is None else "separate",
        "temperature": policy.temperature,
        "dtype": str(policy.lm.dtype).removeprefix("torch."),
    }


def load_policy(folder: Path, settings: dict[str, Any]) -> ActorCritic:
    """The policy that `save_policy` wrote, weight for weight."""
    settings = {**settings, "dtype": getattr(torch, settings["dtype"])}
    if not (folder / "adapter").exists():
        return ActorCritic.from_pretrained(folder / "policy", **settings)
    from peft import PeftConfig, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder / "adapter"))
    config.inference_mode = False
    policy = ActorCritic.from_pretrained(folder / "base", lora=config, **settings)
    with quiet():
        set_peft_model_state_dict(policy.lora, load_file(folder / "adapter" / "adapter_model.safetensors"))
    return policy
