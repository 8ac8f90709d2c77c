"""ReplayAgent: base class of algorithms with a replay buffer: exploration, the buffer, the optimiser step, targets.

The file of an algorithm has its update, `update` and `loss`, and calls these methods:

    remember         add a rollout to the replay buffer, with the reference's log-probs of its tokens
    samples          batches of replayed episodes, one for each optimiser step of an update
    step             one optimiser step on `loss`, in micro-batches whose gradients add up to that of the batch
    update_targets   move the target networks towards the trained ones, every `target_update_interval` steps

With several processes each collects its part of the episodes, and all have the same replay buffer, with the episodes of
all of them. They sample the same batches, each learns from its part of a batch, and the gradients are summed.

Exploration is epsilon-greedy, but random tokens are sampled from the reference and not uniformly, because uniform
tokens rarely make sense.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from textgym.models.actor_critic import ActorCritic, PolicyLike, Step
from textgym.models.machine.profiled_phases import phase
from textgym.models.machine.transfer import to_host
from textgym.models.sequences import Sequences
from textgym.models.token_model import Observation, TokenModel
from textgym.rewards.kl import FixedKL

from ..configs.replay import ReplayConfig
from ..machine.distributed import (
    broadcast_weights,
    count,
    everyone,
    pad_micro_batches,
    rank,
    sum_over_processes,
)
from .means import masked
from .metrics import TensorMetrics, mean_over, on_host
from .replay_buffer import ReplayBatch, ReplayBuffer, priorities_of
from .rollout import Rollout, collect
from .rollout_agent import Metrics, RolloutAgent


class Behaviour:
    """The behaviour policy: a mixture of the policy's and the reference's distributions, for `collect`.

    Args:
        policy: The policy, whose random generator samples.
        reference: The reference.
        epsilon: Weight of the reference.
        temperature: Temperature of the reference.
        greedy: Whether to use the policy's most likely token instead of its distribution.
        head: Output weights in place of the policy's.
    """

    critic = None  # `collect` takes the values from `act`
    generates_what_act_would = False  # `collect` must call `act` for every token

    def __init__(
        self,
        policy: ActorCritic,
        reference: TokenModel,
        epsilon: float,
        temperature: float,
        greedy: bool,
        head: Any = None,
    ) -> None:
        self.policy, self.reference, self.greedy = policy, reference, greedy
        self.device = policy.device
        self.epsilon, self.temperature = epsilon, temperature
        self.head = policy.head if head is None else head

    @torch.no_grad()
    def act(
        self, observation: Observation, deterministic: bool = False, action_masks: Any = None, with_value: bool = True
    ) -> Step:
        """Return one token for each row, its log-prob under the mixture, and value 0."""
        logits = self.head(self.policy.next_hidden(observation))  # (B, V)
        probabilities = self.policy.distribution(action_masks).logits(logits).softmax(-1)
        if self.greedy:
            probabilities = torch.zeros_like(probabilities).scatter_(1, probabilities.argmax(-1, keepdim=True), 1.0)
        if self.epsilon > 0:
            with phase("reference"):
                reference_logits = self.reference.next_logits(observation)
            exploration = replace(self.policy.distribution(action_masks), temperature=self.temperature)
            explored = exploration.logits(reference_logits).softmax(-1)
            probabilities = torch.lerp(probabilities, explored, self.epsilon)
        action = self.policy.sample(probabilities)
        log_prob = probabilities.gather(1, action[:, None])[:, 0].log()
        return Step(action, log_prob, torch.zeros_like(log_prob))


class ReplayAgent(RolloutAgent):
    """Base class of agents with a replay buffer; arguments as `RolloutAgent`.

    An algorithm implements `modules` (further networks), `follow` (target networks), `update` and `loss`.

    Raises:
        ValueError: If the weights are sharded, the KL coefficient has a controller, or the KL estimator is not k1 or
            has a clamp.
    """

    config: ReplayConfig
    greedy: bool
    reference_may_move = False  # the replay buffer stores log-probs of the reference
    has_separate_critic: ClassVar[bool] = False
    """Whether the further networks have their own loss, so that their gradient is clipped separately."""

    def __init__(self, policy: PolicyLike, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        if self.learner.sharded:
            raise ValueError(
                f"{type(self).__name__} does not shard its target networks: launch it with examples/accelerate/ddp.yaml"
            )
        if not isinstance(self.penalty.controller, FixedKL):
            raise ValueError(
                f"the values and the replay buffer of {type(self).__name__} depend on beta, so it must be constant: "
                "give the environment a number as kl_coef"
            )
        if self.penalty.estimator != "k1" or self.penalty.clamp is not None:
            raise ValueError(
                f"{type(self).__name__} has the KL in its backups and needs no estimator: use kl_estimator='k1' and "
                "kl_clamp=None"
            )
        self.memory = ReplayBuffer(self.config.buffer_size)
        self.steps = 0  # number of optimiser steps
        self.further = self.modules()
        broadcast_weights(self.further)
        trained = [weight for weight in self.further.parameters() if weight.requires_grad]
        if trained:
            part = "critic" if self.has_separate_critic else "policy"
            own = {"lr": self.config.learning_rate, "weight_decay": self.config.weight_decay}
            self.optimizer.add_param_group({"params": trained, "part": part, **own})

    @abstractmethod
    def modules(self) -> nn.ModuleDict:
        """Return the further networks; they are saved with the agent, and trained unless they are frozen."""

    @abstractmethod
    def follow(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return pairs of a target network and the trained module that it follows."""

    @abstractmethod
    def loss(self, batch: ReplayBatch) -> tuple[Tensor, Tensor, TensorMetrics]:
        """Return the loss of replayed episodes, TD errors of their tokens `(B, T)`, and metrics.

        Loss and metrics are means over response tokens.
        """

    @property
    def epsilon(self) -> float:
        """Current share of tokens that are sampled from the reference."""
        config = self.config
        done = self.episodes / max(self.total_episodes * config.epsilon_fraction, 1)
        return config.epsilon_start + (config.epsilon_end - config.epsilon_start) * min(done, 1.0)

    def collect(self, head: Any = None) -> Rollout:
        """Collect one episode of each prompt of a round; `head` replaces the policy's output weights."""
        config = self.config
        exploration = (self.epsilon, config.exploration_temperature)
        actor: Any = Behaviour(self.policy, self.penalty.reference, *exploration, self.greedy, head)
        rollout = collect(self.envs, actor, self.episode_options())
        self.penalty.reference.reset_cache()  # it is not needed again before the next rollout
        return rollout

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL estimate k1 between behaviour policy and reference for every token, `(N, T)` nats."""
        reference_log_probs = self.penalty.reference.sequence_log_probs(rollout.sequences)
        return masked(rollout.log_probs - reference_log_probs, rollout.response_mask)

    def remember(self, rollout: Rollout, kl: Tensor) -> None:
        """Add the episodes that have a score to the replay buffer, with the reference's log-probs of their tokens.

        They follow from k1 = log pi - log pi_ref, so no other pass of the reference is needed.
        """
        here, longest = self.policy.device, self.base_env.max_new_tokens
        for part in everyone(self._scored(rollout, kl)):
            if part is not None:
                sequences, rewards, reference_log_probs = part
                self.memory.add(sequences.to(here), rewards.to(here), reference_log_probs.to(here), longest)

    def _scored(self, rollout: Rollout, kl: Tensor) -> tuple[Sequences, Tensor, Tensor] | None:
        """Return the sequences, rewards and reference log-probs of the episodes with a score; `None` without any."""
        [scored] = to_host(rollout.scored)
        rows = scored.nonzero()[:, 0]
        if not len(rows):
            return None
        kl, rollout = kl[rows.to(kl.device)], rollout[rows]
        kl = kl[:, : rollout.log_probs.shape[1]]
        reference_log_probs = masked(rollout.log_probs - kl, rollout.response_mask)
        place = self.policy.device if count() == 1 else torch.device("cpu")  # processes exchange host memory
        return rollout.sequences.to(place), rollout.rewards.to(place), reference_log_probs.to(place)

    def samples(self) -> Iterator[ReplayBatch]:
        """Yield a batch of replayed episodes for each step of an update; none before learning starts."""
        if self.memory.added >= self.config.learning_starts:
            for _ in range(self.config.gradient_steps):
                yield self.memory.sample(self.config.batch_size, self.shuffler)

    def step(self, batch: ReplayBatch) -> TensorMetrics:
        """Make one optimiser step on `loss`; return its metrics, means over the batch, and the norm of the gradient.

        Raises:
            NonFiniteError: If the loss or the norm is NaN or infinite; the weights are then unchanged.
        """
        self.policy.reset_cache()
        self.optimizer.zero_grad(set_to_none=True)
        size, total = self.config.micro_batch_size or self.config.batch_size, batch.sequences.response_mask.sum()
        rows = range(rank(), self.config.batch_size, count())  # of this process
        parts = [
            slice(r[0], r[-1] + 1, count()) for start in range(0, len(rows), size) if (r := rows[start : start + size])
        ]
        metrics: TensorMetrics = {}
        priorities: list[tuple[Tensor, Tensor]] = []
        # Gradient accumulation: each micro-batch adds its share of the gradient of the whole batch.
        for chosen, counts in pad_micro_batches(parts, spare=slice(0, 1)):
            part = batch.part(chosen)
            share = part.sequences.response_mask.sum() / total * counts  # losses are means over tokens
            with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.config.bf16):
                loss, errors, reported = self.loss(part)
            (share * loss).backward()
            if counts and self.memory.alpha > 0:
                priorities.append((part.indices, priorities_of(errors, part.sequences.response_mask)))
            for name, value in {**reported, "loss": loss.detach()}.items():
                metrics[name] = metrics.get(name, 0.0) + share * value
        metrics = dict(zip(metrics, sum_over_processes(torch.stack(list(metrics.values()))), strict=True))
        norm = self.apply_gradients(metrics.pop("loss"))
        metrics["val/grad_norm"] = norm
        if self.memory.alpha > 0 and not bool(norm.isnan()):  # a skipped step has no valid errors
            if count() > 1:
                priorities = [(indices.cpu(), values.cpu()) for indices, values in priorities]
            for indices, values in itertools.chain(*everyone(priorities)):
                self.memory.reprioritise(indices, values)
        self.steps += 1
        return metrics

    @torch.no_grad()
    def update_targets(self) -> None:
        """Move the target networks by tau towards the trained ones, after every `target_update_interval`-th step."""
        if self.steps % self.config.target_update_interval:
            return
        for target, followed in self.follow():
            for old, new in zip(target.parameters(), followed.parameters(), strict=True):
                old.lerp_(new, self.config.tau)

    def finish(self, steps: list[TensorMetrics]) -> Metrics:
        """Return the metrics of an update from the metrics of its steps."""
        return {**on_host(mean_over(steps)), "val/epsilon": self.epsilon, "val/memory": float(len(self.memory))}

    def training_state(self) -> dict[str, Any]:
        """Return the counters of this class of agents, for a checkpoint."""
        return {"steps": self.steps, "added": self.memory.added}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the counters of `training_state`."""
        self.steps, self.memory.added = state["steps"], state["added"]

    def training_tensors(self) -> dict[str, Tensor]:
        """Return the replay buffer, and the weights of networks other than the policy, for a checkpoint."""
        memory = {f"memory.{name}": values for name, values in self.memory.tensors.items()}
        return {**memory, **dict(self.further.named_parameters(prefix="module"))}

    def load_training_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of `training_tensors`."""
        saved = {name.removeprefix("memory."): x for name, x in tensors.items() if name.startswith("memory.")}
        self.memory.tensors = saved
        self.memory.stop, self.memory.decoder_start = self.base_env.stop, self.base_env.decoder_start
        with torch.no_grad():
            for name, weight in self.further.named_parameters(prefix="module"):
                weight.copy_(tensors[name])
