"""Expert iteration: fine-tune the policy on its own best texts (Anthony et al., 2017; "RAFT": Dong et al., 2023).

    textgym train --agent expert-iteration --group-size 8 --output-dir runs/expert

Of k episodes of each prompt those with the highest return (score minus KL penalty) are kept for the loss

    L = -E[log pi(a_t | s_t)], over the tokens of the kept episodes

With one kept episode this distils best-of-k. With `min_score` it is rejection-sampling fine-tuning (Gulcehre et al.,
2023, "ReST"). It does not learn from bad texts, so it is a baseline for algorithms that do.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from textgym.models.actor_critic import Evaluation
from textgym.models.machine.transfer import to_host

from .common.advantages import compare_groups
from .common.means import masked_mean, overall_mean
from .common.metrics import TensorMetrics
from .common.policy_gradient import Batch
from .common.rollout import Rollout
from .common.rollout_agent import Metrics
from .configs.expert_iteration import ExpertIterationConfig
from .configs.rollout import RolloutAgentConfig
from .objectives.prompt_groups import PromptGroupAgent


class ExpertIteration(PromptGroupAgent):
    """Expert iteration; arguments as `PromptGroupAgent`."""

    config_class: ClassVar[type[RolloutAgentConfig]] = ExpertIterationConfig
    config: ExpertIterationConfig

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Dong et al., 2023, algorithm 1) from a rollout and the KL of its tokens."""
        config = self.config

        # 1. The return of an episode: its score minus the KL penalty of all its tokens and the costs of constraints.
        rewards = self.penalty.charge(self.constraints.charge(rollout), kl)  # (N, T)
        returns = self.grouped(rewards.sum(1))  # (groups, group_size)

        # 2. Keep the best episodes of each prompt; at least two of its episodes must have a score.
        comparable = compare_groups(returns, self.grouped(rollout.scored)).comparable
        best = returns.where(comparable, -torch.inf).topk(config.keep, dim=1).indices
        kept = torch.zeros_like(comparable).scatter_(1, best, True) & comparable
        if config.min_score is not None:
            kept &= returns >= config.min_score
        kept = kept.flatten()  # (N,)
        [on_host] = to_host(kept)

        # 3. Train on them: minibatches of whole episodes, one optimiser step each. All tokens have the same weight.
        steps: list[TensorMetrics] = []
        for minibatch in self.minibatches(rollout, torch.ones_like(rewards), rows=on_host.nonzero()[:, 0]):
            steps.append(self.step(minibatch))
            if config.target_kl is not None and float(steps[-1]["policy/approxkl_avg"]) > 1.5 * config.target_kl:
                break

        # 4. Metrics, and the share of kept episodes.
        return self.finish(steps, {"val/kept": overall_mean(kept.float())})

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, TensorMetrics]:
        """Return the mean of -log pi over response tokens, minus the entropy bonus."""
        mask = batch.response_mask
        policy_loss = -masked_mean(new.log_prob, mask)
        entropy = masked_mean(new.entropy, mask)
        log_ratio = new.log_prob.detach() - batch.log_probs
        metrics = {
            "policy/approxkl_avg": masked_mean(log_ratio.exp() - 1 - log_ratio, mask),
            "loss/policy_avg": policy_loss,
            "policy/entropy_avg": entropy,
        }
        return policy_loss - self.config.entropy_coef * entropy, metrics
