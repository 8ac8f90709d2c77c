"""REINFORCE leave-one-out (Kool et al., 2019; for language models: Ahmadian et al., 2024), and REINFORCE++.

    textgym train --agent rloo --output-dir runs/rloo

The return of an episode, its score minus the KL penalty, is compared with the mean of the others of its prompt:

    A_i = R_i - 1/(k - 1) sum_{j != i} R_j = k/(k - 1) (R_i - mean of the group)

with k the number of episodes of the group that have a score. It needs no critic and is unbiased. With
`normalise="batch"` advantages are also normalised over the rollout (Hu, 2025, "REINFORCE++", with its group baseline).
An episode is one action with one ratio, clipped as in PPO; clipping has an effect from the second optimiser step on.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from textgym.models.actor_critic import Evaluation
from textgym.models.machine.transfer import to_host

from .common.means import masked, masked_mean, per_episode, whiten
from .common.metrics import TensorMetrics
from .common.policy_gradient import Batch
from .common.rollout import Rollout
from .common.rollout_agent import Metrics
from .configs.rloo import RLOOConfig
from .configs.rollout import RolloutAgentConfig
from .objectives.prompt_groups import PromptGroupAgent


class RLOO(PromptGroupAgent):
    """REINFORCE leave-one-out; arguments as `PromptGroupAgent`."""

    config_class: ClassVar[type[RolloutAgentConfig]] = RLOOConfig
    config: RLOOConfig

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Ahmadian et al., 2024, section 3) from a rollout and the KL of its tokens."""
        config = self.config

        # 1. The return of an episode: its score minus the KL penalty of all its tokens and the costs of constraints.
        rewards = self.penalty.charge(self.constraints.charge(rollout), kl)  # (N, T)
        groups = self.compared(rewards.double().sum(1), rollout.scored)  # (groups, group_size)
        comparable = groups.comparable.flatten()  # (N,); an episode without others in its group has no baseline
        mask = rollout.response_mask & comparable[:, None]

        # 2. Advantages: the return minus the mean of the others of its prompt, the same for all tokens of an episode.
        advantages = groups.differences * groups.num_scored / (groups.num_scored - 1).clamp(min=1)
        advantages = masked(advantages.reshape(-1, 1), mask).float()  # (N, T)
        if config.normalise == "batch":  # REINFORCE++ (Hu, 2025)
            advantages = whiten(advantages, mask)

        # 3. Minibatches of whole episodes, one optimiser step each.
        [on_host] = to_host(comparable)
        steps: list[TensorMetrics] = []
        for minibatch in self.minibatches(rollout, advantages, rows=on_host.nonzero()[:, 0]):
            steps.append(self.step(minibatch))
            if config.target_kl is not None and float(steps[-1]["policy/approxkl_avg"]) > 1.5 * config.target_kl:
                break

        # 4. Metrics.
        return self.finish(steps)

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, TensorMetrics]:
        """Return the clipped surrogate with a whole episode as one action, averaged over episodes.

        L = -E[min(r A, clip(r, 1 - eps, 1 + eps) A)] with r = prod_t pi(a_t | s_t) / pi_old(a_t | s_t), so that one
        text has one ratio (Ahmadian et al., 2024, section 3).
        """
        config, mask = self.config, batch.response_mask
        log_ratio = masked(new.log_prob - batch.log_probs, mask)  # (N, T)
        ratio = log_ratio.sum(1).exp()  # (N,)
        advantages = batch.advantages[:, 0]  # (N,); all tokens of an episode share it
        plain = ratio * advantages
        clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range) * advantages
        policy_loss = -torch.minimum(plain, clipped).mean()
        entropy = per_episode(new.entropy, mask)

        with torch.no_grad():
            metrics = {
                "policy/approxkl_avg": masked_mean(log_ratio.exp() - 1 - log_ratio, mask),
                "policy/clipfrac_avg": (clipped < plain).float().mean(),
                "loss/policy_avg": policy_loss,
                "val/ratio": ratio.mean(),
                "policy/entropy_avg": masked_mean(new.entropy, mask),
            }
        return policy_loss - config.entropy_coef * entropy, metrics

    def weight(self, batch: Batch) -> int:
        """Return the number of episodes, because the loss is a mean over episodes."""
        return len(batch)
