"""TopKActions: a small action space that consists of the most likely tokens."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from textgym.envs.interface import TextProperties
from textgym.envs.spaces import as_action, as_actions
from textgym.envs.text_task import Policy
from textgym.models.token_model import Observation, TokenModel
from textgym.wrappers.views import VectorView, View, model_or_reference


class TopKActions(View, gym.utils.RecordConstructorArgs):
    """Wrapper whose action i is the i-th most likely allowed token under a language model: `Discrete(k)`.

    Stop tokens are no candidates before `min_new_tokens`. The KL penalty is computed over the whole vocabulary. The
    environment applies it, in `kl_mode="reference"` or, after `attach_policy`, in `"exact"`. With `"deferred"` the
    agent would have to apply it, which is impossible, because the agent does not see tokens.

    Args:
        env: A `TextEnv`, with any wrappers.
        k: Number of actions.
        model: Name, path or model that ranks the tokens; the default is the environment's reference, which then encodes
            each token only once for both purposes.

    Raises:
        ValueError: If `k` is larger than the vocabulary, there is no model, or `kl_mode` is `"deferred"`.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import TopKActions
    >>> env = TopKActions(gym.make("textgym/Sentiment-v0", max_new_tokens=3), k=4)
    >>> observation, info = env.reset(seed=0, options={"prompt_index": 0})
    >>> for _ in range(3):
    ...     observation, reward, terminated, truncated, info = env.step(0)  # the most likely token
    >>> terminated, env.action_masks().tolist()
    (True, [True, True, True, True])
    """

    def __init__(self, env: gym.Env[Any, Any], k: int, model: str | nn.Module | TokenModel | None = None) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, k=k, model=model)
        super().__init__(env)
        self.candidates = Candidates(self.base_env, k, model_or_reference(model, self.base_env, "TopKActions"))
        self.action_space = gym.spaces.Discrete(k)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        observation, info = super().reset(seed=seed, options=options)
        self.candidates.forget()
        return observation, self._with_mask(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Append the candidate with this rank."""
        token = int(self.candidates.at(as_action(action, self.base_env.device))[0])
        observation, reward, terminated, truncated, info = super().step(token)
        self.candidates.forget()
        return observation, reward, terminated, truncated, self._with_mask(info)

    def action_masks(self) -> np.ndarray:
        """Return a bool array `(k,)`, with false at the end if fewer than k tokens are allowed."""
        return self.candidates.masks()[0].cpu().numpy()

    def translate(self, policy: Policy) -> Policy:
        """Return a policy over tokens for a policy over ranks."""
        return _RankPolicy(policy, self.candidates)

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "action_mask": self.action_masks().astype(np.int8)} if "action_mask" in info else info


class VectorTopKActions(VectorView):
    """Version of `TopKActions` for a `TextVectorEnv`; the model runs once per step for all rows.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import VectorTopKActions
    >>> envs = VectorTopKActions(gym.make_vec("textgym/Sentiment-v0", num_envs=2), k=4)
    >>> observations, infos = envs.reset(seed=0)
    >>> observations, rewards, terminated, truncated, infos = envs.step([0, 3])
    >>> envs.action_space, envs.action_masks().shape
    (MultiDiscrete([4 4]), (2, 4))
    """

    def __init__(
        self, env: VectorEnv[Any, Any, Any], k: int, model: str | nn.Module | TokenModel | None = None
    ) -> None:
        super().__init__(env)
        self.candidates = Candidates(self.base_env, k, model_or_reference(model, self.base_env, "VectorTopKActions"))
        self.single_action_space = gym.spaces.Discrete(k)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start episodes."""
        observation, infos = super().reset(seed=seed, options=options)
        self.candidates.forget()
        return observation, self._with_mask(infos)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Append the candidates with these ranks."""
        observation, rewards, terminated, truncated, infos = super().step(self.candidates.at(actions))
        self.candidates.forget()
        return observation, rewards, terminated, truncated, self._with_mask(infos)

    def action_masks(self) -> Any:
        """Return a bool array `(B, k)`, with false at the end of rows where fewer than k tokens are allowed."""
        return self.out(self.candidates.masks())

    def translate(self, policy: Policy) -> Policy:
        """Return a policy over tokens for a policy over ranks."""
        return _RankPolicy(policy, self.candidates)

    def _with_mask(self, infos: dict[str, Any]) -> dict[str, Any]:
        if "action_mask" not in infos:
            return infos
        return {**infos, "action_mask": self.out(self.candidates.masks().to(torch.int8))}


class Candidates:
    """The k most likely allowed next tokens of each row of a task, computed once per step."""

    def __init__(self, base_env: TextProperties, k: int, model: TokenModel) -> None:
        if not 1 <= k <= base_env.vocab_size:
            raise ValueError(f"k must be between 1 and {base_env.vocab_size}, the size of the vocabulary, got {k}")
        if base_env.kl_payer == "agent":
            raise ValueError(
                "with kl_mode='deferred' the agent applies the KL penalty, which is impossible with TopKActions, "
                "because it hides the tokens: use kl_mode='reference' or 'exact', or kl_coef=0"
            )
        self.base_env, self.k, self.model = base_env, k, model
        self._known: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Discard the candidates, because the rows have changed."""
        self._known = None

    def tokens(self) -> Tensor:
        """Return token ids `(B, k)`, most likely first."""
        return self._look_up()[0]

    def masks(self) -> Tensor:
        """Return a bool tensor `(B, k)` of the candidates that are allowed; these come first."""
        return self._look_up()[1]

    def at(self, ranks: Any) -> Tensor:
        """Return the tokens `(B,)` with these ranks.

        Raises:
            ValueError: If a rank is not between 0 and k - 1.
        """
        ranks = as_actions(ranks, self.base_env.num_rows, self.base_env.device)
        if bool(((ranks < 0) | (ranks >= self.k)).any()):
            raise ValueError(f"actions must be between 0 and {self.k - 1}, got {ranks.tolist()}")
        return self.tokens().gather(1, ranks[:, None])[:, 0]

    def ranks(self, tokens: Any) -> Tensor:
        """Return the ranks `(B,)` of tokens that are candidates; the inverse of `at`."""
        tokens = torch.as_tensor(tokens, device=self.base_env.device)
        return (self.tokens() == tokens[:, None]).int().argmax(-1)

    def _look_up(self) -> tuple[Tensor, Tensor]:
        if self._known is None:
            allowed = self.base_env.allowed_tokens()  # (B, V)
            logits = self.model.next_logits(self.base_env.current_observation()).to(allowed.device)
            shared = min(logits.shape[1], allowed.shape[1])  # models pad their vocabularies to different sizes
            ranked = torch.full(allowed.shape, -torch.inf, device=allowed.device)
            ranked[:, :shared] = logits[:, :shared].masked_fill(~allowed[:, :shared], -torch.inf)
            values, tokens = ranked.topk(self.k, dim=-1)
            self._known = tokens, values > -torch.inf
        return self._known


class _RankPolicy:
    """Adapter from a policy over ranks to one over tokens."""

    def __init__(self, policy: Policy, candidates: Candidates) -> None:
        self.policy, self.candidates = policy, candidates
        self.temperature = getattr(policy, "temperature", 1.0)

    def log_prob(self, observation: Observation, action: Any, action_masks: Any = None) -> Tensor:
        masks = () if action_masks is None else (self.candidates.masks(),)
        return self.policy.log_prob(observation, self.candidates.ranks(action), *masks)
