"""Online DPO: direct preference optimisation on pairs that the policy has just generated (Guo et al., 2024).

    textgym train --agent online-dpo --group-size 2 --output-dir runs/online

Of k episodes of each prompt the one with the highest score, y+, is preferred to the one with the lowest, y-:

    L = -E[log sigmoid(beta (log pi(y+) / pi_ref(y+) - log pi(y-) / pi_ref(y-)))]

This is algorithm 1 of Guo et al. (2024, arXiv:2402.04792) with the environment's reward functions as annotators; they
compare k = 2 responses. Prompts whose scores are all equal, or of which fewer than two episodes have a score, are left
out. Beta is the environment's `kl_coef`: the loss has the KL penalty, so the reward has none.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic, Evaluation, PolicyLike
from textgym.models.machine.transfer import to_host
from textgym.rewards.models.accuracy import in_order

from .common.means import masked, masked_mean, overall_mean
from .common.metrics import TensorMetrics
from .common.policy_gradient import Batch, exchanged
from .common.rollout import Rollout
from .common.rollout_agent import Metrics
from .configs.dpo import DPOConfig, OnlineDPOConfig
from .configs.rollout import RolloutAgentConfig
from .dpo import preference_loss
from .machine.distributed import concatenated
from .objectives.prompt_groups import PromptGroupAgent


class OnlineDPO(PromptGroupAgent):
    """Online DPO; arguments as `PromptGroupAgent`.

    Raises:
        ConfigError: If the environment's `kl_coef`, which is beta, is 0, or if it has a `kl_clamp`.
    """

    config_class: ClassVar[type[RolloutAgentConfig]] = OnlineDPOConfig
    config: OnlineDPOConfig
    episodes_at_rollout: Batch  # those of all processes, which share the minibatches; N in all
    rejected: Tensor  # (N,): for each preferred episode the index of the other one, for all others their own
    probability: Tensor  # (N,): of the label of each preferred episode

    def __init__(self, policy: PolicyLike, envs: object, config: object = None) -> None:
        super().__init__(policy, envs, config)
        if self.penalty.coef == 0:
            raise ConfigError("beta of online DPO is the environment's kl_coef, which is 0: set one above 0")
        self.refuse_clamp()

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Guo et al., 2024, algorithm 1) from a rollout and the KL of its tokens."""
        config = self.config

        # 1. The score of an episode, less the costs of constraints; the loss has the KL penalty.
        scores = self.constraints.charge(rollout).double().sum(1)  # (N,)
        groups = self.compared(scores, rollout.scored)  # (groups, group_size)

        # 2. Of each prompt the best and the worst episode are a pair, unless all scores are equal.
        differences = groups.differences
        best = differences.where(groups.comparable, -torch.inf).argmax(1, keepdim=True)  # (groups, 1)
        worst = differences.where(groups.comparable, torch.inf).argmin(1, keepdim=True)
        first = torch.arange(len(differences), device=best.device)[:, None] * config.group_size
        rows = torch.arange(len(rollout), device=best.device)
        rejected = self.grouped(rows).scatter(1, best, first + worst).flatten()
        indices = self.indices_of(rollout)
        self.rejected = concatenated(indices[rejected])
        self.probability = concatenated((scores - scores[rejected]).sigmoid().float())
        preferred = torch.zeros_like(groups.comparable).scatter(1, best, groups.informative).flatten()  # (N,)

        # 3. Minibatches of pairs, one optimiser step each. The sign of an episode's advantage says which side it is.
        signs = torch.zeros_like(scores).scatter(0, rejected[preferred], -1.0).masked_fill(preferred, 1.0)
        advantages = masked(signs[:, None], rollout.response_mask).float()  # (N, T)
        columns = (rollout.log_probs, rollout.values, advantages, torch.zeros_like(advantages))
        episodes = Batch(rollout.sequences, *columns, indices, reference_log_probs=self.reference_log_probs)
        self.episodes_at_rollout, _ = exchanged(episodes, torch.arange(len(rollout)))
        [on_host] = to_host(preferred)
        steps: list[TensorMetrics] = []
        for minibatch in self.minibatches(rollout, advantages, rows=on_host.nonzero()[:, 0]):
            steps.append(self.step(minibatch))
            if config.target_kl is not None and float(steps[-1]["policy/approxkl_avg"]) > 1.5 * config.target_kl:
                break

        # 4. Metrics, and the share of the prompts whose scores are equal.
        return self.finish(steps, {"frac_reward_zero_std": 1 - overall_mean(groups.informative.float())})

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, TensorMetrics]:
        """Return DPO's loss of the pairs (Rafailov et al., 2023, equation 7), a mean over pairs.

        Args:
            new: Evaluation of the preferred episodes of `batch`, followed by the other side of each.
            batch: The preferred episodes.
        """
        config, both = self.config, self.both_sides(batch)
        mask, beta = both.response_mask, self.penalty.coef
        assert both.reference_log_probs is not None

        # 1. The implicit reward of an episode: beta (log pi - log pi_ref), summed over its tokens.
        sums = masked(new.log_prob, mask).sum(1)  # (2P,)
        log_ratios = sums - masked(both.reference_log_probs, mask).sum(1)
        chosen, rejected = log_ratios.chunk(2)  # (P,) each

        # 2. The loss of each pair.
        one, other = mask.sum(1).chunk(2)
        p = self.probability[batch.indices] if config.use_probability else torch.ones_like(chosen)
        settings = DPOConfig(beta=beta, loss=config.loss, label_smoothing=config.label_smoothing)
        policy_loss = preference_loss(chosen, rejected, (one, other), p, settings)

        # 3. Entropy bonus, and metrics.
        entropy = masked_mean(new.entropy, mask)
        with torch.no_grad():
            log_ratio = masked(new.log_prob - both.log_probs, mask)
            metrics = {
                "policy/approxkl_avg": masked_mean(log_ratio.exp() - 1 - log_ratio, mask),
                "loss/policy_avg": policy_loss,
                "policy/entropy_avg": entropy,
                "rewards/chosen": beta * chosen.mean(),
                "rewards/rejected": beta * rejected.mean(),
                "rewards/margins": beta * (chosen - rejected).mean(),
                "rewards/accuracies": in_order(chosen - rejected).mean(),
            }
        return policy_loss - config.entropy_coef * entropy, metrics

    def evaluate(self, policy: ActorCritic, batch: Batch) -> Evaluation:
        """Evaluate both sides of the pairs of a batch, with gradients."""
        return super().evaluate(policy, self.both_sides(batch))

    def both_sides(self, batch: Batch) -> Batch:
        """Return the preferred episodes of a batch, followed by the other side of each."""
        [rows] = to_host(torch.cat([batch.indices, self.rejected[batch.indices]]))
        return self.episodes_at_rollout[rows]

    def weight(self, batch: Batch) -> int:
        """Return the number of pairs, because the loss is a mean over pairs."""
        return len(batch)

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL estimate of every token, and store the reference's log-probs for the loss."""
        return self.measure_kl_for_loss(rollout, "token")
