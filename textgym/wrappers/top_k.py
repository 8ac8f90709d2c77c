"""TopKActions: the large action space made small."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from textgym.envs.text_task import Policy, TextTask
from textgym.models.token_model import Observation, TokenModel
from textgym.wrappers.views import VectorView, View, model_or_reference


class TopKActions(View, gym.utils.RecordConstructorArgs):
    """Action i is the i-th most likely token by a language model, of those that are allowed: `Discrete(k)`.

    Stop tokens are not offered while the response is too short to end. The KL stays exact: it is that of the token
    written, to the reference over the whole vocabulary. The environment pays it, in `kl_mode="reference"` or, after
    `attach_policy`, in `"exact"`. `"deferred"` leaves it to the agent, which here sees no tokens and so cannot pay.

    Args:
        env: a `TextEnv`, with any wrappers.
        k: number of actions.
        model: name, path or model that ranks the tokens; the environment's reference if not given, which then does
            one token's work a step for both purposes.

    Raises:
        ValueError: `k` beyond the vocabulary, no model, or a KL that nobody could pay.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import TopKActions
    >>> env = TopKActions(gym.make("textgym/Sentiment-v0", max_new_tokens=3), k=4)
    >>> observation, info = env.reset(seed=0, options={"prompt_index": 0})
    >>> for _ in range(3):
    ...     observation, reward, terminated, truncated, info = env.step(0)  # the likeliest token
    >>> terminated, env.action_masks().tolist()
    (True, [True, True, True, True])
    """

    def __init__(self, env: gym.Env[Any, Any], k: int, model: str | nn.Module | TokenModel | None = None) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, k=k, model=model)
        super().__init__(env)
        self.candidates = Candidates(self.task, k, model_or_reference(model, self.task, "TopKActions"))
        self.action_space = gym.spaces.Discrete(k)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode."""
        observation, info = super().reset(seed=seed, options=options)
        self.candidates.forget()
        return observation, self._with_mask(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Appends the candidate of this rank."""
        token = int(self.candidates.at(np.asarray(action).reshape(1))[0])
        observation, reward, terminated, truncated, info = super().step(token)
        self.candidates.forget()
        return observation, reward, terminated, truncated, self._with_mask(info)

    def action_masks(self) -> np.ndarray:
        """Bool `(k,)`: false where fewer than k tokens are allowed."""
        return self.candidates.masks()[0].cpu().numpy()

    def translate(self, policy: Policy) -> Policy:
        """A policy over ranks as one over tokens."""
        return _RankPolicy(policy, self.candidates)

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "action_mask": self.action_masks()} if "action_mask" in info else info


class VectorTopKActions(VectorView):
    """`TopKActions` of a `TextVectorEnv`, see there; one batch of the model a step.

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
        self.candidates = Candidates(self.task, k, model_or_reference(model, self.task, "VectorTopKActions"))
        self.single_action_space = gym.spaces.Discrete(k)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts episodes."""
        observation, infos = super().reset(seed=seed, options=options)
        self.candidates.forget()
        return observation, self._with_mask(infos)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Appends the candidates of these ranks."""
        observation, rewards, terminated, truncated, infos = super().step(self.candidates.at(actions))
        self.candidates.forget()
        return observation, rewards, terminated, truncated, self._with_mask(infos)

    def action_masks(self) -> Any:
        """Bool `(B, k)`: false where fewer than k tokens are allowed."""
        return self.out(self.candidates.masks())

    def translate(self, policy: Policy) -> Policy:
        """A policy over ranks as one over tokens."""
        return _RankPolicy(policy, self.candidates)

    def _with_mask(self, infos: dict[str, Any]) -> dict[str, Any]:
        return {**infos, "action_mask": self.action_masks()} if "action_mask" in infos else infos


class Candidates:
    """The k likeliest tokens that may come next in each row of a task, looked up once a step."""

    def __init__(self, task: TextTask, k: int, model: TokenModel) -> None:
        if not 1 <= k <= task.vocab_size:
            raise ValueError(f"k must be from 1 to the {task.vocab_size} tokens of the vocabulary, got {k}")
        if task.action_space.kl_payer == "agent":
            raise ValueError(
                "kl_mode='deferred' leaves the KL to the agent, which sees no tokens through TopKActions and cannot "
                "pay: make the environment with kl_mode='reference' or 'exact', or with kl_coef=0"
            )
        self.task, self.k, self.model = task, k, model
        self._known: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """The rows have moved on."""
        self._known = None

    def tokens(self) -> Tensor:
        """`(B, k)` token ids, likeliest first."""
        return self._look_up()[0]

    def masks(self) -> Tensor:
        """Bool `(B, k)`: those that are allowed; they come first."""
        return self._look_up()[1]

    def at(self, ranks: Any) -> Tensor:
        """The tokens `(B,)` of these ranks.

        Raises:
            ValueError: a rank outside 0 to k - 1.
        """
        ranks = torch.as_tensor(ranks, device=self.task.device).long()
        if bool(((ranks < 0) | (ranks >= self.k)).any()):
            raise ValueError(f"actions {ranks.tolist()} are not all from 0 to {self.k - 1}, the {self.k} candidates")
        return self.tokens().gather(1, ranks[:, None])[:, 0]

    def ranks(self, tokens: Any) -> Tensor:
        """The ranks `(B,)` of candidates: the way back from `at`."""
        tokens = torch.as_tensor(tokens, device=self.task.device)
        return (self.tokens() == tokens[:, None]).int().argmax(-1)

    def _look_up(self) -> tuple[Tensor, Tensor]:
        if self._known is None:
            allowed = self.task.action_masks()  # (B, V)
            logits = self.model.next_logits(self.task.episodes.observation()).to(allowed.device)
            shared = min(logits.shape[1], allowed.shape[1])  # models pad their vocabularies, each its own way
            ranked = torch.full(allowed.shape, -torch.inf, device=allowed.device)
            ranked[:, :shared] = logits[:, :shared].masked_fill(~allowed[:, :shared], -torch.inf)
            values, tokens = ranked.topk(self.k, dim=-1)
            self._known = tokens, values > -torch.inf
        return self._known


class _RankPolicy:
    """A policy over ranks, asked about tokens."""

    def __init__(self, policy: Policy, candidates: Candidates) -> None:
        self.policy, self.candidates = policy, candidates
        self.temperature = getattr(policy, "temperature", 1.0)

    def log_prob(self, observation: Observation, action: Any, action_masks: Any = None) -> Tensor:
        masks = () if action_masks is None else (self.candidates.masks(),)
        return self.policy.log_prob(observation, self.candidates.ranks(action), *masks)
