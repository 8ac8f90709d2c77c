"""TextQPolicy: a language model as the Q-network of SB3's DQN."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import gymnasium as gym
import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor, nn

from textgym.models.actor_critic import ActorCritic
from textgym.models.token_model import Observation, TokenModel
from textgym.sb3.exploration import Explorer
from textgym.sb3.policies import TextObs, check_name, check_vocabulary, pack_observation, token_space


class TextQNetwork(BasePolicy):
    """Q-network Q(s, a) = v(s) + q_scale * log p(a | s): the model's log-probs are advantages, a new head is the value.

    v starts at zero, so the greedy policy starts as greedy decoding of the language model. If the environment's reward
    has the term beta log pi_ref(a | s) (`kl_mode="reference"`) and `q_scale=beta`, Q starts as this term.

    Args:
        observation_space: Observation space of the environment.
        action_space: Action space of the environment.
        model: Name or path of the language model.
        q_scale: Scale of the log-probs, in reward per nat.
    """

    def __init__(
        self, observation_space: gym.Space[Any], action_space: gym.Space[Any], model: str, q_scale: float
    ) -> None:
        super().__init__(observation_space, action_space)
        self.model = TokenModel(ActorCritic.from_pretrained(model).plain_lm().requires_grad_(True))
        check_vocabulary(self.model, token_space(action_space))
        self.q_scale = q_scale
        self.value_head = zero_linear(self.model.lm.config.hidden_size, 1)

    def forward(self, obs: TextObs) -> Tensor:
        """Return Q-values `(M, V)` by one pass over packed states or over all contexts."""
        return self.q_values(self.model.hidden(pack_observation(obs, self.device)))

    def q_values(self, hidden: Tensor) -> Tensor:
        """Return Q-values `(M, V)` for hidden states `(M, d)`."""
        log_probs = self.model.distribution().log_probs(self.model.head(hidden))
        return self.value_head(hidden.float()) + self.q_scale * log_probs

    def _predict(self, observation: Observation, deterministic: bool = True) -> Tensor:  # type: ignore[override]
        return self.q_values(self.model.next_hidden(observation)).argmax(-1)


class ExploringPolicy(BasePolicy):
    """Base class of the policies for DQN and QRDQN.

    The environment applies the KL penalty (`make_vec_env(..., kl_mode="reference")`), because these algorithms have no
    log-probs. Random actions, also those of the warm-up, are sampled from the initial language model and not uniformly
    (see `Explorer`). There are three copies of the model: the online and the target network, and the explorer.

    Args:
        observation_space: Observation space of the environment.
        action_space: Action space of the environment.
        lr_schedule: Learning-rate schedule of the algorithm.
        model: Name or path of the language model.
        q_scale: Scale of the log-probs, see `TextQNetwork`.
        optimizer_class: Class of the optimiser; Adam by default.
        optimizer_kwargs: Arguments of the optimiser.
        network_kwargs: Arguments of the network, see the subclass.

    Raises:
        TypeError: If `model` is not a name.
        ValueError: If the model's vocabulary is not the environment's, or the environment is not one of textgym.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        lr_schedule: Schedule,
        *,
        model: str | os.PathLike[str],
        q_scale: float = 1.0,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        **network_kwargs: Any,
    ) -> None:
        check_name("model", model)
        self.model_kwargs: dict[str, Any] = {"model": model, "q_scale": q_scale, **network_kwargs}
        self.tokens = token_space(action_space)
        self.tokens.explorer = self.explorer = Explorer(self.tokens, model)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            **network_kwargs,
        )

    @property
    @abstractmethod
    def online(self) -> TextQNetwork:
        """The network that is trained."""

    def set_training_mode(self, mode: bool) -> None:
        """Switch between sampling and training, and free the key-value cache, because training changes the weights."""
        if mode:
            self.tokens.check_kl_is_paid()
        if mode != self.training:
            self.online.model.reset_cache()
        super().set_training_mode(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the explorer too; it is not a submodule, because it is neither trained nor saved."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.explorer.actor._apply(fn, recurse)
        return self

    def is_vectorized_observation(self, observation: Any) -> bool:
        """Pass the observation to the explorer: DQN calls this method before it samples random actions for it."""
        self.explorer.look(observation)
        return super().is_vectorized_observation(observation)

    def save_pretrained(
        self, folder: str | os.PathLike[str], tokenizer: Any = None, *, overwrite: bool = False
    ) -> None:
        """Write the language model as a transformers folder. DQN's policy is to decode it greedily."""
        ActorCritic(self.online.model.lm).save_pretrained(folder, tokenizer, overwrite=overwrite)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            **self.model_kwargs,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


class TextQPolicy(ExploringPolicy, DQNPolicy):
    """Policy for DQN, used with `EpisodeReplayBuffer`.

    `DQN(TextQPolicy, env, policy_kwargs={"model": "tiny"}, replay_buffer_class=EpisodeReplayBuffer)`

    The arguments are those of `ExploringPolicy`.
    """

    @property
    def online(self) -> TextQNetwork:
        """The network that is trained."""
        return self.q_net  # type: ignore[return-value]  # typed as SB3's own network

    def make_q_net(self) -> Any:
        """Make a Q-network that is initialised from the language model."""
        return TextQNetwork(self.observation_space, self.action_space, **self.model_kwargs).to(self.device)


def zero_linear(size: int, outputs: int) -> nn.Linear:
    """Return a linear layer whose weights and biases are zero."""
    layer = nn.Linear(size, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
