"""KLCallback, MaskRefreshCallback and SyncReferenceCallback for SB3's algorithms."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from textgym.models.distributions.masks import ModelMask
from textgym.rewards.kl import KLController, KLPenalty, warn_of_filter
from textgym.rewards.reference import SyncReference
from textgym.sb3.log_names import LogNames
from textgym.sb3.policies import check_vocabulary, token_space
from textgym.sb3.rollout_buffer import EpisodeRolloutBuffer, warn_of_discount
from textgym.settings import Estimator


class KLCallback(BaseCallback):
    """Log metrics of text runs, and apply the KL penalty if the algorithm's buffer does not.

    Metrics at the end of each rollout, over the episodes that ended in it: `textgym/kl` (nats per episode),
    `textgym/score` (of the episodes that have a score), `textgym/unscored` (the share of the others, whose reward is
    0), `textgym/response_tokens`, `textgym/completions` (a few, as text), `textgym/kl_coef`, and the mean of each
    reward function (`textgym/reward/<name>`), of the metrics that functions log (`textgym/metric/<name>`) and of the
    number of failed functions (`textgym/reward_errors`), if there are any. SB3's tables cut long names, and end with an
    error if two are then equal; the second of them loses its middle.

    Without a reference it only logs, and the KL is that of `EpisodeRolloutBuffer` or of `kl_mode="exact"`. With a
    reference it measures the KL of each token when it is sampled, by cached decoding. With a coefficient it also
    subtracts the penalty from the rewards before the buffer stores them.

    Args:
        reference: Name, path or model of the reference.
        kl_coef: beta, in reward per nat, or a controller; with 0 the KL is only measured.
        kl_estimator: `"k1"`, `"k2"` or `"k3"`.
        kl_clamp: Clip the estimate of a token to [-kl_clamp, kl_clamp].
        num_completions: Number of completions to log.
        verbose: Verbosity of SB3's callbacks.

    Raises:
        ValueError: When training starts, if the penalty would be applied twice, or the algorithm has no log-probs.
    """

    def __init__(
        self,
        reference: str | torch.nn.Module | None = None,
        kl_coef: float | KLController = 0.0,
        kl_estimator: Estimator = "k1",
        kl_clamp: float | None = None,
        num_completions: int = 3,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if reference is None and kl_coef != 0:
            raise ValueError("kl_coef is set but there is no reference: name one, for example reference='tiny'")
        if kl_estimator == "full":
            raise ValueError("kl_estimator='full' needs whole distributions, which SB3 does not pass on: use 'k1'")
        self.reference, self.kl_coef, self.kl_estimator, self.kl_clamp = reference, kl_coef, kl_estimator, kl_clamp
        self.penalty: KLPenalty | None = None
        self.steered: BaseAlgorithm | None = None  # whose KL the controller of `penalty` has seen
        self.log_names = LogNames()
        self.pays = kl_coef != 0
        self.num_completions = num_completions
        self.scores: list[float] = []
        self.unscored: list[float] = []
        self.lengths: list[float] = []
        self.episode_kl: list[float] = []
        self.components: dict[str, list[float]] = defaultdict(list)

    def _on_training_start(self) -> None:
        self.tokens = token_space(self.model.action_space)
        self.buffer = getattr(self.model, "rollout_buffer", None)
        self.kl_so_far = np.zeros(self.training_env.num_envs)
        if not isinstance(self.buffer, EpisodeRolloutBuffer):  # that buffer has already warned
            warn_of_discount(self.model.gamma)  # type: ignore[attr-defined]  # every algorithm for tokens has one
        if self.reference is not None:
            device = self.model.device
            penalty = KLPenalty(self.reference, self.kl_coef, self.kl_estimator, self.kl_clamp, device)
            if self.penalty is not None and self.steered is self.model:  # `learn` goes on with the same algorithm
                penalty.controller = self.penalty.controller
            self.penalty, self.steered = penalty, self.model
            self._check(penalty)
        self._clear()

    def _check(self, penalty: KLPenalty) -> None:
        """Check that the penalty fits the algorithm and the environment, and is applied once."""
        if self.buffer is None:
            raise ValueError(
                f"{type(self.model).__name__} has no log-probs to measure a KL from: make the environment with "
                "kl_mode='reference', so that it applies the penalty, and use KLCallback() to log"
            )
        check_vocabulary(penalty.reference, self.tokens, "the reference")
        if self.pays and isinstance(self.buffer, EpisodeRolloutBuffer) and self.buffer.penalty is not None:
            raise ValueError(
                "the KL penalty would be applied twice, by EpisodeRolloutBuffer and by KLCallback: use one of them"
            )
        if self.pays:
            self.tokens.pay_kl("KLCallback")
            warn_of_filter(self.tokens.action_mask, self.kl_estimator)
        penalty.reference.temperature = self.tokens.temperature  # otherwise the KL of equal models would not be 0

    def _on_step(self) -> bool:
        if self.penalty is not None:
            self._charge_kl(self.penalty)
        for row in np.flatnonzero(self.locals["dones"]):
            info = self.locals["infos"][row]
            self.scores.append(info.get("score", math.nan))
            self.unscored.append(float(not info.get("scored", True)))
            for name, value in info.items():
                if name.startswith(("reward/", "metric/")) or name == "reward_errors":
                    self.components[name].append(value)
            self.lengths.append(info.get("response_tokens", math.nan))
            if self.penalty is not None:
                self.episode_kl.append(float(self.kl_so_far[row]))
                self.kl_so_far[row] = 0.0
            elif "kl" in info:
                self.episode_kl.append(info["kl"])
        return True

    def _charge_kl(self, penalty: KLPenalty) -> None:
        """Measure the KL of this step's tokens, and subtract the penalty from the rewards, in place.

        SB3 calls the callbacks before it stores the rewards in the buffer.
        """
        log_probs = self.locals["log_probs"]
        actions, masks = self.locals["actions"].reshape(-1), self.locals.get("action_masks")
        reference = penalty.reference.log_prob(self.locals["obs_tensor"], actions, masks)
        kl = penalty.of_log_probs(log_probs, reference).cpu()
        self.kl_so_far += kl.numpy()
        if self.pays:
            rewards = self.locals["rewards"]
            rewards[:] = penalty.charge(torch.from_numpy(rewards), kl).numpy()

    def _on_rollout_end(self) -> None:
        if self.penalty is None and isinstance(self.buffer, EpisodeRolloutBuffer):
            self.episode_kl = self.buffer.episode_kl
        metrics = {
            "kl": self.episode_kl,
            "score": self.scores,
            "unscored": self.unscored,
            "response_tokens": self.lengths,
            **self.components,
        }
        for name, values in metrics.items():
            known = [value for value in values if not math.isnan(value)]  # without rows that a function did not score
            if known:
                self.logger.record_mean(f"textgym/{self.log_names.of(name)}", float(np.mean(known)))
        if self.penalty is not None and self.pays and self.episode_kl:
            self.penalty.controller.update(float(np.mean(self.episode_kl)), len(self.episode_kl))
        payer = self.buffer.penalty if isinstance(self.buffer, EpisodeRolloutBuffer) else self.penalty
        if payer is not None:
            self.logger.record("textgym/kl_coef", payer.coef)
        if self.scores:
            self.logger.record("textgym/completions", self._completions())
        self._clear()

    def _completions(self) -> str:
        transcripts: list[dict[str, Any]] = self.training_env.get_attr("transcript", range(self.training_env.num_envs))
        return " | ".join(f"{t['prompt']} >{t['completion']}" for t in transcripts[: self.num_completions])

    def _clear(self) -> None:
        """Remove the metrics of the last rollout."""
        self.scores, self.unscored, self.lengths, self.episode_kl = [], [], [], []
        self.components = defaultdict(list)


class MaskRefreshCallback(BaseCallback):
    """Replace the model of the environment's mask by a copy of the policy after every `target_update_interval` updates.

    With MaskablePPO and a `TopPMask` this is NLPO (Ramamurthy et al., 2022), whose mask comes from an earlier version
    of the policy. The mask changes only between rollouts, so that training uses the masks of sampling.

    Args:
        target_update_interval: Number of updates between refreshes.
        verbose: Verbosity of SB3's callbacks.

    Raises:
        ValueError: When training starts, if the environment has no mask that depends on a model.
    """

    def __init__(self, target_update_interval: int = 20, verbose: int = 0) -> None:
        super().__init__(verbose)
        if target_update_interval < 1:
            raise ValueError(f"target_update_interval must be at least 1, got {target_update_interval}")
        self.target_update_interval = target_update_interval

    def _on_training_start(self) -> None:
        mask = token_space(self.training_env.action_space).action_mask
        if not isinstance(mask, ModelMask):
            raise ValueError(
                "the environment has no mask that depends on a model: use make_vec_env(..., "
                "action_mask=TopPMask('tiny'))"
            )
        self.mask = mask
        self.rollouts = 0

    def _on_rollout_start(self) -> None:
        if self.rollouts and self.rollouts % self.target_update_interval == 0:
            self.mask.refresh(self.model.policy.actor_critic.frozen_copy())  # type: ignore[operator,union-attr]
        self.rollouts += 1

    def _on_step(self) -> bool:
        return True


class SyncReferenceCallback(BaseCallback):
    """Move the reference of `EpisodeRolloutBuffer` towards the policy after every `every` updates.

    SB3 does not save rollout buffers, so a loaded model starts with the original reference.

    Args:
        every: Number of updates between moves.
        alpha: Weight of the policy in a move; see `textgym.SyncReference`.
        verbose: Verbosity of SB3's callbacks.

    Raises:
        ValueError: When training starts, if the algorithm's buffer has no reference.
    """

    def __init__(self, every: int, alpha: float = 1.0, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.sync = SyncReference(every, alpha)
        self.rollouts = 0

    def _on_training_start(self) -> None:
        buffer = getattr(self.model, "rollout_buffer", None)
        if not isinstance(buffer, EpisodeRolloutBuffer) or buffer.penalty is None:
            raise ValueError(
                "there is no reference to move: use EpisodeRolloutBuffer with "
                "rollout_buffer_kwargs={'reference': ..., 'kl_coef': ...}"
            )
        self.penalty = buffer.penalty

    def _on_rollout_start(self) -> None:
        if self.rollouts and self.rollouts % self.sync.every == 0:
            self.sync.sync(self.penalty, self.model.policy.actor_critic)  # type: ignore[arg-type]
        self.rollouts += 1

    def _on_step(self) -> bool:
        return True
