"""ReplayAgent: what all algorithms with a replay memory share: exploration, the memory, the optimiser step, targets.

An algorithm has its whole update on its own page, `update` and `loss`, and calls from here:

    remember         puts a rollout into the memory, with the reference's log-probs of its tokens
    samples          batches of remembered episodes, as many as an update has steps
    step             one optimiser step on `loss`, in micro-batches whose gradients add up to that of the batch
    update_targets   moves slower copies towards what was learned, every so many steps

Episodes are played by the policy and, for a share epsilon of the tokens, by the reference: random tokens of the whole
vocabulary hardly ever make sense.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from textgym.models.actor_critic import ActorCritic, PolicyLike, Step
from textgym.models.machine.finite import check_finite
from textgym.models.machine.profiled_phases import phase
from textgym.models.machine.transfer import to_host
from textgym.models.token_model import Observation, TokenModel
from textgym.rewards.kl import FixedKL
from textgym.settings import Count, Positive, PositiveShare, Share, at_least

from ..machine.distributed import count
from .metrics import TensorMetrics, mean_over, on_host
from .replay_buffer import ReplayBatch, ReplayBuffer
from .rollout import Rollout, collect
from .rollout_agent import Metrics, RolloutAgent, RolloutAgentConfig


@dataclass
class ReplayConfig(RolloutAgentConfig):
    """Hyperparameters of all agents with a replay memory; `episodes_per_update` are played between two updates."""

    episodes_per_update: Count = 64
    """Episodes collected before each update; a multiple of the number of rows of the environment."""
    gradient_steps: Count = 4
    """Steps of the optimiser in an update."""
    batch_size: Count = 64
    """Episodes drawn from memory for a step."""
    micro_batch_size: Count | None = None
    """Of them in one forward pass; gradients add up to those of the batch. None: the whole batch."""
    buffer_size: Count = 8192
    """Episodes that are remembered, the newest ones."""
    learning_starts: Annotated[int, at_least(0)] = 256
    """Episodes that are played before the first step."""
    gamma: Share = 1.0
    """Discount."""
    n_steps: Count = 1
    """Rewards before the target; with more a score at the end reaches earlier tokens sooner."""
    tau: PositiveShare = 1.0
    """Share of the new weights in the targets when they are updated; 1 copies them."""
    target_update_interval: Count = 16
    """Steps of the optimiser from one update of the targets to the next."""
    epsilon_start: Share = 1.0
    """Share of tokens drawn from the reference at first."""
    epsilon_end: Share = 0.05
    """The same from `epsilon_fraction` of the episodes on; in between it falls linearly."""
    epsilon_fraction: Share = 0.5
    """Share of the episodes over which epsilon falls."""
    exploration_temperature: Positive = 1.0
    """Divides the reference's logits where epsilon draws from it: the more above 1, the nearer to uniform."""


class Behaviour:
    """Who plays: a policy's distribution, mixed with the reference's; takes the policy's place in `collect`.

    Args:
        policy: whose generator draws.
        reference: mixed in.
        epsilon: its share.
        temperature: divides the reference's logits.
        greedy: the likeliest token of the policy instead of its distribution.
        head: output weights other than the policy's own.
    """

    critic = None  # as a policy without one of its own: its values are those of `act`
    generates_what_act_would = False  # it explores, token by token

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
        """One token for each row, its log-prob under the mixture, and no value."""
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
    """Base class of agents with a replay memory; arguments as `RolloutAgent`.

    An algorithm has `modules` besides the policy, targets that `follow` them, `update` and `loss`.

    Raises:
        ValueError: a KL whose coefficient moves, or that is estimated or clamped in a way of its own.
    """

    config: ReplayConfig
    greedy: bool
    reference_may_move = False  # the replay buffer keeps log-probs of the reference as it was

    def __init__(self, policy: PolicyLike, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        if count() > 1:
            raise ValueError(
                f"{type(self).__name__} remembers its own episodes alone, so it runs in one process: launch one, or "
                "use an on-policy agent"
            )
        if not isinstance(self.penalty.controller, FixedKL):
            raise ValueError(
                f"beta is a part of what {type(self).__name__} learns and remembers, so no controller may move it: "
                "give the environment a number as kl_coef"
            )
        if self.penalty.estimator != "k1" or self.penalty.clamp is not None:
            raise ValueError(
                f"{type(self).__name__} has the KL in its backups and estimates none: leave kl_estimator='k1' and "
                "kl_clamp=None"
            )
        self.memory = ReplayBuffer(self.config.buffer_size)
        self.steps = 0  # of the optimiser
        self.further = self.modules()
        learned = [weight for weight in self.further.parameters() if weight.requires_grad]
        if learned:
            self.optimizer.add_param_group({"params": learned})

    @abstractmethod
    def modules(self) -> nn.ModuleDict:
        """What there is besides the policy: it is saved with the agent, and learned unless it is frozen."""

    @abstractmethod
    def follow(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of a target and the module that it follows."""

    @abstractmethod
    def loss(self, batch: ReplayBatch) -> tuple[Tensor, Tensor, TensorMetrics]:
        """Return the loss of remembered episodes, errors of their tokens `(B, T)`, and metrics to report.

        Loss and metrics are means over response tokens.
        """

    @property
    def epsilon(self) -> float:
        """Share of tokens drawn from the reference, as it is now."""
        config = self.config
        done = self.episodes / max(self.total_episodes * config.epsilon_fraction, 1)
        return config.epsilon_start + (config.epsilon_end - config.epsilon_start) * min(done, 1.0)

    def collect(self, head: Any = None) -> Rollout:
        """One episode in every row; `head` in place of the policy's output weights."""
        config = self.config
        exploration = (self.epsilon, config.exploration_temperature)
        actor: Any = Behaviour(self.policy, self.penalty.reference, *exploration, self.greedy, head)
        rollout = collect(self.envs, actor, self.episode_options())
        self.penalty.reference.reset_cache()  # it is not needed again before the next rollout
        return rollout

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL estimate k1 of every token to the reference, of whoever played, `(N, T)` nats."""
        reference_log_probs = self.penalty.reference.sequence_log_probs(rollout.sequences)
        return torch.where(rollout.response_mask, rollout.log_probs - reference_log_probs, 0.0)

    def remember(self, rollout: Rollout, kl: Tensor) -> None:
        """Put the episodes that have a score into the memory, with the reference's log-probs of their tokens.

        These are the behaviour's less their difference, k1.
        """
        [scored] = to_host(rollout.scored)
        rows = scored.nonzero()[:, 0]
        kl, rollout = kl[rows.to(kl.device)], rollout[rows]
        kl = kl[:, : rollout.log_probs.shape[1]]
        reference_log_probs = torch.where(rollout.response_mask, rollout.log_probs - kl, 0.0)
        longest = self.base_env.max_new_tokens
        self.memory.add(rollout.sequences, rollout.rewards, reference_log_probs, longest)

    def samples(self) -> Iterator[ReplayBatch]:
        """Yield a batch of remembered episodes for each step of an update; none before learning starts."""
        if self.memory.added >= self.config.learning_starts:
            for _ in range(self.config.gradient_steps):
                yield self.memory.sample(self.config.batch_size, self.shuffler)

    def step(self, batch: ReplayBatch) -> TensorMetrics:
        """Make one optimiser step on `loss`; returns its metrics, means over the batch, and the gradient's norm.

        Raises:
            NonFiniteError: the loss or the norm is NaN or infinite; the weights stay as they were.
        """
        self.policy.reset_cache()
        self.optimizer.zero_grad(set_to_none=True)
        size, total = self.config.micro_batch_size or self.config.batch_size, batch.sequences.response_lengths.sum()
        metrics: TensorMetrics = {}
        # Micro-batches: each backward pass adds its share of the batch's gradient.
        for start in range(0, self.config.batch_size, size):
            part = batch.part(slice(start, start + size))
            share = part.sequences.response_lengths.sum() / total  # losses are means over tokens
            with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.config.bf16):
                loss, errors, reported = self.loss(part)
            (share * loss).backward()
            if self.memory.alpha > 0:
                self.memory.reprioritise(part.indices, errors, part.sequences.response_mask)
            for name, value in {**reported, "loss": loss.detach()}.items():
                metrics[name] = metrics.get(name, 0.0) + share * value
        check_finite("loss", metrics.pop("loss"), f"update {self.updates + 1}")
        metrics["val/grad_norm"] = self.apply_gradients()
        self.steps += 1
        return metrics

    @torch.no_grad()
    def update_targets(self) -> None:
        """Move the targets a share tau towards what they follow, after every `target_update_interval`-th step."""
        if self.steps % self.config.target_update_interval:
            return
        for target, followed in self.follow():
            for old, new in zip(target.parameters(), followed.parameters(), strict=True):
                old.lerp_(new, self.config.tau)

    def finish(self, steps: list[TensorMetrics]) -> Metrics:
        """Return the metrics of an update from the metrics of its steps."""
        return {**on_host(mean_over(steps)), "val/epsilon": self.epsilon, "val/memory": float(len(self.memory))}

    def training_state(self) -> dict[str, Any]:
        """Counters, besides what every agent saves."""
        return {"steps": self.steps, "added": self.memory.added}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `training_state` gave."""
        self.steps, self.memory.added = state["steps"], state["added"]

    def training_tensors(self) -> dict[str, Tensor]:
        """Memory, and what is learned or copied besides the policy."""
        memory = {f"memory.{name}": values for name, values in self.memory.tensors.items()}
        return {**memory, **dict(self.further.named_parameters(prefix="module"))}

    def load_training_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what `training_tensors` gave."""
        kept = {name.removeprefix("memory."): x for name, x in tensors.items() if name.startswith("memory.")}
        self.memory.tensors = kept
        self.memory.stop, self.memory.decoder_start = self.base_env.stop, self.base_env.decoder_start
        with torch.no_grad():
            for name, weight in self.further.named_parameters(prefix="module"):
                weight.copy_(tensors[name])
