"""Natural language policy optimisation: PPO with a top-p action mask (Ramamurthy et al., 2022).

    textgym train --agent nlpo --output-dir runs/nlpo

Tokens are sampled from the nucleus of a masking policy, which is the policy of at most `mask_update_interval` updates
ago: the smallest set of tokens with total probability `top_p`, and at least `min_tokens_to_keep` tokens. So the policy
explores only among tokens that were likely. Behaviour log-probs, ratios and the KL are those of the masked
distributions, for policy and reference. Everything else is PPO, see ppo.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic, Evaluation, PolicyLike
from textgym.models.distributions.masks import TopPMask, narrow
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.rewards.kl import warn_of_filter

from .common.policy_gradient import Batch
from .common.rollout import Rollout, collect
from .common.rollout_agent import Metrics
from .configs.ppo import NLPOConfig
from .configs.rollout import RolloutAgentConfig
from .ppo import PPO

CHUNK = 64
"""Number of episodes whose masks are in memory at a time when the KL is measured."""


class NLPO(PPO):
    """PPO within the nucleus of a masking policy; arguments as `RolloutAgent`."""

    config_class: ClassVar[type[RolloutAgentConfig]] = NLPOConfig
    config: NLPOConfig

    def __init__(self, policy: PolicyLike, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        if self.penalty.estimator == "full":
            raise ConfigError(
                "kl_estimator='full' is over all tokens, and NLPO estimates the KL from tokens that it samples within "
                "the mask: use kl_estimator='k1'"
            )
        self.mask = TopPMask(self.policy.frozen_copy(), self.config.top_p, self.config.min_tokens_to_keep)
        if self.penalty.coef > 0 and self.config.top_p < 1:
            warn_of_filter(self.mask, self.penalty.estimator)

    def collect(self) -> Rollout:
        """Collect one episode of each prompt of a round, within the mask."""
        return collect(self.envs, self.policy, self.episode_options(), action_mask=self.mask)

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL of the masked distributions of policy and reference, `(N, T)`."""
        reference = self.masked_log_probs(self.penalty.reference, rollout)
        return self.penalty.of_log_probs(rollout.log_probs, reference, rollout.response_mask)

    def new_log_probs(self, rollout: Rollout) -> Tensor:
        """Return the log-probs `(N, T)` of a rollout under the current policy, within the mask."""
        return self.masked_log_probs(self.policy, rollout)

    def masked_log_probs(self, model: TokenModel, rollout: Rollout) -> Tensor:
        """Return a model's log-probs `(N, T)` of a rollout, normalised over the allowed tokens."""
        log_probs = torch.zeros_like(rollout.log_probs)
        for rows in torch.arange(len(rollout), device=log_probs.device).split(CHUNK):
            sequences = rollout.sequences[rows]
            flat = model.state_log_probs(sequences.states(), sequences.actions, self.allowed(sequences))
            log_probs[rows, : sequences.response_mask.shape[1]] = sequences.pad(flat)
        return log_probs

    def evaluate(self, policy: ActorCritic, batch: Batch) -> Evaluation:
        """Evaluate a batch with a policy within the mask, with gradients, so that ratios start at 1."""
        sequences = batch.sequences
        allowed = self.allowed(sequences)  # outside of autocast, because sampling computed the mask without it
        with torch.autocast(batch.advantages.device.type, torch.bfloat16, enabled=self.config.bf16):
            new = policy.evaluate_states(sequences.states(), sequences.actions, allowed)
        return Evaluation(*(sequences.pad(x) for x in new[:3]))

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update of PPO, and refresh the mask in intervals (Ramamurthy et al., 2022, algorithm 1)."""
        metrics = super().update(rollout, kl)
        interval = self.config.mask_update_interval
        if interval is not None and (self.updates + 1) % interval == 0:
            self.mask.refresh(self.policy.frozen_copy())
        return metrics

    def frozen_models(self) -> dict[str, TokenModel]:
        """Return the frozen models, with the masking policy, for a checkpoint."""
        return {**super().frozen_models(), "mask": self.mask.model}

    def take_frozen_model(self, name: str, model: TokenModel) -> None:
        """Restore a model of `frozen_models`."""
        if name == "mask":
            self.mask.refresh(model)
        else:
            super().take_frozen_model(name, model)

    @torch.no_grad()
    def allowed(self, sequences: Sequences) -> Tensor:
        """Return the allowed tokens at each response token, bool `(M, V)`, computed again.

        A packed pass rounds differently from decoding, so a token at the boundary may be in one of the masks and not
        in the other. Sampled tokens are always allowed.
        """
        masks = self.mask.of_sequences(sequences)
        masks = narrow(sequences.stop.allowed(sequences.steps[1], masks.shape[1]), masks)
        masks[torch.arange(len(masks), device=masks.device), sequences.actions] = True
        return masks
