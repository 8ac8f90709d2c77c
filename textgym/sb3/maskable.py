"""Policy and buffer for MaskablePPO: the same action masks in sampling, in training and in the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from textgym.models.distributions.masks import narrow
from textgym.models.token_model import Observation, TokenModel
from textgym.sb3.policies import TextObs, TextPolicy
from textgym.sb3.rollout_buffer import EpisodeRolloutBuffer

try:
    from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableDictRolloutBufferSamples
    from sb3_contrib.common.maskable.distributions import make_masked_proba_distribution
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
except ImportError as error:
    raise ImportError("MaskablePPO is in sb3-contrib: pip install 'textgym[contrib]'") from error


class MaskableTextActorCriticPolicy(TextPolicy, MaskableActorCriticPolicy):  # type: ignore[misc]  # as the other
    """Policy for MaskablePPO: `MaskablePPO(MaskableTextActorCriticPolicy, env, policy_kwargs={"model": "tiny"})`.

    The arguments are those of `TextPolicy`.
    """

    def forward(  # type: ignore[override]
        self, obs: Observation, deterministic: bool = False, action_masks: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions `(B,)`, values `(B, 1)` and log-probs `(B,)` under the masked distribution."""
        return self.act(obs, deterministic, action_masks)

    def evaluate_actions(  # type: ignore[override]
        self, obs: TextObs, actions: Tensor, action_masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values `(M, 1)`, log-probs and entropies `(M,)` under the masked distribution."""
        return self.score(obs, actions, None if action_masks is None else action_masks.bool())

    def get_distribution(self, obs: TextObs, action_masks: Any = None) -> Any:  # type: ignore[override]
        """Return sb3-contrib's maskable distribution over the next token in each state."""
        distribution = make_masked_proba_distribution(self.action_space).proba_distribution(self.next_logits(obs))
        distribution.apply_masking(action_masks)
        return distribution

    def log_prob(self, observation: Observation, action: Any, action_masks: Any = None) -> Tensor:
        """Return the log-prob `(B,)` of tokens under the masked distribution, for `attach_policy`."""
        return self.actor_critic.log_prob(observation, action, action_masks)

    def _predict(  # type: ignore[override]
        self, observation: Observation, deterministic: bool = False, action_masks: Any = None
    ) -> Tensor:
        return self.actor_critic.act(observation, deterministic, action_masks, with_value=False).action


class MaskableEpisodeRolloutBuffer(EpisodeRolloutBuffer, MaskableDictRolloutBuffer):
    """`EpisodeRolloutBuffer` for MaskablePPO. Masks are not stored but computed again when they are needed.

    They are the environment's masks: stop tokens before `min_new_tokens`, and its `action_mask`. The reference is
    masked too, so that the KL is that of two distributions over the same tokens.

    Raises:
        ValueError: In training, if the computed masks differ from those in sampling. A model from `MaskablePPO.load`
            needs the environment's action space: `load(path, env=env, action_space=env.action_space)`.
    """

    def reset(self) -> None:
        """Empty the buffer."""
        super().reset()
        self.num_allowed = np.zeros((self.buffer_size, self.n_envs), dtype=np.int32)

    def add(self, *args: Any, action_masks: np.ndarray | None = None, **kwargs: Any) -> None:
        """Add a step of all rows; of the masks only the numbers of allowed tokens are stored, for the later check."""
        self.num_allowed[self.pos] = -1 if action_masks is None else action_masks.reshape(self.n_envs, -1).sum(1)
        super().add(*args, **kwargs)

    def nbytes(self) -> int:
        """Return the size of the buffer in bytes."""
        return super().nbytes() + self.num_allowed.nbytes

    def _segment_samples(self, chosen: np.ndarray) -> Any:
        samples = super()._segment_samples(chosen)._asdict()
        return MaskableDictRolloutBufferSamples(**samples, action_masks=self._masks(chosen))  # type: ignore[arg-type]

    def _reference_log_probs(self, reference: TokenModel, chosen: np.ndarray) -> Tensor:
        sequences = self._sequences(chosen)
        return reference.state_log_probs(sequences.states(), sequences.actions, self._masks(chosen))

    def _masks(self, chosen: np.ndarray) -> Tensor | None:
        """Return bool `(M, V)` for the tokens of these segments; `None` if the algorithm does not use masks."""
        num_allowed = self.to_torch(self.num_allowed[self._where(chosen)])  # in sampling
        if bool((num_allowed < 0).any()):
            return None
        sequences = self._sequences(chosen)
        masks = self.tokens.stop.allowed(sequences.steps[1], int(self.tokens.n))
        if self.tokens.action_mask is not None:
            masks = narrow(masks, self.tokens.action_mask.of_sequences(sequences))
        # A packed pass rounds differently from decoding, so a token at the boundary of a model's mask may be in one
        # mask and not in the other. The sampled token was allowed, and small differences are not errors.
        masks[torch.arange(len(masks), device=masks.device), sequences.actions] = True
        differs = ((masks.sum(1) - num_allowed).abs() > 1 + 0.01 * num_allowed).float().mean()
        if differs > 0.01:
            raise ValueError(
                f"{differs:.0%} of the action masks are not those that were acted under. Masks come from the "
                "environment's min_new_tokens and action_mask; they must depend only on the context, and be refreshed "
                "only between rollouts. After MaskablePPO.load pass action_space=env.action_space as well"
            )
        return masks
