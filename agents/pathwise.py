"""Pathwise derivative policy gradient: the actor's output goes into a critic, and is pushed to where that says more.

    textgym train --agent pathwise --output-dir runs/pathwise

    J(theta) = E[sum_a y_a Q(s, a) - beta KL(pi(. | s), pi_ref(. | s))],    y = softmax((log pi(. | s) + g) / tau)

with g standard Gumbel noise: a token has no derivative, so a relaxed one takes its place, a point of the simplex at
whose corners are the tokens (Jang et al., 2017; Maddison et al., 2017), or with "straight_through" the token itself,
with the relaxed one's derivative. Q is a network of its own, linear in y, and learned off-policy as in DDPG (Lillicrap
et al., 2016), from a slower actor pi' and a slower critic Q':

    Q(s_t, a_t) <- r_t + gamma V'(s_{t+1}),    V'(s) = sum_a pi'(a | s) Q'(s, a) - beta KL(pi'(. | s), pi_ref(. | s))

The sums over a are exact, a chunk of states at a time; with `n_steps` above 1 the rewards are those that the remembered
text had, whoever wrote it. Without a KL penalty the policy goes to the text of the highest reward. The relaxed
derivative is not quite the true one, so with a penalty the policy comes near the optimum of the other agents, no
further.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import twin
from textgym.models.distributions.log_probs import in_chunks
from textgym.models.distributions.token_distribution import TokenDistribution
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.settings import Positive

from .common.advantages import n_step_returns
from .common.means import masked_mean
from .common.metrics import TensorMetrics
from .common.q_functions import GreedyQ, Heads, frozen_actor
from .common.replay_agent import ReplayAgent, ReplayConfig
from .common.replay_buffer import ReplayBatch
from .common.rollout import Rollout
from .common.rollout_agent import Metrics, RolloutAgentConfig


@dataclass
class PathwiseConfig(ReplayConfig):
    """Hyperparameters of the pathwise derivative; beta is the environment's `kl_coef`."""

    relaxation: Literal["straight_through", "gumbel"] = "straight_through"
    """What the critic is given: a token with the relaxed one's derivative, or the relaxed one."""
    relaxation_temperature: Positive = 1.0
    """The tau of the relaxation: lower is nearer to a token; higher lets a policy that is sure of itself learn."""
    q_scale: float = 1.0
    """Q-values that a nat of the language model's log-probs is worth at first."""


class Pathwise(ReplayAgent):
    """Pathwise derivative policy gradient; arguments as `RolloutAgent`.

    The critic starts as a copy of the policy's language model.
    """

    config_class: ClassVar[type[RolloutAgentConfig]] = PathwiseConfig
    config: PathwiseConfig
    greedy = False

    def modules(self) -> nn.ModuleDict:
        """The critic, and the targets."""
        critic = ActorCritic(twin(self.policy.trained_model), temperature=self.policy.temperature)
        self.q = GreedyQ(critic, Heads(critic, noisy=False, n_quantiles=1), self.config.q_scale)
        self.target, self.target_q = frozen_actor(self.policy), self.q.frozen_copy()
        return nn.ModuleDict({"critic": critic, "target": self.target, "target_critic": self.target_q.actor})

    def follow(self) -> list[tuple[nn.Module, nn.Module]]:
        """The targets, and what they follow."""
        return [(self.target, self.policy), (self.target_q.actor, self.q.actor)]

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Lillicrap et al., 2016, algorithm 1) from a rollout, its KL, and the memory."""
        # 1. Remember the new episodes; the KL tells the reference's log-probs of their tokens.
        self.remember(rollout, kl)

        # 2. Optimiser steps of critic and actor, each on episodes drawn from memory; the targets follow.
        steps: list[TensorMetrics] = []
        for batch in self.samples():
            steps.append(self.step(batch))
            self.update_targets()

        # 3. Metrics: means over the steps.
        return self.finish(steps)

    def loss(self, batch: ReplayBatch) -> tuple[Tensor, Tensor, TensorMetrics]:
        """The critic's loss and the actor's, means over response tokens; neither moves the other's weights."""
        config, sequences, beta = self.config, batch.sequences, self.penalty.coef
        mask = sequences.response_mask

        # 1. Targets of the critic: r_t + gamma V'(s_{t+1}), V'(s) = sum_a pi'(a | s) Q'(s, a) - beta KL(pi', pi_ref).
        with torch.no_grad():
            reference_hidden = self.penalty.reference.hidden(sequences.states())
            earned, kl, value = self.values(self.target, self.target_q, sequences, reference_hidden)
            paid = beta * sequences.pad(kl)
            # The penalty of the first state is not Q's: it is the same for all its tokens.
            target_value = sequences.pad(earned + value) - paid
            returns = n_step_returns(batch.rewards - paid, target_value, mask, config.gamma, config.n_steps)
            targets = returns + torch.where(mask, paid, 0.0)  # (B, T)

        # 2. Critic: the Huber loss of Q to its targets.
        q = sequences.pad(self.q.of_actions(sequences))
        errors = (targets - q).detach()
        critic_loss = masked_mean(F.huber_loss(q, targets, reduction="none"), mask)

        # 3. Actor: what a relaxed token earns by Q, less the KL (the module's J).
        seed = int(torch.randint(2**31, (), generator=self.shuffler))
        relaxed, kl, _ = self.values(self.policy, self.q, sequences, reference_hidden, seed)
        actor_loss = (beta * kl - relaxed).mean()

        metrics = {
            "loss/value_avg": critic_loss.detach(),
            "loss/policy_avg": actor_loss.detach(),
            "val/td_error_avg": masked_mean(errors.abs(), mask),
        }
        return critic_loss + actor_loss, errors, metrics

    def values(
        self, actor: TokenModel, q: GreedyQ, sequences: Sequences, reference_hidden: Tensor, seed: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the actor's next token earns in each state by Q, its KL to the reference in nats, and Q's own offset.

        Args:
            actor: gradients flow into it, and into nothing else.
            q: says what tokens earn, as advantages over the offset.
            sequences: of M response tokens.
            reference_hidden: `(M, d)`, the reference's hidden states.
            seed: of the relaxation's noise, which the backward pass makes again; `None` takes the mean over the actor's
                distribution.

        Returns:
            `(M,)` each.
        """
        states, stop, reference = sequences.states(), sequences.stop.ids, self.penalty.reference
        hidden = actor.hidden(states)
        with torch.no_grad():
            q_hidden = q.actor.hidden(states)
            offset = q.values(states, q_hidden)

        def score(
            hidden: Tensor, q_hidden: Tensor, reference_hidden: Tensor, banned: Tensor | None, index: Tensor
        ) -> tuple[Tensor, Tensor]:
            logits = TokenDistribution(actor.temperature, banned=banned, stop_ids=stop).logits(actor.head(hidden))
            log_probs = logits.log_softmax(-1)
            with torch.no_grad():
                allowed = logits > torch.finfo(logits.dtype).min
                advantages = torch.where(allowed, q.advantages(q_hidden, banned, stop), 0.0)
                distribution = TokenDistribution(reference.temperature, banned=banned, stop_ids=stop)
                reference_log_probs = distribution.log_probs(reference.head(reference_hidden))
            token = log_probs.exp() if seed is None else relax(log_probs, seed + int(index[0]), self.config)
            kl = (log_probs.exp() * torch.where(allowed, log_probs - reference_log_probs, 0.0)).sum(-1)
            return (token * advantages).sum(-1), kl

        index = torch.arange(len(hidden))  # tells the chunks apart; on the CPU, where it is read
        earned, kl = in_chunks(score, actor.vocab_size, hidden, q_hidden, reference_hidden, sequences.banned, index)
        return earned, kl, offset


def relax(log_probs: Tensor, seed: int, config: PathwiseConfig) -> Tensor:
    """One draw from each distribution `(m, V)` as a point of the simplex, with derivatives."""
    generator = torch.Generator(log_probs.device).manual_seed(seed)
    uniform = torch.rand(log_probs.shape, generator=generator, device=log_probs.device)
    gumbel = -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()
    soft = ((log_probs + gumbel) / config.relaxation_temperature).softmax(-1)
    if config.relaxation == "gumbel":
        return soft
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + soft - soft.detach()
