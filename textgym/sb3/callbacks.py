"""KLCallback, MaskRefreshCallback and SyncReferenceCallback: what SB3's algorithms leave to callbacks."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from textgym.models.distributions.masks import ModelMask
from textgym.rewards.kl import Estimator, KLController, KLPenalty, warn_of_filter
from textgym.rewards.reference import SyncReference
from textgym.sb3.policies import check_vocabulary, token_space
from textgym.sb3.rollout_buffer import EpisodeRolloutBuffer, warn_of_discount


class KLCallback(BaseCallback):
    """Logs what a text run is judged by, and pays the KL where the algorithm's own buffer does not.

    Logged at the end of each rollout, of the episodes that ended in it: `textgym/kl` (nats an episode),
    `textgym/score` (of the episodes that have one), `textgym/unscored` (the share of the others, which were paid 0),
    `textgym/response_tokens`, `textgym/completions` (a few, as text), `textgym/kl_coef`, and the mean of each reward
    function (`textgym/reward/<name>`), of what functions log (`textgym/metric/<name>`) and of failures
    (`textgym/reward_errors`), where there are any.

    Without a reference it only logs; the KL is then the one that `EpisodeRolloutBuffer` or `kl_mode="exact"` measured.
    With one it measures the KL of each token as it is sampled, by cached decoding; with a coefficient it also takes the
    penalty off the rewards, before they reach the buffer.

    Args:
        reference: name, path or model that the KL is measured to.
        kl_coef: beta, in reward a nat, or a controller; 0 measures only.
        kl_estimator: `"k1"`, `"k2"` or `"k3"`.
        kl_clamp: the estimate of a token is cut to -kl_clamp and kl_clamp.
        num_completions: how many completions to log.
        verbose: as of every SB3 callback.

    Raises:
        ValueError: when training starts, if the KL would be paid twice, or the algorithm has no log-probs to pay from.
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
        if not isinstance(self.buffer, EpisodeRolloutBuffer):  # which has said so itself
            warn_of_discount(self.model.gamma)  # type: ignore[attr-defined]  # every algorithm for tokens has one
        if self.reference is not None:
            device = self.model.device
            self.penalty = KLPenalty(self.reference, self.kl_coef, self.kl_estimator, self.kl_clamp, device)
            self._check(self.penalty)
        self._forget()

    def _check(self, penalty: KLPenalty) -> None:
        if self.buffer is None:
            raise ValueError(
                f"{type(self.model).__name__} has no log-probs to measure a KL from: let the environment pay it, with "
                "kl_mode='reference', and use KLCallback() to log"
            )
        check_vocabulary(penalty.reference, self.tokens, "the reference")
        if self.pays and isinstance(self.buffer, EpisodeRolloutBuffer) and self.buffer.penalty is not None:
            raise ValueError("the KL would be paid twice, by EpisodeRolloutBuffer and by KLCallback: give one of them")
        if self.pays:
            self.tokens.pay_kl("KLCallback")
            warn_of_filter(self.tokens.action_mask, self.kl_estimator)
        penalty.reference.temperature = self.tokens.temperature  # one temperature on both sides

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
        """Measure the KL of this step's tokens, and charge it to the rewards, which SB3 stores after the callbacks."""
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
        figures = {
            "kl": self.episode_kl,
            "score": self.scores,
            "unscored": self.unscored,
            "response_tokens": self.lengths,
            **self.components,
        }
        for name, values in figures.items():
            given = [value for value in values if not math.isnan(value)]  # a function may leave rows out
            if given:
                self.logger.record_mean(f"textgym/{name}", float(np.mean(given)))
        if self.penalty is not None and self.pays and self.episode_kl:
            self.penalty.controller.update(float(np.mean(self.episode_kl)), len(self.episode_kl))
        payer = self.buffer.penalty if isinstance(self.buffer, EpisodeRolloutBuffer) else self.penalty
        if payer is not None:
            self.logger.record("textgym/kl_coef", payer.coef)
        if self.scores:
            self.logger.record("textgym/completions", self._completions())
        self._forget()

    def _completions(self) -> str:
        transcripts: list[dict[str, Any]] = self.training_env.get_attr("transcript", range(self.training_env.num_envs))
        return " | ".join(f"{t['prompt']} >{t['completion']}" for t in transcripts[: self.num_completions])

    def _forget(self) -> None:
        self.scores, self.unscored, self.lengths, self.episode_kl = [], [], [], []
        self.components = defaultdict(list)


class MaskRefreshCallback(BaseCallback):
    """Lets the environment's mask go by the policy as it is after every so many updates.

    With MaskablePPO and a `TopPMask` this is NLPO (Ramamurthy et al., 2022): a mask by what the policy was a while ago
    keeps it from tokens it has left. Refreshed between rollouts alone, so that a rollout is trained on under the masks
    that it was sampled under.

    Args:
        target_update_interval: updates from one refresh to the next.
        verbose: as of every SB3 callback.

    Raises:
        ValueError: when training starts, if the environment has no mask that goes by a model.
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
                "the environment has no mask that goes by a model: make_vec_env(..., action_mask=TopPMask('tiny'))"
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
    """Moves the reference of `EpisodeRolloutBuffer` towards the policy after every so many updates.

    SB3 saves no buffers, so a model that is loaded begins with the reference that it was made with.

    Args:
        every: updates from one move to the next.
        alpha: how far to go; see `textgym.SyncReference`.
        verbose: as of every SB3 callback.

    Raises:
        ValueError: when training starts, if the algorithm's buffer has no reference.
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
