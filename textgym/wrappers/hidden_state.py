"""HiddenStateObservation: the context as a vector, for agents with small networks."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from textgym.envs.text_task import Policy
from textgym.models.token_model import Observation, TokenModel
from textgym.wrappers.views import VectorObservationView, View, check_tokens_are_seen, model_or_reference


class HiddenStateObservation(View, gym.utils.RecordConstructorArgs):
    """Wrapper that returns the last hidden state of a frozen language model as the observation.

    The observation space is `Box(-inf, inf, (d,), float32)`. The model has a key-value cache, so each step encodes one
    token. Together with `TopKActions`, any library can train an agent with a multilayer perceptron.

    Args:
        env: A `TextEnv`, with wrappers that do not change its observations.
        model: Name, path or model; the default is the environment's reference, which then encodes each token only once
            for both purposes.

    Raises:
        ValueError: If there is no model, or the observations are not tokens.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import HiddenStateObservation
    >>> env = HiddenStateObservation(gym.make("textgym/Sentiment-v0"))
    >>> observation, info = env.reset(seed=0)
    >>> observation.shape, observation.dtype
    ((192,), dtype('float32'))
    """

    def __init__(self, env: gym.Env[Any, Any], model: str | nn.Module | TokenModel | None = None) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, model=model)
        super().__init__(env)
        check_tokens_are_seen(env, "HiddenStateObservation")
        self.model = model_or_reference(model, self.base_env, "HiddenStateObservation")
        self.observation_space = hidden_space(self.model)

    def observe(self, observation: Any) -> Any:
        """Return the hidden state, `(d,)` float32."""
        return self.model.next_hidden(observation)[0].float().cpu().numpy()

    def translate(self, policy: Policy) -> Policy:
        """A policy that reads hidden states as one that reads tokens."""
        return _HiddenPolicy(policy, self.model)


class VectorHiddenStateObservation(VectorObservationView):
    """Version of `HiddenStateObservation` for a `TextVectorEnv`; the model runs once per step for all rows.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import VectorHiddenStateObservation
    >>> envs = VectorHiddenStateObservation(gym.make_vec("textgym/Sentiment-v0", num_envs=2))
    >>> observations, infos = envs.reset(seed=0)
    >>> observations.shape
    (2, 192)
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], model: str | nn.Module | TokenModel | None = None) -> None:
        super().__init__(env)
        check_tokens_are_seen(env, "VectorHiddenStateObservation")
        self.model = model_or_reference(model, self.base_env, "VectorHiddenStateObservation")
        self.single_observation_space = hidden_space(self.model)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def observe(self, observation: Any) -> Any:
        """Return the hidden states, `(B, d)` float32."""
        return self.out(self.model.next_hidden(observation).float())

    def translate(self, policy: Policy) -> Policy:
        """A policy that reads hidden states as one that reads tokens."""
        return _HiddenPolicy(policy, self.model)


def hidden_space(model: TokenModel) -> gym.spaces.Box:
    """Return the space of a model's last hidden state."""
    return gym.spaces.Box(-np.inf, np.inf, (model.head.weight.shape[1],), np.float32)


class _HiddenPolicy:
    """Adapter from a policy that reads hidden states to one that reads tokens."""

    def __init__(self, policy: Policy, model: TokenModel) -> None:
        self.policy, self.model = policy, model
        self.temperature = getattr(policy, "temperature", 1.0)

    def log_prob(self, observation: Observation, action: Any, *masks: Any) -> Tensor:
        return self.policy.log_prob(self.model.next_hidden(observation).float(), action, *masks)  # type: ignore[arg-type]
