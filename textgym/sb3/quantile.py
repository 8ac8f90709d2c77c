"""TextQuantilePolicy: a language model as the quantile network of sb3-contrib's QRDQN."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from textgym.models.token_model import Observation
from textgym.sb3.policies import TextObs, pack_observation
from textgym.sb3.q_policies import ExploringPolicy, TextQNetwork, zero_linear

try:
    from sb3_contrib.qrdqn.policies import QRDQNPolicy
except ImportError as error:
    raise ImportError("QRDQN is in sb3-contrib: pip install 'textgym[contrib]'") from error


class TextQuantileNetwork(TextQNetwork):
    """Quantile k of the return of (s, a): Q(s, a) + v_k(s) + e_a . (psi_k * h(s)), with e the output embedding.

    A full head would have d x V x K weights, more than the language model. This one has K x d, like the product with
    the embedding of a quantile in Dabney et al., 2018 ("Implicit quantile networks"). v and psi start at zero.

    Args:
        observation_space: Observation space of the environment.
        action_space: Action space of the environment.
        model: Name or path of the language model.
        q_scale: Scale of the log-probs, see `TextQNetwork`.
        n_quantiles: Number of quantiles, K.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        model: str,
        q_scale: float,
        n_quantiles: int,
    ) -> None:
        super().__init__(observation_space, action_space, model, q_scale)
        self.quantile_values = zero_linear(self.value_head.in_features, n_quantiles)
        self.psi = nn.Parameter(torch.zeros(n_quantiles, self.value_head.in_features))

    def forward(self, obs: TextObs) -> Tensor:
        """Return quantiles `(M, K, V)` by one pass over packed states or over all contexts."""
        hidden = self.model.hidden(pack_observation(obs, self.device))  # (M, d)
        action_terms = self.model.head(hidden[:, None] * self.psi.to(hidden)).float()  # (M, K, V)
        return self.q_values(hidden)[:, None] + self.quantile_values(hidden.float())[:, :, None] + action_terms

    def _predict(self, observation: Observation, deterministic: bool = True) -> Tensor:  # type: ignore[override]
        # The mean over quantiles. It leaves out v_k(s), which is the same for all actions.
        hidden = self.model.next_hidden(observation)
        mean = self.model.head(hidden * self.psi.mean(0).to(hidden)).float()  # (B, V)
        return (self.q_values(hidden) + mean).argmax(-1)


class TextQuantilePolicy(ExploringPolicy, QRDQNPolicy):
    """Policy for QRDQN: `QRDQN(TextQuantilePolicy, env, policy_kwargs={"model": "tiny"}, ...)`.

    QRDQN computes all quantiles of all tokens at once, so a batch of M transitions needs several tensors of M x K x V
    numbers: 67 MB each for M = 256, K = 32 and V = 2048.

    Args:
        observation_space: Observation space of the environment.
        action_space: Action space of the environment.
        lr_schedule: Learning-rate schedule of the algorithm.
        n_quantiles: Number of quantiles, K.
        kwargs: Arguments of `ExploringPolicy`.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        lr_schedule: Schedule,
        *,
        n_quantiles: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, n_quantiles=n_quantiles, **kwargs)

    @property
    def online(self) -> TextQuantileNetwork:
        """The network that is trained."""
        return self.quantile_net  # type: ignore[return-value]  # typed as sb3-contrib's own network

    def make_quantile_net(self) -> Any:
        """Make a quantile network that is initialised from the language model."""
        return TextQuantileNetwork(self.observation_space, self.action_space, **self.model_kwargs).to(self.device)
