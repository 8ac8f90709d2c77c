"""OnPolicyAgent: the loop that every on-policy algorithm shares: collect, price, update, report, save."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState

from textgym.data.files import atomic_folder
from textgym.models.actor_critic import ActorCritic
from textgym.models.machine.devices import Device, check_one_device, generator_state, restore_generator
from textgym.models.machine.profiled_phases import phase
from textgym.models.machine.seeding import global_generators, restore_global_generators
from textgym.models.token_model import Observation, TokenModel
from textgym.rewards.kl import KLPenalty
from textgym.rewards.reference import own_copy
from textgym.settings import Count, NotNegative, Positive, check_settings

from ..machine.circumstances import machine, warn_of_differences
from ..machine.distributed import (
    Learner,
    add_up_gradients,
    count,
    device,
    everyone,
    explained,
    full,
    gathered,
    join,
    load_optimizer,
    own_seed,
    rank,
    same_weights,
    total,
)
from ..machine.out_of_memory import memory_explained
from .optimizer import adamw
from .rollout import Rollout, collect, merge
from .saving import load_policy, place_of, save_policy

TENSORS, FROZEN = "tensors.safetensors", "frozen"
Metrics = dict[str, float]
Callback = Callable[["OnPolicyAgent", Metrics], bool | None]
"""Called after every update with its metrics; returns `False` to stop."""


@dataclasses.dataclass
class OnPolicyConfig:
    """What every on-policy algorithm can be told."""

    episodes_per_update: Count = 128
    """Episodes collected before each update, by all processes; a multiple of the rows of their environments."""
    learning_rate: NotNegative = 1e-4
    """Peak learning rate of AdamW."""
    anneal_learning_rate: bool = True
    """Whether the learning rate falls linearly to zero over `total_episodes`."""
    adam_epsilon: NotNegative = 1e-5
    """Adam's epsilon; a small one makes the first updates large."""
    adam_8bit: bool = False
    """Keep Adam's two moments in 8 bits each instead of 32; needs bitsandbytes."""
    max_grad_norm: Positive = 1.0
    """The gradient of a minibatch is scaled down to this norm."""
    seed: int = 0
    """Seeds prompts, sampling and minibatches."""
    bf16: bool = False
    """Run the forward passes of the update in bfloat16 (autocast); log-softmax and losses stay in float32. bfloat16
    keeps 8 bits, so a logit between 8 and 16 is rounded by up to 0.03, and every layer adds its own rounding. On the
    embedded model a log-prob moves by 0.01 to 0.02 nats on average. On any processor expect less than 0.03 on average,
    less than 0.15 for 99% of the tokens and less than 0.5 for each; larger logits move in proportion. Ratios before the
    first step are as far from 1, with a mean of 1.00, and few are outside a clip range of 0.2. The gradient moves by
    less than 5% of its norm (`python benchmarks/bf16.py`)."""
    gradient_checkpointing: bool = False
    """Keep what goes into each layer alone and run it again in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        check_settings(self)


class OnPolicyAgent(ABC):
    """Trains a policy in a `TextVectorEnv` by repeating: collect episodes, pay the KL, update.

    The agent takes the environment over: rows that ended wait for the others, and arrays stay on the device.

    Args:
        policy: who writes and learns.
        envs: a `TextVectorEnv`, from `gym.make_vec(..., kl_mode="deferred")`; wrappers are stepped through.
        config: see the algorithm's config.

    Raises:
        ValueError: the environment pays the KL itself, so that it would be paid twice.
    """

    config_class: ClassVar[type[OnPolicyConfig]]

    def __init__(self, policy: ActorCritic, envs: Any, config: Any = None) -> None:
        self.policy, self.envs = policy, envs
        self.config = config if config is not None else self.config_class()
        task = envs.unwrapped.task
        if task.kl_mode != "deferred":
            raise ValueError(
                f"{type(self).__name__} pays the KL itself, and so does the environment (kl_mode={task.kl_mode!r}): "
                "make it with kl_mode='deferred'"
            )
        if task.action_mask is not None:
            raise ValueError(
                f"{type(self).__name__} does not know the environment's action_mask and would score its actions "
                "without it: make the environment without, or use textgym.sb3 with sb3-contrib's MaskablePPO"
            )
        join()
        if self.config.episodes_per_update % (envs.num_envs * count()):
            processes = f" times {count()} processes" if count() > 1 else ""
            raise ValueError(
                f"episodes_per_update={self.config.episodes_per_update} must be a multiple of "
                f"num_envs={envs.num_envs}{processes}"
            )
        same_weights(policy)
        if self.config.gradient_checkpointing:
            policy.checkpoint_layers()
        self.learner = Learner(policy)
        if self.learner.sharded and self.config.adam_8bit:
            raise ValueError("bitsandbytes cannot shard its moments: leave adam_8bit=False under FSDP2")
        envs.unwrapped.set_autoreset_mode(AutoresetMode.DISABLED)
        envs.unwrapped.array = "torch"
        # Where the environment names no reference, the policy's own start is one.
        self.penalty: KLPenalty = task.penalty or KLPenalty(
            policy.reference(), task.kl_coef, task.kl_estimator, task.kl_clamp
        )
        check_one_device(policy=policy.device, environment=task.device, reference=self.penalty.reference.device)
        self.penalty.reference.temperature = policy.temperature
        self.optimizer = adamw(
            self.learner.parameters(), self.config.learning_rate, self.config.adam_epsilon, self.config.adam_8bit
        )
        self.shuffler = torch.Generator().manual_seed(own_seed(self.config.seed))
        self.episodes = 0
        self.updates = 0
        self.total_episodes = 0
        policy.seed(own_seed(self.config.seed))
        envs.reset(seed=self.config.seed)  # one order of prompts, which the processes share

    @abstractmethod
    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """One update of the policy from a rollout whose tokens diverge from the reference by `kl` `(N, T)` nats."""

    def learn(self, total_episodes: int, callbacks: Sequence[Callback] = ()) -> Self:
        """Trains until `total_episodes` have been collected since the agent was made; returns the agent.

        After `load` the same total continues the run where it stopped. A callback that returns `False` ends it early.

        Raises:
            MemoryError: a GPU was out of memory; it says what took it, and what to lower.
        """
        self.total_episodes = total_episodes
        with explained(), memory_explained(self):
            while self.episodes < total_episodes:
                metrics = self._iterate()
                stop = False in [callback(self, metrics) for callback in callbacks]
                if any(everyone(stop)):
                    break
        return self

    def _iterate(self) -> Metrics:
        """One rollout and one update."""
        started = time.perf_counter()
        self._tell_rewards()
        rollout = self._play()
        collected = time.perf_counter()
        with phase("reference"):
            kl = self.measure_kl(rollout)
        self._anneal()
        metrics = self._describe(rollout, kl)
        with phase("update"):
            metrics |= self.update(rollout, kl)
        self.penalty.controller.update(metrics["objective/kl"], self.config.episodes_per_update)
        self.episodes += self.config.episodes_per_update
        self.updates += 1
        return {
            **metrics,
            "episodes": self.episodes,
            "lr": self.optimizer.param_groups[0]["lr"],
            "time/rollout_s": collected - started,
            "time/update_s": time.perf_counter() - collected,
        }

    def _play(self) -> Rollout:
        """This process's episodes of an update, after which all processes scale scores by what all have seen."""
        scale = self.envs.unwrapped.task.scorer.scale
        before = torch.tensor(scale.moments(), dtype=torch.float64, device=device())
        rounds = self.config.episodes_per_update // (self.envs.num_envs * count())
        self.optimizer.zero_grad(set_to_none=True)  # memory that a rollout can use
        rollout = merge([self.collect() for _ in range(rounds)])
        if count() > 1 and scale.scaling is not None:
            scale.take_moments(*(before + total(before.new_tensor(scale.moments()) - before)).tolist())
        return rollout

    def collect(self) -> Rollout:
        """One episode in every row."""
        return collect(self.envs, self.policy, self.episode_options())

    def episode_options(self) -> dict[str, Any]:
        """What the environment is reset with before a rollout."""
        return {"prompt_index": self.draw_prompts(self.envs.num_envs)}

    def draw_prompts(self, number: int) -> np.ndarray:
        """So many of the next prompts `(number,)`; all processes draw in step, each for itself and the others."""
        envs = self.envs.unwrapped
        return envs.task.draw(number * count(), envs.np_random)[rank() * number :][:number]

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """The KL estimate of every token to the reference, `(N, T)` nats."""
        return self.penalty.of_sequences(self.policy, rollout.sequences, rollout.log_probs)

    def predict(self, observation: Observation, deterministic: bool = True) -> Tensor:
        """The policy's action, `(B,)` or `()`."""
        return self.policy.predict(observation, deterministic)

    def step(self, loss: Tensor) -> Tensor:
        """One optimiser step on a loss; returns the gradient's norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return self.apply_gradients()

    def apply_gradients(self) -> Tensor:
        """One optimiser step with the gradient's norm clipped; returns the norm before clipping, on the device."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        add_up_gradients(weights)
        norm = torch.nn.utils.clip_grad_norm_(weights, self.config.max_grad_norm)
        self.optimizer.step()
        whole: Tensor = full(norm)
        return whole

    def _anneal(self) -> None:
        left = 1 - self.episodes / self.total_episodes if self.config.anneal_learning_rate else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * left

    def _describe(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Figures of the episodes of all processes; sums over tokens are averaged over sequences."""
        columns = gathered(
            {
                "kl": kl.sum(1),
                "raw_scores": rollout.raw_scores,
                "scores": rollout.scores,
                "log_probs": rollout.log_probs.sum(1),
                "cost": self.penalty.cost(kl).sum(1),
                "tokens": rollout.sequences.response_lengths.float(),
                "ended_by_stop": rollout.ended_by_stop.float(),
                **rollout.components,
            }
        )
        metrics: dict[str, Any] = {
            "objective/kl": columns["kl"].mean(),
            "objective/scores": columns["raw_scores"].mean(),
            "objective/scores_std": columns["raw_scores"].std(correction=0),
            "objective/entropy": -columns["log_probs"].mean(),
            "objective/non_score_reward": -columns["cost"].mean(),
            "objective/rlhf_reward": (columns["scores"] - columns["cost"]).mean(),
            "objective/kl_coef": self.penalty.coef,
            "val/response_tokens": columns["tokens"].mean(),
            "val/ended_by_stop": columns["ended_by_stop"].mean(),
        }
        for key in [key for key in columns if "/" in key]:
            kind, name = key.split("/", 1)
            given = columns[key][~columns[key].isnan()]
            if len(given) and kind == "metric":
                metrics[name] = given.mean()
            elif len(given):  # a function may leave every row out
                metrics |= {f"rewards/{name}/mean": given.mean(), f"rewards/{name}/std": given.std(correction=0)}
        scorer = self.envs.unwrapped.task.scorer
        if scorer.scale.active:
            metrics["objective/scores_paid"] = columns["scores"].mean()
        if scorer.on_error != "raise":
            failed = everyone(scorer.errors)
            metrics |= {f"rewards/{name}/errors": sum(errors[name] for errors in failed) for name in scorer.errors}
        return {key: float(value) for key, value in metrics.items()}

    def _tell_rewards(self) -> None:
        """Reward functions that ask for `trainer_state`, for a curriculum, see how far training is."""
        rounds = math.ceil(self.total_episodes / self.config.episodes_per_update)
        self.envs.unwrapped.task.scorer.trainer_state = TrainerState(global_step=self.updates, max_steps=rounds)

    @property
    def _sampler(self) -> torch.Generator:
        assert self.policy.generator is not None  # seeded in __init__
        return self.policy.generator

    def training_state(self) -> dict[str, Any]:
        """What an algorithm has to remember besides, as plain values; most have nothing."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `training_state` gave."""
        assert not state, "an algorithm that saves something loads it"

    def training_tensors(self) -> dict[str, Tensor]:
        """The same for tensors."""
        return {}

    def load_training_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what `training_tensors` gave."""
        assert not tensors, "an algorithm that saves something loads it"

    def frozen_models(self) -> dict[str, TokenModel]:
        """Models that are saved with the agent because they are nowhere else to be found."""
        task = self.envs.unwrapped.task
        known = task.penalty is not None and not self.penalty.owns_reference
        return {} if known else {"reference": own_copy(self.penalty.reference)}

    def take_frozen_model(self, name: str, model: TokenModel) -> None:
        """Goes on with a model that was saved."""
        assert name == "reference", f"nobody saved a model called {name!r}"
        self.penalty.reference, self.penalty.owns_reference = model, True

    # --- saving: weights in safetensors, the rest in one file that loads with weights_only ---

    def save(self, folder: str | Path) -> None:
        """Writes all that `load` needs to go on: `policy/`, a transformers folder, and the training state.

        All processes of a run call it; the first one writes for all of them.
        """
        state = {
            "optimizer": full(self.optimizer.state_dict()),
            "generators": everyone(
                {
                    "sampler": generator_state(self._sampler),
                    "shuffler": generator_state(self.shuffler),
                    "global": global_generators(),  # reward functions may draw from them
                }
            ),
        }
        scorers = everyone(self.envs.unwrapped.task.scorer.state())
        if rank() == 0:
            self._write(Path(folder), state, scorers)
        everyone(None)  # nobody goes on before all of it is there

    def _write(self, folder: Path, state: dict[str, Any], scorers: list[dict[str, Any]]) -> None:
        task, envs = self.envs.unwrapped.task, self.envs.unwrapped
        meta = {
            "config": dataclasses.asdict(self.config),
            "progress": [self.episodes, self.updates, self.total_episodes],
            "controller": vars(self.penalty.controller),
            "scorers": scorers,
            "agent": self.training_state(),
            "prompt_queue": task.queue,
            "np_random": envs.np_random.bit_generator.state,
            "env": envs.spec.to_json() if envs.spec is not None and _is_plain(envs.spec.kwargs) else None,
            "num_envs": envs.num_envs,
            "machine": machine(self.policy),
        }
        with atomic_folder(folder) as temporary:
            meta["policy"] = save_policy(self.policy, temporary, task.tokenizer)
            torch.save(state, temporary / "state.pt")
            if tensors := self.training_tensors():
                save_file({name: x.detach().clone() for name, x in tensors.items()}, temporary / TENSORS)
            for name, model in self.frozen_models().items():
                model.lm.save_pretrained(temporary / FROZEN / name)
            (temporary / "agent.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: str | Path, envs: Any = None, device: Device = None) -> Self:
        """Load an agent as it was saved, ready to `learn` on; the global random generators go on from then, too.

        On another kind of device than the one that saved it, the run goes on with other random numbers, and says so.

        Args:
            folder: what `save` wrote.
            envs: the environment to go on in; not needed if `gym.make_vec` made the agent's from plain values.
            device: where to go on, such as `"cuda"` or `"auto"`. `None` is where `envs` are; without them, where the
                agent was saved, if this machine has such a device.

        Raises:
            ValueError: the environment cannot be made again from what was saved; pass it as `envs`. Or the run had
                another number of processes. Or `device` is not on this machine.
        """
        join()
        folder = Path(folder)
        meta = json.loads((folder / "agent.json").read_text())
        place = place_of(folder, meta["policy"], device, envs)
        # Tensors of a device that is not here could not be read; loading the optimizer moves its own.
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        if (saved := len(state["generators"])) != count():
            raise ValueError(
                f"{folder} was saved by {saved} processes, and this run has {count()}: launch {saved}, or start "
                f"anew from the policy in {folder / 'policy'}"
            )
        if envs is None:
            if meta["env"] is None:
                raise ValueError(
                    f"{folder} was trained in an environment made of objects: pass it, load(folder, envs=envs)"
                )
            envs = _made_again(meta, place)
        policy = load_policy(folder, {**meta["policy"], "device": place})
        agent = cls(policy, envs, cls.config_class(**meta["config"]))
        load_optimizer(agent.optimizer, state["optimizer"])
        generators = state["generators"][rank()]
        restore_generator(agent._sampler, generators["sampler"])
        restore_generator(agent.shuffler, generators["shuffler"])
        agent.episodes, agent.updates, agent.total_episodes = meta["progress"]
        for name, value in meta["controller"].items():
            setattr(agent.penalty.controller, name, value)
        for part in sorted((folder / FROZEN).glob("*")):
            model = TokenModel.load(str(part), temperature=policy.temperature, device=policy.device)
            agent.take_frozen_model(part.name, model)
        envs.unwrapped.task.scorer.load_state(meta["scorers"][rank()])
        agent.load_training_state(meta["agent"])
        if (folder / TENSORS).exists():
            agent.load_training_tensors(load_file(folder / TENSORS, device=str(policy.device)))
        envs.unwrapped.task.queue = meta["prompt_queue"]
        envs.unwrapped.np_random.bit_generator.state = meta["np_random"]
        restore_global_generators(generators["global"])
        warn_of_differences(folder, meta["machine"], policy)
        return agent


def _made_again(meta: dict[str, Any], place: torch.device) -> Any:
    """The environment that an agent was saved with, on another device if need be."""
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
