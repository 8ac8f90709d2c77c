"""Token-level Q-learning (Mnih et al., 2015) with later improvements, and with a soft or a greedy backup.

    textgym train --agent dqn --output-dir runs/dqn
    textgym train --agent dqn --backup greedy --double --n-steps 4 --prioritised --output-dir runs/greedy

    Q(s_t, a_t) <- r_t + gamma V'(s_{t+1})

with V' from a target network. With `backup="soft"` V is the value of the KL-regularised objective,

    V(s) = beta log sum_a pi_ref(a | s) exp(Q(s, a) / beta),    pi(a | s) = pi_ref(a | s) exp((Q(s, a) - V(s)) / beta),

so the result is a policy to sample from, with the same optimum as all other agents here (Haarnoja et al., 2017;
Schulman et al., 2017, "Equivalence between policy gradients and soft Q-learning"). With "greedy" V(s) = max_a Q(s, a):
the result is one text with the highest return, which is decoded greedily. There the reward has the term
beta log pi_ref(a | s), as in an environment with `kl_mode="reference"`.

Both Q-functions are initialised from the language model, see q_functions.py. Bootstrapping is after `n_steps` rewards.
The greedy backup bootstraps earlier if a replayed token is not greedy (Watkins, 1989). The soft backup subtracts
beta log(pi / pi_ref) for each token, and is then valid for any text (Nachum et al., 2017, "path consistency").
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textgym.models.actor_critic import PolicyLike

from .common.advantages import n_step_returns
from .common.means import masked_mean
from .common.metrics import TensorMetrics
from .common.q_functions import GreedyQ, Heads, SoftQ, frozen_actor
from .common.replay_agent import ReplayAgent
from .common.replay_buffer import ReplayBatch
from .common.rollout import Rollout
from .common.rollout_agent import Metrics
from .configs.dqn import DQNConfig
from .configs.rollout import RolloutAgentConfig


class DQN(ReplayAgent):
    """Q-learning over whole episodes of text, with a soft or a greedy backup; arguments as `RolloutAgent`.

    Raises:
        ValueError: If the backup is soft and the environment has no KL penalty.
    """

    config_class: ClassVar[type[RolloutAgentConfig]] = DQNConfig
    config: DQNConfig

    def __init__(self, policy: PolicyLike, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        self.greedy = self.config.backup == "greedy"
        if not self.greedy and self.penalty.coef == 0:
            raise ValueError("the soft backup divides by beta: give the environment a kl_coef, or set backup='greedy'")
        if self.config.prioritised:
            self.memory.alpha = self.config.priority_exponent

    def modules(self) -> nn.ModuleDict:
        """Return the target networks, and the heads of a greedy Q."""
        config = self.config
        if config.backup == "soft":
            self.soft, self.soft_target = SoftQ(self.policy), SoftQ(frozen_actor(self.policy))
            return nn.ModuleDict({"target": self.soft_target.actor})
        heads = Heads(self.policy, config.noisy, config.n_quantiles)
        self.q = GreedyQ(self.policy, heads, config.q_scale, config.dueling)
        self.target = self.q.frozen_copy()
        return nn.ModuleDict({"heads": heads, "target": self.target.actor, "target_heads": self.target.heads})

    def follow(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the target networks, and the modules that they follow."""
        if not self.greedy:
            return [(self.soft_target.actor, self.policy)]
        return [(self.target.actor, self.policy), (self.target.heads, self.q.heads)]

    def collect(self, head: Any = None) -> Rollout:
        """Collect one episode of each prompt of a round; noise on the weights is sampled once for each row."""
        if not self.greedy:
            return super().collect()
        seed = int(torch.randint(2**31, (), generator=self.sampler, device=self.policy.device))  # of this process
        self.q.heads.resample(torch.Generator().manual_seed(seed), self.envs.num_envs)
        rollout = super().collect(self.q.logits)
        self.q.heads.quieten()
        return rollout

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Mnih et al., 2015, algorithm 1) from a rollout, the KL of its tokens, and the buffer."""
        # 1. Add the new episodes to the replay buffer; the reference's log-probs of their tokens follow from the KL.
        self.remember(rollout, kl)

        # 2. Optimiser steps on episodes sampled from the buffer, and updates of the target networks in intervals. Their
        #    weights correct the priorities in full in the last update (Schaul et al., 2016, section 3.4).
        first, before_last = self.config.priority_correction, self.total_episodes - self.update_size
        self.memory.beta = first + (1 - first) * min(self.episodes / max(before_last, 1), 1.0)
        steps: list[TensorMetrics] = []
        for batch in self.samples():
            steps.append(self.step(batch))
            self.update_targets()

        # 3. Metrics: means over the steps.
        return self.finish(steps)

    def loss(self, batch: ReplayBatch) -> tuple[Tensor, Tensor, TensorMetrics]:
        """Return the Huber loss between Q and its targets, a mean over response tokens, weighted by episode."""
        mask = batch.sequences.response_mask

        # 1. Q of the replayed tokens, and the targets r_t + gamma V'(s_{t+1}) of the target networks.
        q, targets = self._greedy_q_and_targets(batch) if self.greedy else self._soft_q_and_targets(batch)

        # 2. Errors of every quantile to every target quantile; without quantiles there is one of each.
        errors = targets[..., None, :] - q[..., :, None]  # (B, T, K, K')
        huber = F.huber_loss(errors, torch.zeros_like(errors), reduction="none")
        if self.config.n_quantiles > 1:  # quantile regression (Dabney et al., 2018, equation 10)
            count = self.config.n_quantiles
            middle = (torch.arange(count, device=q.device) + 0.5) / count
            huber = huber * (middle[:, None] - (errors.detach() < 0).float()).abs()

        # 3. Mean over target quantiles, sum over quantiles, mean over tokens; weights correct the priorities.
        per_token = huber.mean(-1).sum(-1)  # (B, T)
        loss = masked_mean(per_token * batch.weights[:, None], mask)

        error = errors.detach().mean((-1, -2))  # (B, T)
        metrics = {
            "loss/q_avg": masked_mean(per_token.detach(), mask),
            "val/td_error_avg": masked_mean(error.abs(), mask),
            "val/q_avg": masked_mean(q.detach().mean(-1), mask),
        }
        return loss, error, metrics

    def _soft_q_and_targets(self, batch: ReplayBatch) -> tuple[Tensor, Tensor]:
        """Return Q and its soft targets (Haarnoja et al., 2017), `(B, T, 1)` each."""
        config, sequences, beta = self.config, batch.sequences, self.penalty.coef
        value, advantage = self.soft.of_actions(sequences, batch.reference_log_probs, beta)
        with torch.no_grad():
            target_value, penalty = self.soft_target.of_actions(sequences, batch.reference_log_probs, beta)
            # Q(s_t, a_t) does not include the penalty of token t itself, so it is added again.
            returns = n_step_returns(
                batch.rewards - penalty, target_value, sequences.response_mask, config.gamma, config.n_steps
            )
            targets = returns + penalty
        return (value + advantage)[..., None], targets[..., None]

    def _greedy_q_and_targets(self, batch: ReplayBatch) -> tuple[Tensor, Tensor]:
        """Return Q and its greedy targets, `(B, T, K)` each."""
        config, sequences = self.config, batch.sequences
        rewards = self.penalty.charge(batch.rewards, -batch.reference_log_probs)
        self.q.heads.resample(self.shuffler)
        q = _padded(self.q.of_actions(sequences), batch)
        with torch.no_grad():
            if config.double:
                actions = self.q.choose(sequences)
                values = self.target.of_actions(sequences, actions)
            else:
                actions, values = self.target.best(sequences)
            best = sequences.pad(actions == sequences.actions)
            columns = [
                n_step_returns(rewards, value, sequences.response_mask, config.gamma, config.n_steps, best)
                for value in _padded(values, batch).unbind(-1)
            ]
        self.q.heads.quieten()
        return q, torch.stack(columns, -1)


def _padded(flat: Tensor, batch: ReplayBatch) -> Tensor:
    """Return values of tokens, `(M,)` or `(M, K)`, as `(B, T, K)`, zero in the padding."""
    columns = flat[:, None] if flat.ndim == 1 else flat
    return torch.stack([batch.sequences.pad(column) for column in columns.unbind(1)], -1)
