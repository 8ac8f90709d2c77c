"""Q-learning, token by token (Mnih et al., 2015), with the improvements that came after.

    textgym train --agent dqn --output-dir runs/dqn
    textgym train --agent dqn --backup greedy --double --n-steps 4 --prioritised --output-dir runs/greedy

    Q(s_t, a_t) <- r_t + gamma V'(s_{t+1})

towards targets V' of a slower copy. With `backup="soft"` V is the value of the objective with its KL,

    V(s) = beta log sum_a pi_ref(a | s) exp(Q(s, a) / beta),    pi(a | s) = pi_ref(a | s) exp((Q(s, a) - V(s)) / beta),

so what is learned is a policy to sample from, and its optimum that of all agents here (Haarnoja et al., 2017; Schulman
et al., 2017, "Equivalence between policy gradients and soft Q-learning"). With "greedy" V(s) = max_a Q(s, a): one text
of the highest reward, to be decoded greedily; there a nat of beta pays beta log pi_ref(a | s), as an environment with
`kl_mode="reference"` does.

Both start from the language model, see q_functions.py. `n_steps` rewards come before the target. The greedy backup
takes them as long as the remembered tokens are the best ones (Watkins, 1989); the soft one takes off
beta log(pi / pi_ref) of each, and then holds along any text (Nachum et al., 2017, "path consistency").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textgym.errors import ConfigError
from textgym.models.actor_critic import PolicyLike
from textgym.settings import Count, NotNegative

from .common.advantages import n_step_returns
from .common.means import masked_mean
from .common.metrics import TensorMetrics
from .common.q_functions import GreedyQ, Heads, SoftQ, frozen_actor
from .common.replay_agent import ReplayAgent, ReplayConfig
from .common.replay_buffer import ReplayBatch
from .common.rollout import Rollout
from .common.rollout_agent import Metrics, RolloutAgentConfig


@dataclass
class DQNConfig(ReplayConfig):
    """Hyperparameters of Q-learning; beta is the environment's `kl_coef`."""

    backup: Literal["soft", "greedy"] = "soft"
    """What a state is worth: the value of the objective with its KL, or the best token's Q."""
    prioritised: bool = False
    """Draw episodes with large errors more often (Schaul et al., 2016), which weights make up for in part."""
    priority_exponent: NotNegative = 0.6
    """Of "prioritised": 0 draws all alike."""
    q_scale: float = 1.0
    """Of "greedy": Q-values that a nat of the language model's log-probs is worth at first."""
    double: bool = False
    """Of "greedy": the online network chooses the token that the target network values (van Hasselt et al., 2016)."""
    dueling: bool = True
    """Of "greedy": a value of the state and advantages of the tokens, in place of plain outputs (Wang et al., 2016)."""
    noisy: bool = False
    """Of "greedy": learned noise on the output weights explores too (Fortunato et al., 2018); alone if epsilon is 0."""
    n_quantiles: Count = 1
    """Of "greedy": above 1, so many quantiles of the return are learned (Dabney et al., 2018)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backup == "soft" and (self.double or self.noisy or self.n_quantiles > 1 or not self.dueling):
            raise ConfigError(
                "double, noisy, n_quantiles and dueling=False belong to the greedy backup: the soft one chooses no "
                "best token, explores by its own distribution, and has a value by itself. Set backup='greedy'"
            )


class DQN(ReplayAgent):
    """Q-learning over whole episodes of text, with a soft or a greedy backup; arguments as `RolloutAgent`.

    Raises:
        ValueError: the soft backup in an environment without a KL penalty.
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
        """Targets, and the heads of a greedy Q."""
        config = self.config
        if config.backup == "soft":
            self.soft, self.soft_target = SoftQ(self.policy), SoftQ(frozen_actor(self.policy))
            return nn.ModuleDict({"target": self.soft_target.actor})
        heads = Heads(self.policy, config.noisy, config.n_quantiles)
        self.q = GreedyQ(self.policy, heads, config.q_scale, config.dueling)
        self.target = self.q.frozen_copy()
        return nn.ModuleDict({"heads": heads, "target": self.target.actor, "target_heads": self.target.heads})

    def follow(self) -> list[tuple[nn.Module, nn.Module]]:
        """The targets, and what they follow."""
        if not self.greedy:
            return [(self.soft_target.actor, self.policy)]
        return [(self.target.actor, self.policy), (self.target.heads, self.q.heads)]

    def collect(self, head: Any = None) -> Rollout:
        """One episode in every row, with noise on the weights, drawn once for each, if it explores."""
        if not self.greedy:
            return super().collect()
        self.q.heads.resample(self.shuffler, self.envs.num_envs)
        rollout = super().collect(self.q.logits)
        self.q.heads.quieten()
        return rollout

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Mnih et al., 2015, algorithm 1) from a rollout, the KL of its tokens, and the memory."""
        # 1. Remember the new episodes; the KL tells the reference's log-probs of their tokens.
        self.remember(rollout, kl)

        # 2. Optimiser steps, each on episodes drawn from memory, and now and then an update of the targets.
        steps: list[TensorMetrics] = []
        for batch in self.samples():
            steps.append(self.step(batch))
            self.update_targets()

        # 3. Metrics: means over the steps.
        return self.finish(steps)

    def loss(self, batch: ReplayBatch) -> tuple[Tensor, Tensor, TensorMetrics]:
        """The Huber loss of Q to its targets, a mean over response tokens, weighted by episode."""
        mask = batch.sequences.response_mask

        # 1. Q of the remembered tokens, and r_t + gamma V'(s_{t+1}) of the target networks.
        q, targets = self._greedy_q_and_targets(batch) if self.greedy else self._soft_q_and_targets(batch)

        # 2. Errors of every quantile to every target; one each without quantiles.
        errors = targets[..., None, :] - q[..., :, None]  # (B, T, K, K')
        huber = F.huber_loss(errors, torch.zeros_like(errors), reduction="none")
        if self.config.n_quantiles > 1:  # quantile regression (Dabney et al., 2018, equation 10)
            count = self.config.n_quantiles
            middle = (torch.arange(count, device=q.device) + 0.5) / count
            huber = huber * (middle[:, None] - (errors.detach() < 0).float()).abs()

        # 3. A mean over targets, a sum over quantiles, a mean over tokens; weights make up for priorities.
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
        value, added = self.soft.of_actions(sequences, batch.reference_log_probs, beta)
        with torch.no_grad():
            target_value, paid = self.soft_target.of_actions(sequences, batch.reference_log_probs, beta)
            # The penalty of the first token is not paid: it is what Q tells tokens apart by.
            returns = n_step_returns(
                batch.rewards - paid, target_value, sequences.response_mask, config.gamma, config.n_steps
            )
            targets = returns + paid
        return (value + added)[..., None], targets[..., None]

    def _greedy_q_and_targets(self, batch: ReplayBatch) -> tuple[Tensor, Tensor]:
        """Return Q and its greedy targets, `(B, T, K)` each."""
        config, sequences = self.config, batch.sequences
        rewards = self.penalty.charge(batch.rewards, -batch.reference_log_probs)
        self.q.heads.resample(self.shuffler)
        q = _laid_out(self.q.of_actions(sequences), batch)
        with torch.no_grad():
            if config.double:
                actions = self.q.choose(sequences)
                values = self.target.of_actions(sequences, actions)
            else:
                actions, values = self.target.best(sequences)
            best = sequences.pad(actions == sequences.actions)
            columns = [
                n_step_returns(rewards, value, sequences.response_mask, config.gamma, config.n_steps, best)
                for value in _laid_out(values, batch).unbind(-1)
            ]
        self.q.heads.quieten()
        return q, torch.stack(columns, -1)


def _laid_out(flat: Tensor, batch: ReplayBatch) -> Tensor:
    """Return numbers of single tokens, `(M,)` or `(M, K)`, as `(B, T, K)`."""
    columns = flat[:, None] if flat.ndim == 1 else flat
    return torch.stack([batch.sequences.pad(column) for column in columns.unbind(1)], -1)
