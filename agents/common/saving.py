"""Save and load agents: the policy in its own folder, and the training state.

Weights are in safetensors. The rest is plain values in JSON, and one file that is loaded with `weights_only=True`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from textgym.data.files import atomic_folder
from textgym.data.manifests import Manifest, checked_manifest
from textgym.envs.interface import TextProperties, rollout_env
from textgym.errors import ConfigError, DamagedFolderError
from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import Adapters, activate, carries_adapters, is_twin, twin, without_adapters
from textgym.models.loading import freeze, load_causal_lm
from textgym.models.machine.devices import Device, generator_state, resolve_device, restore_generator
from textgym.models.machine.finite import check_weights
from textgym.models.machine.seeding import global_generators, restore_global_generators
from textgym.models.merging import save_plain
from textgym.models.token_model import TokenModel
from textgym.settings import from_plain

from ..machine import distributed
from ..machine.circumstances import machine, warn_of_changes, warn_of_differences
from ..machine.distributed import by_first, everyone, gather_shards, join, load_optimizer
from ..machine.named_envs import NamedEnvs, heldout_envs
from ..machine.saved_files import SavedAgent, SavedPolicy, make_environment, read_config, read_json, saved_environment

TENSORS, FROZEN = "tensors.safetensors", "frozen"
TRAINED, TWIN = "trained.safetensors", ".safetensors"
AGENT = "textgym agent"
"""Kind of the folders in their manifest."""


def save_policy(policy: ActorCritic, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Write `policy/`, a transformers folder, in which adapters are merged.

    With an adapter there are also `base/`, the model without the adapter; `adapter/`, the adapter in peft's format; and
    a file with all weights that are not in `base/`.

    Returns:
        The argument `saved` of `load_policy`, as plain values.

    Raises:
        NonFiniteError: If a weight is NaN or infinite.
    """
    check_weights(policy)
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
    """Write the files that a policy with adapters is loaded from, and return which adapters are active."""
    critic = policy.critic
    if critic is not None and is_twin(critic, policy.lm):
        critic = None  # it has the base model's weights, and an adapter, which is saved below
    with torch.random.fork_rng(devices=[]):  # otherwise the new value head would advance the global generator
        base = ActorCritic(without_adapters(policy.lora), critic, policy.temperature)
    base.save_pretrained(folder / "base")

    adapters = Adapters.of(policy.lora)
    policy.lora.save_pretrained(folder / "adapter", save_embedding_layers=False)  # embeddings are in `base/`
    adapters.save(folder / "adapter")
    save_file(tensors_apart(policy, base), folder / TRAINED)
    return {"active_adapters": adapters.active}


def tensors_apart(module: nn.Module, of: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that a module does not share with another one, and its buffers, by name."""
    shared = {id(weight) for weight in of.parameters()}
    saved = module.state_dict()
    apart = {name: weight for name, weight in module.named_parameters() if id(weight) not in shared}
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {name: tensor.detach().clone().contiguous() for name, tensor in {**apart, **buffers}.items()}


def place_of(folder: Path, saved: dict[str, Any], device: Device = None, envs: Any = None) -> torch.device:
    """Return the device to load an agent on: the caller's, or the environment's, or the one it was saved on.

    In a run of several processes it is the device that the launcher assigned to this process.

    Args:
        folder: Folder of the agent.
        saved: The return value of `save_policy`.
        device: The caller's choice.
        envs: The caller's environment.

    Raises:
        ValueError: If the caller's device is not on this machine.
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


def load_policy(folder: Path, saved: Any, device: Device, trust_remote_code: bool = False) -> ActorCritic:
    """Load the policy that `save_policy` wrote, with equal weights.

    Args:
        folder: Folder of the agent.
        saved: The return value of `save_policy`.
        device: Device of the policy.
        trust_remote_code: Whether to run code that comes with the model.
    """
    settings = from_plain(SavedPolicy, saved, f"{folder / 'agent.json'}: policy")
    options: dict[str, Any] = {
        "critic": settings.critic,
        "temperature": settings.temperature,
        "dtype": getattr(torch, settings.dtype),
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    if (folder / "adapter").exists():
        adapters = Adapters.load(folder / "adapter", list(settings.active_adapters))
        policy = ActorCritic.from_pretrained(folder / "base", lora=adapters, **options)
        tensors = load_file(folder / TRAINED, device=str(policy.device))
        if unknown := policy.load_state_dict(tensors, strict=False).unexpected_keys:
            raise DamagedFolderError(f"{folder / TRAINED} has weights that the policy lacks: {', '.join(unknown)}")
    else:
        policy = ActorCritic.from_pretrained(folder / "policy", **options)
    for name, weight in policy.named_parameters():
        weight.requires_grad_(name in settings.trained)
    return policy


def save_frozen_model(model: TokenModel, folder: Path, policy: ActorCritic) -> None:
    """Write a transformers folder; for a model that shares weights with the policy, a file with the other weights."""
    if not (carries_adapters(model.lm) and is_twin(model.lm, policy.lm)):
        save_plain(model.plain_lm(), folder)
        return
    folder.parent.mkdir(exist_ok=True)
    active = json.dumps(Adapters.of(model.lm).active)
    save_file(tensors_apart(model.lm, policy.lm), folder.with_suffix(TWIN), metadata={"active_adapters": active})


def load_frozen_model(path: Path, policy: ActorCritic, trust_remote_code: bool = False) -> TokenModel:
    """Load the model that `save_frozen_model` wrote, in its original dtype."""
    if path.suffix != TWIN:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        lm = load_causal_lm(path, dtype=config.dtype, device=policy.device, trust_remote_code=trust_remote_code)
        return freeze(TokenModel(lm, policy.temperature))
    with safe_open(path, framework="pt", device=str(policy.device)) as file:
        active = json.loads(file.metadata()["active_adapters"])
    tensors = load_file(path, device=str(policy.device))
    lm = twin(policy.lm, apart=tensors)
    activate(lm, active)
    if unknown := lm.load_state_dict(tensors, strict=False).unexpected_keys:
        raise DamagedFolderError(f"{path} has weights that the model lacks: {', '.join(unknown)}")
    return policy.take_along(freeze(TokenModel(lm, policy.temperature)))


def check_class(manifest: Manifest, kind: type, folder: Path) -> None:
    """Check that an agent is loaded into the class that was saved."""
    if manifest.made_by != kind.__name__:
        raise DamagedFolderError(
            f"{folder} holds a {manifest.made_by}: load it with {manifest.made_by}.load, not {kind.__name__}.load"
        )


def start_of(agent: Any) -> str:
    """Return the name of the model that an agent began from, also before it was loaded; empty if it has no name.

    The policy of a loaded agent has the path of its checkpoint as its name, which is gone sooner or later.
    """
    return str(agent.policy.lm.name_or_path) if agent.start is None else agent.start


def save_agent(agent: Any, folder: Path, overwrite: bool) -> None:
    """Save a `RolloutAgent`; all processes must call this function, and rank 0 writes the files."""
    state = {
        "optimizer": gather_shards(agent.optimizer.state_dict()),
        "generators": everyone(
            {
                "sampler": generator_state(agent.sampler),
                "shuffler": generator_state(agent.shuffler),
                "global": global_generators(),  # reward functions may use them
            }
        ),
    }
    scorers = everyone(agent.base_env.scorer.state())
    by_first(lambda: _write(agent, folder, state, scorers, overwrite))


def _write(agent: Any, folder: Path, state: dict[str, Any], scorers: list[dict[str, Any]], overwrite: bool) -> None:
    meta = {
        "config": dataclasses.asdict(agent.config),
        "progress": [agent.episodes, agent.updates, agent.total_episodes],
        "controller": vars(agent.penalty.controller),
        "scorers": scorers,
        "agent": agent.training_state(),
        "environment": agent.base_env.progress(),
        "env": _environment(agent),
        "machine": machine(agent.policy),
        "inputs": agent.inputs,
        "start": start_of(agent),
    }
    with atomic_folder(folder, AGENT, type(agent).__name__, meta["config"], overwrite=overwrite) as temporary:
        meta["policy"] = save_policy(agent.policy, temporary, agent.base_env.tokenizer)
        torch.save(state, temporary / "state.pt")
        if tensors := agent.training_tensors():
            save_file({name: x.detach().clone() for name, x in tensors.items()}, temporary / TENSORS)
        for name, model in agent.frozen_models().items():
            save_frozen_model(model, temporary / FROZEN / name, agent.policy)
        (temporary / "agent.json").write_text(json.dumps(meta, indent=1))


def load_agent(
    kind: Any, folder: Path, envs: Any, device: Device, reward: Any = None, trust_remote_code: bool = False
) -> Any:
    """Load the `RolloutAgent` that `save_agent` wrote; see `RolloutAgent.load`.

    Args:
        kind: Class of the agent.
        folder: Folder of the agent.
        envs: The caller's environment, or `None` to make the saved one again.
        device: The caller's choice of a device.
        reward: Reward for an environment that is made again.
        trust_remote_code: Whether to run code that comes with the models.
    """
    join()
    check_class(checked_manifest(folder, AGENT), kind, folder)
    where = folder / "agent.json"
    saved = from_plain(SavedAgent, read_json(where), str(where))
    config = read_config(kind.config_class, saved.config, f"{where}: config")
    place = place_of(folder, saved.policy, device, envs)
    # On the CPU, because the device they were saved on may not exist here; `load_optimizer` moves the moments.
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    named = None
    if envs is None:
        envs = _made_again(saved.env, where, place, reward)
        named = _held_out(envs, (saved.env or {}).get("held_out", 0))
    elif reward is not None:
        raise ValueError("reward is for an environment that is made again, and envs has its own: give one of them")
    policy = load_policy(folder, saved.policy, place, trust_remote_code)
    agent = kind(policy, envs, config)
    agent.named, agent.start = named, saved.start

    # 1. Weights and the optimiser's moments.
    load_optimizer(agent.optimizer, state["optimizer"])
    for part in sorted((folder / FROZEN).glob("*")):
        agent.take_frozen_model(part.stem, load_frozen_model(part, policy, trust_remote_code))
    agent.load_training_state(saved.agent)
    if (folder / TENSORS).exists():
        agent.load_training_tensors(load_file(folder / TENSORS, device=str(policy.device)))

    # 2. Counters, the KL controller, the scale of scores, and the environment.
    agent.episodes, agent.updates, agent.total_episodes = saved.progress
    if saved.controller.keys() != vars(agent.penalty.controller).keys():
        raise ConfigError(
            f"{folder} was saved with another controller of the KL, with {sorted(saved.controller)}: a "
            f"{type(agent.penalty.controller).__name__} has {sorted(vars(agent.penalty.controller))}. "
            "Give the environment the same kind of kl_coef, or load without envs"
        )
    vars(agent.penalty.controller).update(saved.controller)
    known = distributed.rank() < len(saved.scorers)  # else this process is one more than the run had
    agent.base_env.scorer.load_state(saved.scorers[distributed.rank()] if known else {**saved.scorers[0], "errors": {}})
    agent.base_env.resume(saved.environment)

    # 3. Random generators; the global ones last, because the code above may use them.
    if len(state["generators"]) != distributed.count():
        warnings.warn(
            f"{folder} was saved by {len(state['generators'])} processes, and this run has {distributed.count()}: it "
            "goes on with other random numbers than one that was not interrupted",
            stacklevel=3,
        )
    if known:
        generators = state["generators"][distributed.rank()]
        restore_generator(agent.sampler, generators["sampler"])
        restore_global_generators(generators["global"])
    else:  # numbers that no process of this run has had
        agent.seed_process(config.seed + agent.updates)
    restore_generator(agent.shuffler, state["generators"][0]["shuffler"])  # all processes shuffle alike
    warn_of_differences(folder, saved.machine, policy)
    warn_of_changes(folder, saved.inputs, agent.inputs)
    return agent


def _environment(agent: Any) -> dict[str, Any] | None:
    """Return the arguments that make an agent's environment again, and how many of its prompts are held out."""
    saved, base = saved_environment(agent.envs), agent.base_env
    if saved is None or not isinstance(base, TextProperties) or not base.held_out:
        return saved
    return {**saved, "held_out": base.held_out}


def _held_out(envs: Any, number: int) -> NamedEnvs | None:
    """Keep the prompts from training that were kept when the agent was saved; `None` if there were none."""
    return NamedEnvs(envs, heldout_envs(envs, number), envs.spec.id, None) if number else None


def _made_again(saved: dict[str, Any] | None, where: Path, place: torch.device, reward: Any) -> Any:
    """Make the environment that an agent was saved with, on another device if need be."""
    if saved is None:
        raise ValueError(
            f"{where.parent} was trained in an environment made of objects: pass it, load(folder, envs=envs)"
        )
    on_cpu = place.type == "cpu" and "device" not in saved.get("kwargs", {})
    own: dict[str, Any] = {} if on_cpu else {"device": str(place)}
    return make_environment(saved, where, **own, **({} if reward is None else {"reward": reward}))
