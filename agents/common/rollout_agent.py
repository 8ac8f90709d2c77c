"""RolloutAgent: the learn loop of all agents that learn from rollouts: collect, measure the KL, update, report.

The loop calls the algorithm: each has its own `update`, on a page of its own in agents/. Algorithms that learn from the
newest rollout alone are in policy_gradient.py, those with a replay memory in replay_agent.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerState

from textgym.envs.interface import rollout_env
from textgym.models.actor_critic import PolicyLike, as_policy
from textgym.models.machine.devices import Device, check_one_device
from textgym.models.machine.finite import check_finite
from textgym.models.machine.profiled_phases import phase
from textgym.models.token_model import Observation, TokenModel
from textgym.settings import Count, NotNegative, Positive, WholeNumber, check_arguments, check_settings

from ..machine.circumstances import inputs
from ..machine.distributed import (
    Learner,
    add_up_gradients,
    count,
    device,
    everyone,
    explained,
    full,
    join,
    own_seed,
    rank,
    same_weights,
    total,
)
from ..machine.out_of_memory import memory_explained
from .metrics import episode_metrics
from .optimizer import adamw
from .rollout import Rollout, collect, merge
from .saving import load_agent, save_agent

Metrics = dict[str, float]
Callback = Callable[["RolloutAgent", Metrics], bool | None]
"""Called after every update with its metrics; returns `False` to stop."""


@dataclasses.dataclass
class RolloutAgentConfig:
    """Hyperparameters of all agents that learn from rollouts."""

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


class RolloutAgent(ABC):
    """Trains a policy in a `TextVectorEnv` by repeating: collect episodes, pay the KL, update.

    The environment stays as its owner made it: only during a rollout do rows that ended wait for the others, do arrays
    stay on the device, and does the agent charge the KL. Reset it before you step it by hand.

    Args:
        policy: what generates and learns; a language model or its name becomes an `ActorCritic` with a shared trunk.
        envs: a `TextVectorEnv`, from `gym.make_vec`; wrappers are stepped through.
        config: see the algorithm's config.

    Raises:
        ConfigError: `envs` is no batch of texts; a `ValueError`.
        ValueError: the environment was told to pay the KL itself, so that it would be paid twice.
    """

    config_class: ClassVar[type[RolloutAgentConfig]]
    reference_may_move: ClassVar[bool] = True
    """Whether the reference may change between updates, see `textgym.rewards.reference.SyncReference`."""

    def __init__(self, policy: PolicyLike, envs: Any, config: Any = None) -> None:
        policy = as_policy(policy)
        self.policy, self._envs = policy, envs
        self.config = config if config is not None else self.config_class()
        self.base_env = rollout_env(envs)
        if self.base_env.action_mask is not None:
            raise ValueError(
                f"{type(self).__name__} does not know the environment's action_mask and would score its actions "
                "without it: make the environment without, or use textgym.sb3 with sb3-contrib's MaskablePPO"
            )
        self.base_env.fit(policy)
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
        self.penalty = self.base_env.agent_penalty(policy.reference, type(self).__name__)
        reference = self.penalty.reference
        check_one_device(policy=policy.device, environment=self.base_env.device, reference=reference.device)
        reference.temperature = policy.temperature
        self.optimizer = adamw(
            self.learner.parameters(), self.config.learning_rate, self.config.adam_epsilon, self.config.adam_8bit
        )
        self.shuffler = torch.Generator().manual_seed(own_seed(self.config.seed))
        self.episodes = 0
        self.updates = 0
        self.total_episodes = 0
        policy.seed(own_seed(self.config.seed))
        with self.base_env.whole_episodes(wrapped=envs is not self.base_env):
            envs.reset(seed=self.config.seed)  # one order of prompts, which the processes share

    @property
    def envs(self) -> Any:
        """The environment that the agent was made with.

        Raises:
            AttributeError: another one is assigned, which the agent has neither checked nor seeded.
        """
        return self._envs

    @envs.setter
    def envs(self, envs: Any) -> None:
        raise AttributeError(
            f"a {type(self).__name__} keeps the environment that it was made with: to go on in another, save the agent "
            f"and use {type(self).__name__}.load(folder, envs=...)"
        )

    @abstractmethod
    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update from a rollout, and the KL `(N, T)` of its tokens to the reference, in nats."""

    @check_arguments
    def learn(self, total_episodes: WholeNumber, callbacks: Sequence[Callback] = ()) -> Self:
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
        """Make one iteration: one rollout and one update."""
        # 1. Collect whole episodes with the current policy.
        started = time.perf_counter()
        self._tell_rewards()
        rollout = self._play()
        collected = time.perf_counter()

        # 2. Measure how far every token is from the reference.
        with phase("reference"):
            kl = self.measure_kl(rollout)
        metrics = episode_metrics(rollout, kl, self.penalty, self.base_env.scorer)

        # 3. Update the policy, on the algorithm's own page.
        self._anneal()
        with phase("update"):
            metrics |= self.update(rollout, kl)

        # 4. Move the KL's coefficient, and count.
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
        """Collect this process's episodes of an update."""
        scale = self.base_env.scorer.scale
        before = torch.tensor(scale.moments(), dtype=torch.float64, device=device())
        rounds = self.config.episodes_per_update // (self.envs.num_envs * count())
        self.optimizer.zero_grad(set_to_none=True)  # memory that a rollout can use
        rollout = merge([self.collect() for _ in range(rounds)])
        if count() > 1 and scale.scaling is not None:  # all processes scale scores by what all have seen
            scale.take_moments(*(before + total(before.new_tensor(scale.moments()) - before)).tolist())
        return rollout

    def collect(self) -> Rollout:
        """Collect one episode in every row."""
        return collect(self.envs, self.policy, self.episode_options())

    def episode_options(self) -> dict[str, Any]:
        """Return what the environment is reset with before a rollout."""
        return {"prompt_index": self.next_prompts(self.envs.num_envs)}

    def next_prompts(self, number: int) -> np.ndarray:
        """Return the next prompts `(number,)`; all processes draw in step, each for itself and the others."""
        return self.base_env.next_prompts(number * count())[rank() * number :][:number]

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL estimate of every token to the reference, `(N, T)` nats."""
        return self.penalty.of_sequences(self.policy, rollout.sequences, rollout.log_probs)

    def predict(self, observation: Observation, deterministic: bool = True) -> Tensor:
        """Return the policy's action, `(B,)` or `()`."""
        return self.policy.predict(observation, deterministic)

    def apply_gradients(self) -> Tensor:
        """Make one optimiser step with the gradient's norm clipped; returns the norm before clipping, on the device.

        Raises:
            NonFiniteError: the norm is NaN or infinite; the weights stay as they were.
        """
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        add_up_gradients(weights)
        norm: Tensor = full(torch.nn.utils.clip_grad_norm_(weights, self.config.max_grad_norm))
        check_finite("gradient norm", norm, f"update {self.updates + 1}")
        self.optimizer.step()
        return norm

    def _anneal(self) -> None:
        left = 1 - self.episodes / self.total_episodes if self.config.anneal_learning_rate else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * left

    def _tell_rewards(self) -> None:
        """Tell reward functions that ask for `trainer_state`, for a curriculum, how far training is."""
        rounds = math.ceil(self.total_episodes / self.config.episodes_per_update)
        self.base_env.scorer.trainer_state = TrainerState(global_step=self.updates, max_steps=rounds)

    @property
    def sampler(self) -> torch.Generator:
        """The generator that the policy samples with."""
        assert self.policy.generator is not None  # seeded in __init__
        return self.policy.generator

    def training_state(self) -> dict[str, Any]:
        """Return what an algorithm has to save besides, as plain values; most have nothing."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from what `training_state` gave."""
        assert not state, "an algorithm that saves something loads it"

    def training_tensors(self) -> dict[str, Tensor]:
        """Return the same for tensors."""
        return {}

    def load_training_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `training_tensors` gave."""
        assert not tensors, "an algorithm that saves something loads it"

    def frozen_models(self) -> dict[str, TokenModel]:
        """Return the models that are saved with the agent because they are nowhere else to be found."""
        known = self.base_env.reference is not None and not self.penalty.owns_reference
        return {} if known else {"reference": self.penalty.reference}

    def take_frozen_model(self, name: str, model: TokenModel) -> None:
        """Go on with a model that was saved."""
        assert name == "reference", f"nobody saved a model called {name!r}"
        self.penalty.reference, self.penalty.owns_reference = model, True

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        """Return what the run learns from, by hash: a run that goes on with something else says so."""
        return inputs(self.base_env.prompts, self.base_env.scorer, self.base_env.reference)

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write all that `load` needs to go on: `policy/`, a transformers folder, and the training state.

        All processes of a run call it; the first one writes for all of them.

        Args:
            folder: where to write; it is empty or not there.
            overwrite: whether to replace an agent that was saved there before.

        Raises:
            FileExistsError: the folder has files.
            OSError: the disk is full or the folder not writable.
        """
        save_agent(self, Path(folder), overwrite)

    @classmethod
    def load(cls, folder: str | Path, envs: Any = None, device: Device = None, *, reward: Any = None) -> Self:
        """Load an agent as it was saved, ready to `learn` on; the global random generators go on from then, too.

        On another kind of device than the one that saved it, the run goes on with other random numbers, and says so.

        Args:
            folder: what `save` wrote.
            envs: the environment to go on in; not needed if `gym.make_vec` made the agent's from plain values.
            device: where to go on, such as `"cuda"` or `"auto"`. `None` is where `envs` are; without them, where the
                agent was saved, if this machine has such a device.
            reward: reward functions of the environment that is made again. Of functions that the folder names,
                textgym's own alone are called: a folder is data, and loading it runs no code that it names.

        Raises:
            DamagedFolderError: a file is missing or not as it was written, or another class was saved.
            UntrustedNameError: the folder names an environment or a function that is not textgym's.
            ValueError: the environment cannot be made again from what was saved; pass it as `envs`. Or the run had
                another number of processes. Or `device` is not on this machine.
        """
        agent: Self = load_agent(cls, Path(folder), envs, device, reward)
        return agent
