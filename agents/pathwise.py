"""Pathwise derivative policy gradient: the gradient of a critic flows through the actor's relaxed tokens.

    textgym train --agent pathwise --output-dir runs/pathwise

    J(theta) = E[sum_a y_a Q(s, a) - beta KL(pi(. | s), pi_ref(. | s))],    y = softmax((log pi(. | s) + g) / tau)

with standard Gumbel noise g. A token has no derivative, so a relaxed token replaces it: a point of the simplex whose
corners are the tokens (Jang et al., 2017; Maddison et al., 2017). With "straight_through" it is the token itself in the
forward pass, with the derivative of the relaxed token. The critic Q is a separate network, linear in y. It is trained
off-policy as in DDPG (Lillicrap et al., 2016), with target networks pi' and Q':

    Q(s_t, a_t) <- r_t + gamma V'(s_{t+1}),    V'(s) = sum_a pi'(a | s) Q'(s, a) - beta KL(pi'(. | s), pi_ref(. | s))

The sums over a are exact, for one chunk of states at a time. With `n_steps` above 1 the rewards are those of the
replayed text, without a correction for the policy that generated it. Without a KL penalty the policy converges to the
text with the highest reward. The derivative of relaxed tokens is biased, so with a penalty the policy comes close to
the optimum of the other agents but does not reach it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import twin
from textgym.models.distributions.log_probs import in_chunks
from textgym.models.distributions.token_distribution import TokenDistribution
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel

from .common.advantages import n_step_returns
from .common.means import masked, masked_mean
from .common.metrics import TensorMetrics
from .common.q_functions import GreedyQ, Heads, frozen_actor
from .common.replay_agent import ReplayAgent
from .common.replay_buffer import ReplayBatch
from .common.rollout import Rollout
from .common.rollout_agent import Metrics
from .configs.pathwise import PathwiseConfig
from .configs.rollout import RolloutAgentConfig
from .machine.distributed import process_seed


class Pathwise(ReplayAgent):
    """Pathwise derivative policy gradient; arguments as `RolloutAgent`.

    The critic is initialised from the policy's language model.
    """

    config_class: ClassVar[type[RolloutAgentConfig]] = PathwiseConfig
    config: PathwiseConfig
    greedy = False
    has_separate_critic = True

    def modules(self) -> nn.ModuleDict:
        """Return the critic, and the target networks."""
        actor = self.policy
        critic = actor.take_along(ActorCritic(twin(actor.trained_model), temperature=actor.temperature))
        self.q = GreedyQ(critic, Heads(critic, noisy=False, n_quantiles=1), self.config.q_scale)
        self.target, self.target_q = frozen_actor(self.policy), self.q.frozen_copy()
        return nn.ModuleDict({"critic": critic, "target": self.target, "target_critic": self.target_q.actor})

    def follow(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the target networks, and the modules that they follow."""
        return [(self.target, self.policy), (self.target_q.actor, self.q.actor)]

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Lillicrap et al., 2016, algorithm 1) from a rollout, its KL, and the replay buffer."""
        # 1. Add the new episodes to the replay buffer; the reference's log-probs of their tokens follow from the KL.
        self.remember(rollout, kl)

        # 2. Optimiser steps of critic and actor on episodes sampled from the buffer, and updates of the targets.
        steps: list[TensorMetrics] = []
        for batch in self.samples():
            steps.append(self.step(batch))
            self.update_targets()

        # 3. Metrics: means over the steps.
        return self.finish(steps)

    def loss(self, batch: ReplayBatch) -> tuple[Tensor, Tensor, TensorMetrics]:
        """Return the sum of critic and actor loss, means over response tokens; each trains only its own network."""
        config, sequences, beta = self.config, batch.sequences, self.penalty.coef
        mask = sequences.response_mask

        # 1. Targets of the critic: r_t + gamma V'(s_{t+1}), V'(s) = sum_a pi'(a | s) Q'(s, a) - beta KL(pi', pi_ref).
        with torch.no_grad():
            reference_hidden = self.penalty.reference.hidden(sequences.states())
            advantage, kl, value = self.values(self.target, self.target_q, sequences, reference_hidden)
            penalty = beta * sequences.pad(kl)
            # Q(s_t, a_t) does not include the penalty of state t itself, so it is added again.
            target_value = sequences.pad(advantage + value) - penalty
            returns = n_step_returns(batch.rewards - penalty, target_value, mask, config.gamma, config.n_steps)
            targets = returns + masked(penalty, mask)  # (B, T)

        # 2. Critic: the Huber loss between Q and its targets.
        q = sequences.pad(self.q.of_actions(sequences))
        errors = (targets - q).detach()
        critic_loss = masked_mean(F.huber_loss(q, targets, reduction="none"), mask)

        # 3. Actor: Q of the relaxed token minus the KL penalty (J above), without v, which does not depend on it.
        seed = process_seed(int(torch.randint(2**31, (), generator=self.shuffler)))
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
        """Return the advantage of the actor's next token by Q, its KL to the reference in nats, and the value v of Q.

        Args:
            actor: The actor, the only model with gradients.
            q: The critic.
            sequences: Sequences with M response tokens.
            reference_hidden: Hidden states of the reference, `(M, d)`.
            seed: Seed of the relaxation's noise, because the backward pass must sample the same noise again; `None` for
                the expectation over the actor's distribution instead of a relaxed token.

        Returns:
            `(M,)` each, before each response token.
        """
        states, stop, reference = sequences.states(), sequences.stop.ids, self.penalty.reference
        hidden = actor.hidden(states)
        with torch.no_grad():
            q_hidden = q.actor.hidden(states)
            value = q.values(states, q_hidden)

        def score(
            hidden: Tensor, q_hidden: Tensor, reference_hidden: Tensor, banned: Tensor | None, index: Tensor
        ) -> tuple[Tensor, Tensor]:
            logits = TokenDistribution(actor.temperature, banned=banned, stop_ids=stop).logits(actor.head(hidden))
            log_probs = logits.log_softmax(-1)
            with torch.no_grad():
                allowed = logits > torch.finfo(logits.dtype).min
                advantages = masked(q.advantages(q_hidden, banned, stop), allowed)
                distribution = TokenDistribution(reference.temperature, banned=banned, stop_ids=stop)
                reference_log_probs = distribution.log_probs(reference.head(reference_hidden))
            token = log_probs.exp() if seed is None else relax(log_probs, seed + int(index[0]), self.config)
            kl = (log_probs.exp() * masked(log_probs - reference_log_probs, allowed)).sum(-1)
            return (token * advantages).sum(-1), kl

        index = torch.arange(len(hidden))  # for a different seed in each chunk; on the CPU, where it is read
        advantage, kl = in_chunks(score, actor.vocab_size, hidden, q_hidden, reference_hidden, sequences.banned, index)
        return advantage, kl, value


def relax(log_probs: Tensor, seed: int, config: PathwiseConfig) -> Tensor:
    """Return a relaxed sample of each distribution, `(m, V)` points of the simplex, with derivatives."""
    generator = torch.Generator(log_probs.device).manual_seed(seed)
    uniform = torch.rand(log_probs.shape, generator=generator, device=log_probs.device)
    gumbel = -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()  # clamped, because log(0) would be infinite
    soft = ((log_probs + gumbel) / config.relaxation_temperature).softmax(-1)
    if config.relaxation == "gumbel":
        return soft
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + soft - soft.detach()  # hard in the forward pass, soft in the backward pass
