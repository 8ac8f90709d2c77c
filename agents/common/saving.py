"""Agents on disk, so that training can go on from them: the policy as its own folder, and the training state.

Weights are in safetensors, the rest in plain values and one file that loads with `weights_only`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from textgym.data.files import atomic_folder
from textgym.envs.interface import rollout_env
from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import Adapters, activate, carries_adapters, is_twin, twin, without_adapters
from textgym.models.loading import freeze, load_causal_lm
from textgym.models.machine.devices import Device, generator_state, resolve_device, restore_generator
from textgym.models.machine.seeding import global_generators, restore_global_generators
from textgym.models.merging import merged, save_plain
from textgym.models.token_model import TokenModel

from ..machine import distributed
from ..machine.circumstances import machine, warn_of_differences
from ..machine.distributed import everyone, full, join, load_optimizer

TENSORS, FROZEN = "tensors.safetensors", "frozen"
TRAINED, TWIN = "trained.safetensors", ".safetensors"


def save_policy(policy: ActorCritic, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Writes `policy/`, a plain transformers folder.

    An adapter is merged there. Beside it are then `base/`, the model below the adapter, `adapter/`, the policy's
    adapter as peft writes it, and a file with all weights that are not in `base/`.

    Returns:
        What `load_policy` has to be told, as plain values.
    """
    policy.save_pretrained(folder / "policy", tokenizer)
    settings: dict[str, Any] = {
        "trained": [name for name, weight in policy.named_parameters() if weight.requires_grad],
        "critic": "shared" if policy.critic is None else "separate",
        "temperature": policy.temperature,
        "dtype": str(policy.lm.dtype).removeprefix("torch."),
        "device": str(policy.device),
    }
    return settings if policy.lora is None else {**settings, **_save_adapters(policy, folder)}


def _save_adapters(policy: ActorCritic, folder: Path) -> dict[str, Any]:
    """Writes what a policy with adapters is made again from; returns which of them are in use."""
    critic = policy.critic
    if critic is not None and is_twin(critic, policy.lm):
        critic = None  # the same weights, and an adapter
    with torch.random.fork_rng(devices=[]):  # which a new value head would draw from
        base = ActorCritic(without_adapters(policy.lora), critic, policy.temperature)
    base.save_pretrained(folder / "base")

    adapters = Adapters.of(policy.lora)
    policy.lora.save_pretrained(folder / "adapter", save_embedding_layers=False)  # which are in `base/`
    adapters.save(folder / "adapter")
    save_file(tensors_apart(policy, base), folder / TRAINED)
    return {"active_adapters": adapters.active}


def tensors_apart(module: nn.Module, of: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that a module does not share with another one, and its buffers; by their names, each once."""
    shared = {id(weight) for weight in of.parameters()}
    saved = module.state_dict()
    apart = {name: weight for name, weight in module.named_parameters() if id(weight) not in shared}
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {name: tensor.detach().clone().contiguous() for name, tensor in {**apart, **buffers}.items()}


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
    active, trained = settings.pop("active_adapters", ["default"]), settings.pop("trained", None)
    if (folder / "adapter").exists():
        adapters = Adapters.load(folder / "adapter", active)
        policy = ActorCritic.from_pretrained(folder / "base", lora=adapters, **settings)
        tensors = load_file(folder / TRAINED, device=str(policy.device))
        unknown = policy.load_state_dict(tensors, strict=False).unexpected_keys
        assert not unknown, f"the policy has no weights called {unknown}"
        trained = list(tensors) if trained is None else trained  # version 0.1 saved no others
    else:
        policy = ActorCritic.from_pretrained(folder / "policy", **settings)
    if trained is not None:
        for name, weight in policy.named_parameters():
            weight.requires_grad_(name in trained)
    return policy


def save_frozen_model(model: TokenModel, folder: Path, policy: ActorCritic) -> None:
    """Writes a plain transformers folder; of a model that shares weights with the policy, a file with the others."""
    if not (carries_adapters(model.lm) and is_twin(model.lm, policy.lm)):
        save_plain(merged(model.lm) if carries_adapters(model.lm) else model.lm, folder)
        return
    folder.parent.mkdir(exist_ok=True)
    active = json.dumps(Adapters.of(model.lm).active)
    save_file(tensors_apart(model.lm, policy.lm), folder.with_suffix(TWIN), metadata={"active_adapters": active})


def load_frozen_model(path: Path, policy: ActorCritic) -> TokenModel:
    """The model that `save_frozen_model` wrote, in the precision that it had."""
    if path.suffix != TWIN:
        lm = load_causal_lm(path, dtype=AutoConfig.from_pretrained(path).dtype, device=policy.device)
        return freeze(TokenModel(lm, policy.temperature))
    with safe_open(path, framework="pt", device=str(policy.device)) as file:
        active = json.loads(file.metadata()["active_adapters"])
    tensors = load_file(path, device=str(policy.device))
    lm = twin(policy.lm, apart=tensors)
    activate(lm, active)
    lm.load_state_dict(tensors, strict=False)
    return freeze(TokenModel(lm, policy.temperature))


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
            save_frozen_model(model, temporary / FROZEN / name, agent.policy)
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
        agent.take_frozen_model(part.stem, load_frozen_model(part, policy))
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
