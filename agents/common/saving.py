"""Agents on disk, so that training can go on from them: the policy as its own folder, and the training state.

Weights are in safetensors, the rest in plain values and one file that loads with `weights_only`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from safetensors.torch import load_file, save_file

from textgym.data.files import atomic_folder
from textgym.envs.interface import rollout_env
from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import is_twin
from textgym.models.machine.devices import Device, generator_state, resolve_device, restore_generator
from textgym.models.machine.seeding import global_generators, restore_global_generators
from textgym.models.token_model import TokenModel

from ..machine import distributed
from ..machine.circumstances import machine, warn_of_differences
from ..machine.distributed import everyone, full, join, load_optimizer

TENSORS, FROZEN = "tensors.safetensors", "frozen"
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
        return resolve_device(rollout_env(envs).device)
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


def save_agent(agent: Any, folder: Path) -> None:
    """Write a `RolloutAgent`; all processes call it, and the first one writes for all of them."""
    state = {
        "optimizer": full(agent.optimizer.state_dict()),
        "generators": everyone(
            {
                "sampler": generator_state(agent.sampler),
                "shuffler": generator_state(agent.shuffler),
                "global": global_generators(),  # reward functions may draw from them
            }
        ),
    }
    scorers = everyone(agent.base_env.scorer.state())
    if distributed.rank() == 0:
        _write(agent, folder, state, scorers)
    everyone(None)  # nobody goes on before all of it is there


def _write(agent: Any, folder: Path, state: dict[str, Any], scorers: list[dict[str, Any]]) -> None:
    envs = agent.envs.unwrapped
    meta = {
        "config": dataclasses.asdict(agent.config),
        "progress": [agent.episodes, agent.updates, agent.total_episodes],
        "controller": vars(agent.penalty.controller),
        "scorers": scorers,
        "agent": agent.training_state(),
        **agent.base_env.progress(),
        "env": envs.spec.to_json() if envs.spec is not None and _is_plain(envs.spec.kwargs) else None,
        "num_envs": envs.num_envs,
        "machine": machine(agent.policy),
    }
    with atomic_folder(folder) as temporary:
        meta["policy"] = save_policy(agent.policy, temporary, agent.base_env.tokenizer)
        torch.save(state, temporary / "state.pt")
        if tensors := agent.training_tensors():
            save_file({name: x.detach().clone() for name, x in tensors.items()}, temporary / TENSORS)
        for name, model in agent.frozen_models().items():
            model.lm.save_pretrained(temporary / FROZEN / name)
        (temporary / "agent.json").write_text(json.dumps(meta, indent=1))


def load_agent(kind: Any, folder: Path, envs: Any, device: Device) -> Any:
    """Make a `RolloutAgent` of a kind as `save_agent` wrote it; see `RolloutAgent.load`."""
    join()
    meta = json.loads((folder / "agent.json").read_text())
    place = place_of(folder, meta["policy"], device, envs)
    # Tensors of a device that is not here could not be read; loading the optimizer moves its own.
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    if (saved := len(state["generators"])) != distributed.count():
        raise ValueError(
            f"{folder} was saved by {saved} processes, and this run has {distributed.count()}: launch {saved}, or "
            f"start anew from the policy in {folder / 'policy'}"
        )
    if envs is None:
        if meta["env"] is None:
            raise ValueError(
                f"{folder} was trained in an environment made of objects: pass it, load(folder, envs=envs)"
            )
        envs = _made_again(meta, place)
    policy = load_policy(folder, {**meta["policy"], "device": place})
    agent = kind(policy, envs, kind.config_class(**meta["config"]))

    # What was learned, and the optimiser's moments.
    load_optimizer(agent.optimizer, state["optimizer"])
    for part in sorted((folder / FROZEN).glob("*")):
        model = TokenModel.load(str(part), temperature=policy.temperature, device=policy.device)
        agent.take_frozen_model(part.name, model)
    agent.load_training_state(meta["agent"])
    if (folder / TENSORS).exists():
        agent.load_training_tensors(load_file(folder / TENSORS, device=str(policy.device)))

    # How far the run is.
    agent.episodes, agent.updates, agent.total_episodes = meta["progress"]
    for name, value in meta["controller"].items():
        setattr(agent.penalty.controller, name, value)
    agent.base_env.scorer.load_state(meta["scorers"][distributed.rank()])
    agent.base_env.resume(meta)

    # Random generators; the global ones last, since what is made above may draw from them.
    generators = state["generators"][distributed.rank()]
    restore_generator(agent.sampler, generators["sampler"])
    restore_generator(agent.shuffler, generators["shuffler"])
    restore_global_generators(generators["global"])
    warn_of_differences(folder, meta["machine"], policy)
    return agent


def _made_again(meta: dict[str, Any], place: torch.device) -> Any:
    """Make the environment that an agent was saved with, on another device if need be."""
    spec = gym.envs.registration.EnvSpec.from_json(meta["env"])
    on_cpu = place.type == "cpu" and "device" not in spec.kwargs
    own: dict[str, Any] = {} if on_cpu else {"device": str(place)}
    return gym.make_vec(spec, num_envs=meta["num_envs"], **own)


def _is_plain(kwargs: dict[str, Any]) -> bool:
    try:
        json.dumps(kwargs)
    except TypeError:
        return False
    return True
