"""Group relative policy optimisation (Shao et al., 2024) and its descendants.

    textgym train --agent grpo --output-dir runs/grpo

    A_i = (R_i - mean of its prompt's group) / (standard deviation of the group + 1e-4)

for all tokens of episode i, in PPO's clipped surrogate without a critic. Mean and standard deviation are over the
episodes that have a score. If all returns of a group are equal, its advantages are 0, and only KL and entropy in the
loss have a gradient; the share of these groups is a metric. A group with fewer than two scores is left out.

| method | settings |
| --- | --- |
| GRPO (Shao et al., 2024) | `loss_type="grpo"` |
| Dr. GRPO (Liu et al., 2025) | `loss_type="dr_grpo"`, `scale="none"` |
| DAPO (Yu et al., 2025) | `clip_range_high=0.28`, `dynamic_sampling`, `overlong_buffer` |
| GSPO (Zheng et al., 2025) | `ratio="sequence"`, `loss_type="grpo"`, `clip_range=3e-4`, `clip_range_high=4e-4` |
| CISPO (MiniMax, 2025) | `surrogate="cispo"` |
| GDPO (Liu et al., 2026) | `scale="each"` |

`scale="none"` does not divide by the standard deviation, because this division gives more weight to prompts that are
almost always or almost never solved.

The KL penalty is part of the reward, as in all other agents, or of the loss with `kl_in="loss"`. The KL of the
objective is that of whole texts, E[sum_t KL(pi(. | s_t), pi_ref(. | s_t))], and its gradient has a part for the states
that a token leads to. Of the choices of `kl_gradient`, "sequence" has all of it, if all tokens have the same weight,
which they do not have with `loss_type="grpo"` and unequal lengths. "token" has the gradient of each state's
KL(pi, pi_ref) without that part, and "k3" that of each state's KL(pi_ref, pi). The mean of a group includes the episode
itself, so the gradient of the score is 1 - 1/k of the true gradient in groups of k, and a KL in the loss has a larger
relative weight.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from textgym.errors import ConfigError
from textgym.models.actor_critic import Evaluation, PolicyLike
from textgym.models.machine.transfer import to_host

from .common.means import masked, masked_mean, overall_mean
from .common.metrics import TensorMetrics
from .common.policy_gradient import Batch
from .common.rollout import Rollout, merge
from .common.rollout_agent import Metrics
from .configs.grpo import GRPOConfig
from .configs.rollout import RolloutAgentConfig
from .machine.distributed import everyone, sum_over_processes
from .objectives.prompt_groups import PromptGroupAgent

SAME_ENTROPY = 1e-5
"""Nats by which float32 rounds the entropy of one state differently at most, with room to spare."""


class GRPO(PromptGroupAgent):
    """Group relative policy optimisation; arguments as `PromptGroupAgent`."""

    config_class: ClassVar[type[RolloutAgentConfig]] = GRPOConfig
    config: GRPOConfig

    def __init__(self, policy: PolicyLike, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        if self.config.kl_in == "loss":
            self.refuse_clamp()
        buffer, longest = self.config.overlong_buffer, self.base_env.max_new_tokens
        if buffer is not None and buffer > longest:
            raise ConfigError(
                f"overlong_buffer={buffer} is more than the max_new_tokens={longest} of the environment, so the first "
                f"token would already be penalised: set it to a part of them, such as {max(1, longest // 5)}"
            )
        if self.config.scale == "each":
            self.refuse_changed_sums()

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Shao et al., 2024, algorithm 1) from a rollout and the KL of its tokens."""
        config, mask = self.config, rollout.training_mask

        # 1. The return of an episode: its score and the costs of constraints and length, minus the KL penalty of all
        #    its tokens unless the loss has it.
        rewards = self.constraints.charge(rollout)  # (N, T)
        if config.kl_in == "reward":
            rewards = self.penalty.charge(rewards, kl)
        returns = rewards.double().sum(1) - self.overlong(rollout.sequences.response_lengths)  # (N,)
        groups = self.compared(returns, rollout.scored)  # (groups, group_size)

        # 2. Advantages: the return minus the group's mean, the same for all tokens of an episode; 1e-4 as in TRL.
        # Below 1e-6 returns differ by the rounding of the KL alone, which the division by 1e-4 would make a thousandth.
        informative = groups.informative & (groups.standard_deviation > 1e-6)  # (groups, 1)
        advantages = masked(groups.differences, informative)
        if config.scale == "group":
            advantages = advantages / (groups.standard_deviation + 1e-4)
        if config.scale == "each":
            advantages = self.of_each_reward(rollout, groups.comparable)
        advantages = masked(advantages.reshape(-1, 1), mask).float()  # (N, T)
        corrections: TensorMetrics = {}
        if config.importance_cap is not None:
            rollout, advantages, corrections = self.corrected(rollout, advantages, config.importance_cap)
        if config.entropy_share < 1:
            advantages = masked(advantages, self.high_entropy(rollout))

        # 3. Episodes with advantage 0 count in the means of the loss: otherwise the gradient of the others would grow
        #    with their number. If nothing else in the loss has a gradient, they need no pass.
        unknown = self.unknown_reward(rollout) if config.scale == "each" else torch.zeros((), device=mask.device)
        [comparable, different, unknown] = to_host(groups.comparable.flatten(), (advantages != 0).any(1), unknown)
        self.refuse_unknown_reward(float(unknown))
        alone = self.reference_log_probs is None and config.entropy_coef == 0 and config.loss_type != "bnpo"
        with_gradient = different if alone else None

        # 4. Minibatches of whole episodes, one optimiser step each.
        steps: list[TensorMetrics] = []
        rows = comparable.nonzero()[:, 0]
        for minibatch in self.minibatches(rollout, advantages, rows=rows, with_gradient=with_gradient):
            steps.append(self.step(minibatch))
            if config.target_kl is not None and float(steps[-1]["policy/approxkl_avg"]) > 1.5 * config.target_kl:
                break

        # 5. Metrics, and the share of the groups whose returns are equal.
        return self.finish(steps, {"frac_reward_zero_std": 1 - overall_mean(informative.float()), **corrections})

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, TensorMetrics]:
        """Return the clipped surrogate (Shao et al., 2024, equation 3), a sum over tokens weighted by `weights`."""
        config, mask = self.config, batch.response_mask
        weights = self.weights(batch)  # (N, T)

        # 1. The importance ratio of each token, or the geometric mean of an episode's (Zheng et al., 2025, equation 7).
        log_ratio = masked(new.log_prob - batch.log_probs, mask)  # (N, T)
        ratio = log_ratio.exp()
        if config.ratio == "sequence":
            mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
            ratio = torch.where(mask, mean.exp(), 1.0)

        # 2. PPO's clipped surrogate; DAPO's clip-higher has another bound above 1 (Yu et al., 2025, section 3.1).
        #    CISPO is the policy gradient of every token, times its clipped ratio (MiniMax, 2025, equation 4).
        high = config.clip_range if config.clip_range_high is None else config.clip_range_high
        plain = ratio * batch.advantages
        if config.surrogate == "cispo":
            clipped = ratio.clamp(max=1 + high) * batch.advantages
            objective = clipped.detach() * masked(new.log_prob, mask)
        else:
            clipped = ratio.clamp(1 - config.clip_range, 1 + high) * batch.advantages
            objective = torch.minimum(plain, clipped)
        policy_loss = (weights * -objective).sum()

        # 3. Entropy bonus; the entropy has no gradient if its coefficient is 0.
        loss = policy_loss - config.entropy_coef * (weights * masked(new.entropy, mask)).sum()

        with torch.no_grad():
            metrics = {
                "policy/approxkl_avg": masked_mean(log_ratio.exp() - 1 - log_ratio, mask),
                "policy/clipfrac_avg": masked_mean((clipped < plain).float(), mask),
                "loss/policy_avg": policy_loss,
                "val/ratio": masked_mean(ratio, mask),
                "policy/entropy_avg": masked_mean(new.entropy, mask),
            }

        # 4. The KL to the reference, if it is part of the loss and not of the reward.
        if batch.reference_log_probs is not None:
            kl = self.kl_to_reference(new, batch, config.kl_gradient)  # (N, T)
            loss = loss + self.penalty.coef * (weights * kl).sum()
            metrics["loss/kl_avg"] = (weights * kl).sum()
        return loss, metrics

    def play(self) -> Rollout:
        """Collect the episodes of an update; replace groups whose scores are all equal (Yu et al., 2025, section 3.2).

        They have no gradient, so without them every update learns from the same number of groups. If the last round
        has too few others, some stay.
        """
        rollout = super().play()
        for _ in range(self.config.dynamic_sampling or 0):
            flat = self.flat_groups(rollout)
            missing = everyone(int(flat.sum()))
            if not any(missing):
                break
            prompts = self.next_prompts(missing)  # in all processes, which take their prompts in one order
            if not len(prompts):
                continue
            further = self.episodes_of(prompts)
            rows = torch.arange(len(rollout) + len(further)).view(-1, self.config.group_size)  # of both rollouts
            first, second = rows[: len(flat)], rows[len(flat) :]
            order = torch.cat([first[~flat], second[~self.flat_groups(further)], first[flat]])
            rollout = merge([rollout, further])[order[: len(flat)].flatten()]
        return rollout

    def overlong(self, lengths: Tensor) -> Tensor:
        """Return what responses of these lengths `(N,)` pay in the last tokens before the maximum length, `(N,)`.

        With a buffer of B tokens and the maximum length L it is the penalty times (length - (L - B)) / B, at least 0
        (Yu et al., 2025, equation 13).
        """
        return self.config.overlong_penalty * self.beyond(lengths)

    def beyond(self, lengths: Tensor) -> Tensor:
        """Return the share of the overlong buffer that responses of these lengths use, `(N,)`; 0 without a buffer."""
        buffer = self.config.overlong_buffer
        if buffer is None:
            return torch.zeros_like(lengths, dtype=torch.float64)
        beyond = (lengths - (self.base_env.max_new_tokens - buffer)).clamp(min=0)
        return beyond.double() / buffer

    def of_each_reward(self, rollout: Rollout, comparable: Tensor) -> Tensor:
        """Return advantages `(groups, group_size)` in which each reward function has its own unit (Liu et al., 2026).

        A_i = sum_k w_k (r_ik - mean of the group) / (standard deviation of the group + 1e-4) for the rewards k of
        `all_rewards`, then normalised over the rollout. A function that did not score a row has no part in its
        advantage.
        """
        total = torch.zeros(comparable.shape, dtype=torch.float64, device=comparable.device)
        for column, weight in self.all_rewards(rollout):
            groups = self.compared(column, rollout.scored & ~column.isnan())
            total += weight * groups.differences / (groups.standard_deviation + 1e-4)
        count = sum_over_processes(comparable.sum())
        # The mean of whole groups is 0 up to rounding, which would give equal scores an advantage.
        mean, size = overall_mean(total, comparable), overall_mean(total.abs(), comparable)
        mean = torch.where(mean.abs() > 1e-12 * size, mean, 0.0)
        difference = masked(total - mean, comparable)
        variance = overall_mean(difference.square(), comparable) * count / (count - 1).clamp(min=1)
        return difference / (variance.sqrt() + 1e-4)

    def all_rewards(self, rollout: Rollout) -> list[tuple[Tensor, float]]:
        """Return what an episode is paid for, `(N,)` each and NaN where it is unknown, and the weight of each.

        These are the reward functions, and with negative weights the costs of constraints, which have their multipliers
        as weights, and a missing end and the share of the overlong buffer that is used, which have their penalties.
        """
        rewards = self.parts_of_score(rollout)
        for name, multiplier in self.constraints.multipliers.items():
            rewards.append((rollout.component(f"reward/{name}"), -multiplier))
        rewards.append((self.beyond(rollout.sequences.response_lengths), -self.config.overlong_penalty))
        return [(column, weight) for column, weight in rewards if weight != 0]

    def parts_of_score(self, rollout: Rollout) -> list[tuple[Tensor, float]]:
        """Return the parts of the environment's score, `(N,)` each and NaN where it is unknown, and their weights."""
        scorer, missing_eos_penalty = self.base_env.scorer, self.base_env.missing_eos_penalty
        rewards = [
            (rollout.component(f"reward/{name}"), weight)
            for name, weight in zip(scorer.names, scorer.weights, strict=True)
        ]
        return [*rewards, ((~rollout.ended_by_stop).double(), -missing_eos_penalty)]

    def unknown_reward(self, rollout: Rollout) -> Tensor:
        """Return the reward in the scores of all processes that is none of `parts_of_score`, 0 up to rounding, `()`."""
        parts = self.parts_of_score(rollout)
        paid = torch.stack([masked(weight * column, ~column.isnan()) for column, weight in parts])  # (K, N)
        unknown = masked(rollout.scores - paid.sum(0), rollout.scored).abs()
        rounding = 1e-4 * (1 + paid.abs().sum(0))
        return sum_over_processes(masked(unknown, unknown > rounding).sum())

    def refuse_unknown_reward(self, unknown: float) -> None:
        """Raise an error, in all processes, if `unknown_reward` found any."""
        if unknown > 0:
            raise ConfigError(
                f"scale='each' normalises each reward function alone, and a wrapper changes scores, by {unknown:.4g} "
                "in one rollout: make its reward a reward function, or use another scale"
            )

    def refuse_changed_sums(self) -> None:
        """Raise an error if the score is more than the sum of the reward functions.

        `scale="each"` does not form that sum.
        """
        if self.config.kl_in == "reward" and self.penalty.coef > 0:
            raise ConfigError(
                "scale='each' normalises each reward function alone, and the KL in the reward is not one of them: set "
                "kl_in='loss', or kl_coef=0 in the environment"
            )
        scale = self.base_env.scorer.scale
        for name, value in (("score_scaling", scale.scaling), ("score_clip", scale.clip)):
            if value is not None:
                raise ConfigError(
                    f"scale='each' normalises each reward function alone, and {name}={value!r} changes their sum: "
                    "leave one of them out"
                )

    @torch.no_grad()
    def high_entropy(self, rollout: Rollout) -> Tensor:
        """Return the tokens that `entropy_share` keeps, bool `(N, T)` (Wang et al., 2025, equation 5).

        Entropies are those of the policy that sampled, so every minibatch has the same threshold. Tokens in one state,
        such as the first ones of a group, have one entropy up to rounding, and are kept or left out together.
        """
        mask = rollout.training_mask
        _, entropy = self.policy.score_sequences(rollout.sequences)  # (N, T)
        known = torch.cat(everyone(entropy[mask].cpu()))
        threshold = known.quantile(1 - self.config.entropy_share).to(entropy.device)
        return mask & (entropy >= threshold - SAME_ENTROPY)

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL estimate of every token; store the reference's log-probs if the loss needs them too."""
        if self.config.kl_in == "reward":
            return super().measure_kl(rollout)
        return self.measure_kl_for_loss(rollout, self.config.kl_gradient, self.config.group_size)

    def weights(self, batch: Batch) -> Tensor:
        """Return the weight of each token in the loss, `(N, T)`."""
        mask, kind = batch.response_mask, self.config.loss_type
        if kind == "grpo":
            return mask / mask.sum(1, keepdim=True) / len(batch)
        if kind == "dr_grpo":
            return mask / (len(batch) * self.base_env.max_new_tokens)
        return mask / mask.sum()

    def weight(self, batch: Batch) -> int:
        """Return the number of tokens for "dapo", whose loss is a token mean, and of episodes for the others."""
        return super().weight(batch) if self.config.loss_type == "dapo" else len(batch)
