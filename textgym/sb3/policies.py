"""TextActorCriticPolicy: a language model as the policy of SB3's PPO and A2C and of sb3-contrib's TRPO."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.distributions import make_proba_distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from textgym.envs.spaces import TokenSpace
from textgym.models.actor_critic import ActorCritic
from textgym.models.architectures.attention import States
from textgym.models.decoding.contexts import read_contexts
from textgym.models.fitting import check_tokenizer, stop_ids
from textgym.models.token_model import Observation, TokenModel
from textgym.sb3.flat import FlatWeights

TextObs = States | Observation
"""Packed states from textgym's buffers, or observations of the environment; SB3 passes both on unchanged."""


class TextPolicy(BasePolicy):
    """Base class of policies with and without masks: an `ActorCritic` with SB3's interface.

    Actions are sampled by cached decoding; the packed states of a buffer are evaluated in one pass. Pretrained weights
    are never re-initialised, dropout is off, and the value head starts at zero.

    Args:
        observation_space: Observation space of the environment.
        action_space: Action space of the environment, a `TokenSpace`.
        lr_schedule: Learning-rate schedule of the algorithm.
        model: Name or path of the language model; not a module, because SB3's `save` pickles the policy's arguments.
        critic: `"shared"`, `"separate"`, or the name of a model that the critic's trunk is initialised from.
        temperature: Divisor of the logits, in sampling and in training.
        lora: A `peft.LoraConfig`; then only the adapter is trained.
        ortho_init: Accepted because SB3 passes it; it has no effect, because there are no layers to initialise.
        use_sde: Accepted because SB3 passes it; SB3 rejects it for discrete actions.
        optimizer_class: Class of the optimiser; Adam by default, as in SB3.
        optimizer_kwargs: Arguments of the optimiser; `{"eps": 1e-5}` by default for Adam, as in SB3.

    Raises:
        TypeError: If `model` or `critic` is not a name.
        ValueError: If the model's vocabulary is not the environment's, or the environment is not one of textgym.
    """

    actor_critic: ActorCritic

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        lr_schedule: Schedule,
        *,
        model: str | os.PathLike[str],
        critic: str = "shared",
        temperature: float = 1.0,
        lora: Any = None,
        ortho_init: bool = False,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_name("model", model)
        self.tokens = token_space(action_space)
        self.flat: FlatWeights | None = None
        self.model_kwargs: dict[str, Any] = {
            "model": model,
            "critic": critic,
            "temperature": temperature,
            "lora": lora,
        }
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        kwargs = dict(self.model_kwargs)
        self.actor_critic = ActorCritic.from_pretrained(kwargs.pop("model"), **kwargs)
        self.actor_critic.generator = None  # use torch's generator, which `model.set_random_seed` seeds
        check_vocabulary(self.actor_critic, self.tokens)
        self.tokens.temperature = self.temperature
        self.eval()
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            **self.model_kwargs,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    @property
    def temperature(self) -> float:
        """Divisor of the logits."""
        return self.actor_critic.temperature

    def act(self, obs: Observation, deterministic: bool, action_masks: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions `(B,)`, values `(B, 1)` and log-probs `(B,)`, by cached decoding."""
        step = self.actor_critic.act(obs, deterministic, action_masks)
        return step.action, step.value[:, None], step.log_prob

    def score(self, obs: TextObs, actions: Tensor, action_masks: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return values `(M, 1)`, log-probs and entropies `(M,)` by one pass, with gradients."""
        evaluation = self.actor_critic.evaluate_states(pack_observation(obs, self.device), actions, action_masks)
        return evaluation.value[:, None], evaluation.log_prob, evaluation.entropy

    def next_logits(self, obs: TextObs) -> Tensor:
        """Return logits `(M, V)`. In training only TRPO calls this; it differentiates them twice."""
        if not self.training:
            return self.actor_critic.logits(pack_observation(obs, self.device))
        if self.flat is None:
            self._use_eager_attention()
            self.flat = FlatWeights(self.actor_critic)
        return self.flat.logits(pack_observation(obs, self.device))

    def predict_values(self, obs: TextObs) -> Tensor:
        """Return values `(M, 1)`."""
        if not self.training and isinstance(obs, Mapping):
            return self.actor_critic.value(obs)[:, None]
        states = pack_observation(obs, self.device)
        if self.flat is None:
            return self.actor_critic.state_values(states)[:, None]
        # In TRPO's critic step. It must not change the policy, so no gradient flows into a shared trunk.
        self._leave_flat_weights()
        hidden = None if self.actor_critic.critic is not None else self.actor_critic.hidden(states).detach()
        return self.actor_critic.state_values(states, hidden)[:, None]

    def set_training_mode(self, mode: bool) -> None:
        """Switch between sampling and training, and free the key-value cache, because training changes the weights."""
        if mode:
            self.tokens.check_kl_is_paid()
        if mode != self.training:
            self._leave_flat_weights()
            self.flat = None
            self.reset_cache()
        super().set_training_mode(mode)

    def reset_cache(self) -> None:
        """Free the key-value cache."""
        self.actor_critic.reset_cache()

    def save_pretrained(
        self, folder: str | os.PathLike[str], tokenizer: Any = None, *, overwrite: bool = False
    ) -> None:
        """Write a transformers folder and the critic, see `ActorCritic.save_pretrained`."""
        self._leave_flat_weights()
        self.actor_critic.save_pretrained(folder, tokenizer, overwrite=overwrite)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters; during a TRPO step one vector replaces those of the language model."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            if self.flat is None or ".lm." not in name:
                yield name, parameter
        if self.flat is not None:
            yield "flat", self.flat.vector

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state, with the weights of an unfinished TRPO step."""
        self._leave_flat_weights()
        return super().state_dict(*args, **kwargs)

    def _leave_flat_weights(self) -> None:
        """Copy the weights of a TRPO step into the model."""
        if self.flat is not None:
            self.flat.write_back()

    def _use_eager_attention(self) -> None:
        lm = self.actor_critic.lm
        if lm.config._attn_implementation != "eager":
            lm.set_attn_implementation("eager")
            warnings.warn(
                "TRPO needs second derivatives, which fused attention lacks: the policy now has eager attention",
                stacklevel=4,
            )


class TextActorCriticPolicy(TextPolicy, ActorCriticPolicy):  # type: ignore[misc]  # observations are TextObs
    """Policy for PPO, A2C and TRPO: `PPO(TextActorCriticPolicy, env, policy_kwargs={"model": "tiny"})`.

    These algorithms have no action masks, so they may sample every token. If the environment masks actions
    (`min_new_tokens`, `action_mask`), a forbidden token is appended like any other, but a forbidden stop token does not
    end the episode. Use MaskablePPO with `MaskableTextActorCriticPolicy` for masks. The arguments are those of
    `TextPolicy`.
    """

    def forward(self, obs: Observation, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return actions `(B,)`, values `(B, 1)` and log-probs `(B,)`."""
        return self.act(obs, deterministic)

    def evaluate_actions(self, obs: TextObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        """Return values `(M, 1)`, log-probs and entropies `(M,)`."""
        return self.score(obs, actions)

    def get_distribution(self, obs: TextObs) -> Any:  # type: ignore[override]
        """Return SB3's categorical distribution over the next token in each state."""
        return make_proba_distribution(self.action_space).proba_distribution(self.next_logits(obs))

    def log_prob(self, observation: Observation, action: Any, action_masks: Any = None) -> Tensor:
        """Return the log-prob `(B,)` of tokens, for `attach_policy`.

        Raises:
            ValueError: If the environment masks actions, which this policy does not support.
        """
        if action_masks is not None:
            raise ValueError(
                "the environment masks actions, but this policy samples from all tokens, so the KL would be wrong: use "
                "MaskablePPO with MaskableTextActorCriticPolicy, or an environment without min_new_tokens and "
                "action_mask"
            )
        return self.actor_critic.log_prob(observation, action)

    def _predict(self, observation: Observation, deterministic: bool = False) -> Tensor:  # type: ignore[override]
        return self.actor_critic.act(observation, deterministic, with_value=False).action


def pack_observation(obs: TextObs, device: torch.device) -> States:
    """Return states unchanged, and observations as states for one pass over all contexts."""
    return read_contexts(obs, device)[0].states() if isinstance(obs, Mapping) else obs


def token_space(space: gym.Space[Any]) -> TokenSpace:
    """Return an action space as a `TokenSpace`, which every environment of textgym has.

    Raises:
        ValueError: If it is not a `TokenSpace`.
    """
    if not isinstance(space, TokenSpace):
        raise ValueError(f"{space} is not the action space of a textgym environment, which textgym.sb3 is made for")
    return space


def check_name(what: str, value: Any) -> None:
    """Check that a model is given by name, because SB3's `save` would pickle a module as a whole.

    Raises:
        TypeError: If it is not a name or path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"{what} must be a name or a path, because SB3 pickles the policy's arguments when it saves; got "
            f"{type(value).__name__}: write it with save_pretrained(folder) and pass the folder"
        )


def check_vocabulary(model: TokenModel, tokens: TokenSpace, name: str = "the policy") -> None:
    """Check that a model has the tokens of the environment.

    A space from a pickle has the number of tokens but no tokenizer, so then only the number is checked.

    Raises:
        ValueError: If the tokenizer or the number of tokens differs, or the environment lacks stop tokens of the model.
    """
    if tokens.tokenizer is not None:
        check_tokenizer(tokens.tokenizer, model.lm, model.vocab_size, name)
    if model.vocab_size != tokens.n:
        raise ValueError(
            f"{name} has {model.vocab_size} tokens (models often pad their vocabulary beyond the tokenizer's) and the "
            f"environment's action space {tokens.n}: make the environment with the model's name as tokenizer=, or with "
            "the model as reference=, so that it learns the size"
        )
    missing = sorted(set(stop_ids(model.lm)) - set(tokens.stop.ids))
    if missing and tokens.tokenizer is not None:
        raise ValueError(
            f"{name} ends its responses with the tokens {sorted(stop_ids(model.lm))} (generation_config.eos_token_id), "
            f"and the environment with {list(tokens.stop.ids)}: make the environment with stop={missing}, or with the "
            "model's name as tokenizer="
        )
