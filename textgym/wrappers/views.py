"""View and VectorView: base classes of the wrappers, which change observations or actions."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from textgym.envs.interface import TextProperties
from textgym.envs.text_task import Policy
from textgym.models.machine.devices import Device
from textgym.models.token_model import TokenModel


class View(gym.Wrapper[Any, Any, Any, Any]):
    """Base class for wrappers around a `TextEnv`.

    Args:
        env: A `TextEnv`, with any wrappers.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.base_env = cast(TextProperties, env.unwrapped)

    def observe(self, observation: Any) -> Any:
        """Return the wrapper's observation for an observation of the wrapped environment."""
        return observation

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self.observe(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step in the wrapped environment."""
        observation, *rest = self.env.step(action)
        return self.observe(observation), *rest

    def action_masks(self) -> np.ndarray:
        """Return a bool array of the actions that are allowed in this step."""
        return self.env.get_wrapper_attr("action_masks")()

    def attach_policy(self, policy: Policy) -> None:
        """Set the policy whose KL penalty the environment computes in `kl_mode="exact"`.

        `policy.log_prob(observation, action)` is called with observations and actions of this wrapper, with a batch
        dimension.
        """
        self.env.get_wrapper_attr("attach_policy")(self.translate(policy))

    def translate(self, policy: Policy) -> Policy:
        """Return a policy for the wrapped environment, made from a policy for this wrapper."""
        return policy


class VectorView(VectorWrapper[Any, Any, Any, Any, Any]):
    """Base class for wrappers around a `TextVectorEnv`; all three autoreset modes work.

    Args:
        env: A `TextVectorEnv`, with any wrappers.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.base_env = cast(TextProperties, env.unwrapped)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """The autoreset mode of the environment."""
        mode: AutoresetMode = self.unwrapped.metadata["autoreset_mode"]
        return mode

    def action_masks(self) -> Any:
        """Return a bool array `(B, actions)` of the actions that are allowed in this step."""
        return below(self.env, "action_masks")()

    def attach_policy(self, policy: Policy) -> None:
        """Set the policy whose KL penalty the environment computes, as in `View.attach_policy`."""
        below(self.env, "attach_policy")(self.translate(policy))

    def translate(self, policy: Policy) -> Policy:
        """Return a policy for the wrapped environment, made from a policy for this wrapper."""
        return policy

    def out(self, values: Any) -> Any:
        """Convert a tensor, possibly on another device, to the environment's kind of array."""
        if self.unwrapped.array == "torch":  # type: ignore[attr-defined]
            return values.to(self.base_env.device)
        return values.cpu().numpy()


class VectorObservationView(VectorView):
    """Base class for wrappers that change the observations of a `TextVectorEnv`, including `final_obs`."""

    def observe(self, observation: Any) -> Any:
        """Return the wrapper's observations for observations of the wrapped environment."""
        return observation

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start episodes."""
        observation, infos = self.env.reset(seed=seed, options=options)
        return self.observe(observation), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Take a step in the wrapped environment."""
        observation, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:
            # Final observations are processed before the first ones of new episodes. They are one token longer than the
            # last ones, so the cached decoder does not have to encode these rows again.
            infos = {**infos, "final_obs": self._observe_final(infos["final_obs"], infos["_final_obs"], observation)}
        return self.observe(observation), rewards, terminated, truncated, infos

    def _observe_final(self, final: np.ndarray, ended: np.ndarray, observation: dict[str, Any]) -> np.ndarray:
        """Return the wrapper's final observations of the rows that ended, computed in one batch with all other rows."""
        rows = np.flatnonzero(ended)
        batch = {
            key: value.copy() if isinstance(value, np.ndarray) else value.clone() for key, value in observation.items()
        }
        for row in rows:
            for key, value in final[row].items():
                batch[key][row] = value
        seen = self.observe(batch)
        views = np.full(len(ended), None, dtype=object)
        for row in rows:
            views[row] = {key: value[row] for key, value in seen.items()} if isinstance(seen, dict) else seen[row]
        return views


def below(env: Any, name: str) -> Any:
    """Return an attribute of the outermost vector wrapper that has it; `get_wrapper_attr` is for single ones only."""
    while env is not env.unwrapped and not hasattr(env, name):
        env = env.env
    return getattr(env, name)


def model_or_reference(model: Any, base_env: TextProperties, wrapper: str, device: Device = None) -> TokenModel:
    """Return the model of a wrapper: the given one, or the environment's reference with its cache.

    Raises:
        ValueError: If there is neither.
    """
    if model is not None:
        return TokenModel.load(model, device=device or base_env.device)
    if base_env.reference is None:
        raise ValueError(
            f"{wrapper} uses the environment's reference by default, and this environment has none: pass a model, for "
            f"example {wrapper}(env, ..., model='tiny')"
        )
    return base_env.reference


def check_tokens_are_seen(env: Any, wrapper: str) -> None:
    """Check that the observations of an environment are tokens, with prompt and response in one row.

    Raises:
        ValueError: If they are not.
    """
    space = getattr(env, "single_observation_space", env.observation_space)
    if not isinstance(space, gym.spaces.Dict) or not {"input_ids", "attention_mask"} <= set(space):
        raise ValueError(
            f"{wrapper} needs observations of tokens, but those of the wrapped environment are {space}: "
            "use only one wrapper that changes observations"
        )
    if "decoder_input_ids" in space.spaces:
        raise ValueError(
            f"{wrapper} needs prompt and response in one row, which encoder-decoder models do not have: create the "
            "environment without decoder_start_ids"
        )
