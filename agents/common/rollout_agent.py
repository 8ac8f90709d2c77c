"""RolloutAgent: the learn loop of all agents that learn from rollouts: collect, measure the KL, update, report.

The loop calls `update` of the algorithm, which has its own file in agents/. On-policy algorithms derive from
policy_gradient.py, and algorithms with a replay buffer from replay_agent.py.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerState

from textgym.data.faults import level_of_caller
from textgym.envs.interface import rollout_env
from textgym.errors import ConfigError, NonFiniteError
from textgym.models.actor_critic import ActorCritic, PolicyLike, as_policy
from textgym.models.machine.devices import Device, check_one_device
from textgym.models.machine.finite import FiniteSteps
from textgym.models.machine.profiled_phases import phase
from textgym.models.token_model import Observation, TokenModel
from textgym.rewards.kl import AdaptiveKL
from textgym.settings import WholeNumber, check_arguments

from ..callbacks import CallbackLike, CallbackList, watched
from ..callbacks import Metrics as Metrics
from ..configs.policy_gradient import suitable_critic
from ..configs.rollout import RolloutAgentConfig
from ..machine.circumstances import inputs, settings_of
from ..machine.distributed import (
    Learner,
    broadcast_weights,
    count,
    device,
    everyone,
    explain_lost_processes,
    gather_shards,
    join,
    process_seed,
    rank,
    shares_of,
    sum_gradients,
    sum_over_processes,
)
from ..machine.named_envs import make_named
from ..machine.out_of_memory import memory_explained
from .metrics import episode_metrics
from .optimizer import PartSettings, make_optimizer
from .rollout import Rollout, collect, merge
from .saving import load_agent, save_agent


class RolloutAgent(ABC):
    """Base class of agents that train a policy in a `TextVectorEnv`: collect episodes, measure the KL, update, repeat.

    The agent does not change the environment's settings: only during a rollout rows that have ended wait for the
    others, arrays stay on the device, and the agent applies the KL penalty. Reset the environment before you step it
    yourself.

    Args:
        policy: The policy; a language model or its name becomes an `ActorCritic` with a shared trunk.
        envs: A `TextVectorEnv` from `gym.make_vec`, perhaps with wrappers; or the id of one, which is then made as
            `textgym train` makes it, with up to 64 rows and some prompts kept from training. If the policy is a name
            too, agents that learn values get a separate critic.
        config: Config of the algorithm.

    Raises:
        ConfigError: If `envs` is not a batch of texts, or the processes cannot share `episodes_per_update`; a
            `ValueError`.
        ValueError: If the environment also applies the KL penalty.
    """

    config_class: ClassVar[type[RolloutAgentConfig]]
    reference_may_move: ClassVar[bool] = True
    """Whether the reference may change between updates, see `textgym.rewards.reference.SyncReference`."""
    episodes_per_prompt: int = 1
    """Number of episodes of each prompt in an update."""

    def __init__(self, policy: PolicyLike, envs: Any, config: Any = None) -> None:
        model = str(policy) if isinstance(policy, str | os.PathLike) else None
        config = config if config is not None else self.config_class()
        if model is not None and isinstance(envs, str):
            critic, config = suitable_critic(config)
            policy = ActorCritic.from_pretrained(model, critic)
        policy = as_policy(policy)
        self._refuse_rules(policy)
        self.config = config
        self.named = make_named(envs, policy, model, config) if isinstance(envs, str) else None
        self.start: str | None = model  # name of the model that it began from; `None` for what the policy says
        envs = envs if self.named is None else self.named.envs
        self.policy, self._envs = policy, envs
        self.base_env = rollout_env(envs)
        if self.base_env.action_mask is not None:
            raise ValueError(
                f"{type(self).__name__} does not know the environment's action_mask and would score its actions "
                "without it: make the environment without, or use textgym.sb3 with sb3-contrib's MaskablePPO"
            )
        self.base_env.fit(policy)
        join()
        self._check_size()
        broadcast_weights(policy)
        if self.config.gradient_checkpointing:
            policy.checkpoint_layers()
        self.learner = Learner(policy)
        if self.learner.sharded and self.config.adam_8bit:
            raise ValueError("bitsandbytes cannot shard its moments: leave adam_8bit=False under FSDP2")
        self.penalty = self.base_env.agent_penalty(policy.reference, type(self).__name__)
        reference = self.penalty.reference
        check_one_device(policy=policy.device, environment=self.base_env.device, reference=reference.device)
        reference.temperature = policy.temperature
        parts = self.parts()
        self.optimizer = make_optimizer(parts, {part: self.part_settings(part) for part in parts}, self.config)
        self.finite_steps = FiniteSteps(self.config.on_nonfinite)
        self.shuffler = torch.Generator()
        # Now, since reward functions may change what they hold: hashes, to warn if a run is resumed with other inputs.
        self.inputs = {
            **inputs(self.base_env.prompts, self.base_env.scorer, self.base_env.reference),
            **settings_of(self.base_env, self.penalty),
        }
        self.callbacks = CallbackList(None)  # those of `learn`, while it runs
        self.round = np.zeros(0, dtype=np.int64)  # prompts (indices) of the round of episodes that is collected next
        self.episodes = 0
        self.updates = 0
        self.total_episodes = 0
        self.update_size = self.config.episodes_per_update  # episodes of this update or the last, over all processes
        self.seed_process(self.config.seed)
        with self.base_env.whole_episodes(wrapped=envs is not self.base_env):
            envs.reset(seed=self.config.seed)  # the same seed in all processes, so that they share one order of prompts

    @property
    def envs(self) -> Any:
        """The environment that the agent was made with.

        Raises:
            AttributeError: If another one is assigned, because the agent has neither checked nor seeded it.
        """
        return self._envs

    @envs.setter
    def envs(self, envs: Any) -> None:
        raise AttributeError(
            f"a {type(self).__name__} keeps the environment that it was made with: to continue in another, save the "
            f"agent and use {type(self).__name__}.load(folder, envs=...)"
        )

    @abstractmethod
    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update from a rollout, and the KL `(N, T)` of its tokens to the reference, in nats."""

    @check_arguments
    def learn(
        self,
        total_episodes: WholeNumber,
        callback: CallbackLike = None,
        *,
        progress: bool = False,
        folder: str | Path | None = None,
        log_with: str | Sequence[str] = (),
    ) -> Self:
        """Train until `total_episodes` have been collected since the agent was made, and return the agent.

        After `load` the same total continues the run where it stopped.

        Args:
            total_episodes: Total number of episodes. If `episodes_per_update` does not divide it, the last update is
                smaller: it has the rest, in whole groups of a prompt's episodes and at least one in each process.
            callback: A `textgym.agents.callbacks.Callback`, a function of the agent and the metrics of an update, or a
                list of these. One that returns `False` after an update ends the training early.
            progress: Whether to show what the run does, its progress, and how good the policy is on held-out prompts,
                as `textgym train` does.
            folder: Run folder with settings, metrics, checkpoints, records of tokens and samples, as `textgym train`
                writes it. An agent that was loaded from one of its checkpoints continues the run there.
            log_with: Names of trackers that are to get metrics, samples and settings too, such as `"wandb"`; see
                `textgym.agents.watching.trackers`.

        Raises:
            MemoryError: If a GPU is out of memory; the message says what used it, and which settings to lower.
        """
        self.total_episodes = total_episodes
        if isinstance(self.penalty.controller, AdaptiveKL):
            self.penalty.controller.run = max(total_episodes, 1)
        with (
            explain_lost_processes(),
            memory_explained(self),
            watched(self, callback, progress, folder, log_with) as self.callbacks,
        ):
            self.callbacks.on_training_start(self)
            while self.episodes < total_episodes:
                metrics = self._iterate()
                goes_on = self.callbacks.on_update_end(self, metrics)
                if not all(everyone(goes_on)):
                    break
            self.callbacks.on_training_end(self)
        return self

    def _iterate(self) -> Metrics:
        """Run one iteration: one rollout and one update."""
        # 1. Collect whole episodes with the current policy.
        self._refuse_rules(self.policy)  # a caller may have set some to evaluate it
        started = time.perf_counter()
        self.update_size = self.size_of_update(self.total_episodes - self.episodes)
        self._tell_rewards()
        self.optimizer.zero_grad(set_to_none=True)  # frees memory for the rollout
        with self._shared_scale():
            rollout = self.play()
        collected = time.perf_counter()

        # 2. Measure the KL of every token to the reference.
        with phase("reference"):
            kl = self.measure_kl(rollout)
        metrics = self.rollout_metrics(rollout, kl)
        self._check_kl(metrics["objective/kl"])
        self.callbacks.on_rollout_end(self, rollout, kl)

        # 3. Update the policy, in the file of the algorithm.
        self._schedule()
        with phase("update"):
            metrics |= self.update(rollout, kl)
        if self.config.on_nonfinite == "skip":  # figures of an update whose steps were all skipped are NaN
            metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
            metrics["val/skipped_steps"] = self.finite_steps.skipped

        # 4. Update the coefficient of the KL penalty, and the counters.
        self.adapt_kl(metrics["objective/kl"])
        self.episodes += self.update_size
        self.updates += 1
        return {
            **metrics,
            "episodes": self.episodes,
            "lr": self.optimizer.param_groups[0]["lr"],
            "time/rollout_s": collected - started,
            "time/update_s": time.perf_counter() - collected,
        }

    @contextmanager
    def _shared_scale(self) -> Iterator[None]:
        """Return a context after which all processes scale scores by the moments of the scores of all of them."""
        scale = self.base_env.scorer.scale
        before = torch.tensor(scale.moments(), dtype=torch.float64, device=device())
        yield
        if count() > 1 and scale.scaling is not None:
            scale.take_moments(*(before + sum_over_processes(before.new_tensor(scale.moments()) - before)).tolist())

    def play(self) -> Rollout:
        """Collect this process's episodes of an update."""
        prompts = self.next_prompts(shares_of(self.update_size // self.episodes_per_prompt))
        return self.episodes_of(prompts)

    def size_of_update(self, left: int) -> int:
        """Return the number of episodes of an update, over all processes, if a run has `left` more to collect."""
        each = self.episodes_per_prompt
        groups = max(math.ceil(left / each), count())  # whole groups, at least one in each process
        return min(groups * each, self.config.episodes_per_update)

    def updates_left(self, total_episodes: int) -> int:
        """Return how many more updates there are until so many episodes have been collected."""
        return math.ceil(max(total_episodes - self.episodes, 0) / self.config.episodes_per_update)

    def next_prompts(self, shares: Sequence[int]) -> np.ndarray:
        """Return the next prompts (indices): all processes take the same prompts in order, and each uses its part.

        Args:
            shares: Number of prompts of each process, by rank.
        """
        start = sum(shares[: rank()])
        return self.base_env.next_prompts(sum(shares))[start:][: shares[rank()]]

    def episodes_of(self, prompts: np.ndarray) -> Rollout:
        """Collect `episodes_per_prompt` episodes of each of these prompts (indices), in order."""
        repeated = prompts.repeat(self.episodes_per_prompt)
        rollouts = []
        for start in range(0, len(repeated), self.rows_of_round):
            self.round = repeated[start : start + self.rows_of_round]
            rollouts.append(self.collect())
        return merge(rollouts)

    @property
    def rows_of_round(self) -> int:
        """Number of rows that a round uses: those of whole groups, if they fit, which one reward call then scores."""
        each, rows = self.episodes_per_prompt, self.envs.num_envs
        return rows // each * each or rows

    def collect(self) -> Rollout:
        """Collect one episode of each prompt of a round."""
        return collect(self.envs, self.policy, self.episode_options())

    def episode_options(self) -> dict[str, Any]:
        """Return the options of the environment's reset before a round of episodes."""
        return {"prompt_index": self.round}

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL estimate of every token to the reference, `(N, T)` nats."""
        return self.penalty.of_sequences(self.policy, rollout.sequences, rollout.log_probs)

    def rollout_metrics(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Return the metrics of a rollout, before the update."""
        return episode_metrics(rollout, kl, self.penalty, self.base_env.scorer)

    def adapt_kl(self, kl: float) -> None:
        """Update the coefficient of the KL penalty by the KL of a rollout, nats a response."""
        self.penalty.controller.update(kl, self.update_size)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the weights that the optimiser trains, by part; each part has its own settings and gradient norm."""
        return {"policy": list(self.learner.parameters())}

    def part_settings(self, part: str) -> PartSettings:
        """Return the settings of a part of the weights."""
        return PartSettings(self.config.learning_rate, self.config.weight_decay, self.config.max_grad_norm)

    def predict(self, observation: Observation, deterministic: bool = True) -> Tensor:
        """Return the policy's action, `(B,)` or `()`."""
        return self.policy.predict(observation, deterministic)

    def apply_gradients(self, loss: Tensor) -> Tensor:
        """Make one optimiser step; return the norm of the whole gradient before clipping, on the device.

        The norm of each part of the weights is clipped separately: a large value loss must not scale down the gradient
        of the policy.

        Args:
            loss: The loss that the gradients are of.

        Returns:
            The norm; NaN if the step was skipped, see `on_nonfinite`.

        Raises:
            NonFiniteError: If the loss or the norm is NaN or infinite; the weights are then unchanged.
        """
        groups = self.optimizer.param_groups
        sum_gradients([weight for group in groups for weight in group["params"]])
        norms: list[Tensor] = []
        for part in dict.fromkeys(group["part"] for group in groups):
            weights = [weight for group in groups if group["part"] == part for weight in group["params"]]
            limit = self.part_settings(part).max_grad_norm
            norms.append(gather_shards(torch.nn.utils.clip_grad_norm_(weights, limit)))
        norm = torch.stack(norms).norm()
        if not self.finite_steps.allow(f"update {self.updates + 1}", {"loss": loss, "gradient norm": norm}):
            return torch.full_like(norm, torch.nan)
        self.optimizer.step()
        return norm

    def _refuse_rules(self, policy: ActorCritic) -> None:
        if policy.rules:
            raise ConfigError(
                f"{type(self).__name__} computes log-probs without rules={policy.rules}, so they would not be those of "
                "the sampled tokens: train without rules and set policy.rules to evaluate, or use NLPO, whose mask is "
                "part of its log-probs"
            )

    def _check_kl(self, kl: float) -> None:
        """Check the mean KL of a rollout, which the rewards and the penalty's coefficient depend on.

        Raises:
            NonFiniteError: If it is NaN or infinite.
        """
        if not math.isfinite(kl):
            raise NonFiniteError(
                f"the KL to the reference of update {self.updates + 1} is {kl}, and the weights are as they were: look "
                "for tokens that the reference never allows and for NaN among the reference's weights; kl_clamp bounds "
                "the KL of a token"
            )

    def _check_size(self) -> None:
        """Check that whole groups of episodes make up an update, and that each process has at least one of them.

        Raises:
            ConfigError: If not; the message has the nearest number that does.
        """
        size, each = self.config.episodes_per_update, self.episodes_per_prompt
        fewest = each * count()
        if size % each == 0 and size >= fewest:
            self._warn_of_unused_rows()
            return
        below, above = size // each * each, -(-size // each) * each
        works = f"{below} or {above}" if below >= fewest else f"{max(above, fewest)}"
        groups = f"whole groups of group_size={each}" if each > 1 else "whole episodes"
        processes = f", at least one for each of {count()} processes" if count() > 1 else ""
        raise ConfigError(f"episodes_per_update={size} must consist of {groups}{processes}: the nearest is {works}")

    def _warn_of_unused_rows(self) -> None:
        """Warn if more than a quarter of the episodes that are generated for an update are not used."""
        rows, each = self.envs.num_envs, self.episodes_per_prompt
        share = each * shares_of(self.config.episodes_per_update // each)[rank()]
        rounds = math.ceil(share / self.rows_of_round)
        unused = rounds * rows - share
        enough = math.ceil(share / each / rounds) * each
        if 4 * unused > rounds * rows:
            warnings.warn(
                f"an update has {share} episodes{' of each process' if count() > 1 else ''}, and num_envs={rows} "
                f"generates {rounds * rows} and scores them all: with num_envs={enough} fewer are for nothing",
                stacklevel=level_of_caller(),
            )

    def _schedule(self) -> None:
        """Set the learning rates of the next update."""
        size = self.config.episodes_per_update  # a smaller update counts by its episodes
        factor = self.config.learning_rate_factor(self.episodes / size, self.total_episodes / size)
        for group in self.optimizer.param_groups:
            group["lr"] = self.part_settings(group["part"]).learning_rate * factor

    def _tell_rewards(self) -> None:
        """Set the progress that reward functions with an argument `trainer_state` get, for example for a curriculum."""
        total = self.updates + self.updates_left(self.total_episodes)
        self.base_env.scorer.trainer_state = TrainerState(global_step=self.updates, max_steps=total)

    @property
    def sampler(self) -> torch.Generator:
        """The generator that the policy samples with."""
        assert self.policy.generator is not None  # seeded in __init__
        return self.policy.generator

    def seed_process(self, seed: int) -> None:
        """Seed the generators: processes sample other tokens, and the same minibatches."""
        self.policy.seed(process_seed(seed))
        self.shuffler.manual_seed(seed)

    def training_state(self) -> dict[str, Any]:
        """Return further state of the algorithm for a checkpoint, as plain values; empty for most algorithms."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `training_state`."""
        assert not state, "an algorithm that saves something loads it"

    def training_tensors(self) -> dict[str, Tensor]:
        """Return further tensors of the algorithm for a checkpoint; empty for most algorithms."""
        return {}

    def load_training_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of `training_tensors`."""
        assert not tensors, "an algorithm that saves something loads it"

    def frozen_models(self) -> dict[str, TokenModel]:
        """Return the frozen models of a checkpoint: those that cannot be loaded from elsewhere."""
        known = self.base_env.reference is not None and not self.penalty.owns_reference
        return {} if known else {"reference": self.penalty.reference}

    def take_frozen_model(self, name: str, model: TokenModel) -> None:
        """Restore a model of `frozen_models`."""
        assert name == "reference", f"no agent saves a model named {name!r}"
        self.penalty.reference, self.penalty.owns_reference = model, True

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write everything that `load` needs to continue: `policy/`, a transformers folder, and the training state.

        All processes of a run must call it; rank 0 writes the files.

        Args:
            folder: Folder to write; it must be empty or not exist.
            overwrite: Whether to replace an agent that was saved in this folder.

        Raises:
            FileExistsError: If the folder has files.
            OSError: If the disk is full or the folder is not writable.
        """
        save_agent(self, Path(folder), overwrite)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        envs: Any = None,
        device: Device = None,
        *,
        reward: Any = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a saved agent, to continue with `learn`; the global random generators are restored too.

        On another type of device than the saved one, or with another number of processes, the run continues with other
        random numbers, and a warning says so.

        Args:
            folder: Folder that `save` wrote.
            envs: The environment; not needed if `gym.make_vec` made the agent's environment from plain values.
            device: Device, such as `"cuda"` or `"auto"`. `None` for the device of `envs`; without `envs`, for the
                device that the agent was saved on, if this machine has it.
            reward: Reward functions of the environment that is made again. Of the functions that the folder names only
                textgym's own are called: a folder is data, and loading it does not run code that it names.
            trust_remote_code: Whether to run code that comes with the model, as in transformers.

        Raises:
            DamagedFolderError: If a file is missing or was changed, or another class was saved.
            UntrustedNameError: If the folder names an environment or a function that is not textgym's.
            ValueError: If the environment cannot be made again (pass it as `envs`), or the device is not on this
                machine.
        """
        agent: Self = load_agent(cls, Path(folder), envs, device, reward, trust_remote_code)
        return agent
