"""View and VectorView: a text environment with other observations, or with other actions."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from textgym.envs.text_task import Policy, TextTask
from textgym.models.machine.devices import Device
from textgym.models.token_model import TokenModel


class View(gym.Wrapper[Any, Any, Any, Any]):
    """A `TextEnv`, seen otherwise.

    Args:
        env: a `TextEnv`, with any wrappers.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.task: TextTask = env.unwrapped.task  # type: ignore[attr-defined]

    def observe(self, observation: Any) -> Any:
        """What the agent sees in place of an observation of the environment below."""
        return observation

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self.observe(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step of the environment below."""
        observation, *rest = self.env.step(action)
        return self.observe(observation), *rest

    def action_masks(self) -> np.ndarray:
        """Bool: the actions that are allowed now."""
        return self.env.get_wrapper_attr("action_masks")()

    def attach_policy(self, policy: Policy) -> None:
        """Hands over the policy whose exact KL is paid in `kl_mode="exact"`.

        `policy.log_prob(observation, action)` is asked about observations and actions of this view, each with a batch
        dimension in front.
        """
        self.env.get_wrapper_attr("attach_policy")(self.translate(policy))

    def translate(self, policy: Policy) -> Policy:
        """A policy of this view as one of the environment below."""
        return policy


class VectorView(VectorWrapper[Any, Any, Any, Any, Any]):
    """A `TextVectorEnv`, seen otherwise. All three autoreset modes work.

    Args:
        env: a `TextVectorEnv`, with any wrappers.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.task: TextTask = env.unwrapped.task  # type: ignore[attr-defined]

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """How rows start again."""
        mode: AutoresetMode = self.unwrapped.metadata["autoreset_mode"]
        return mode

    def action_masks(self) -> Any:
        """Bool `(B, actions)`: the actions that are allowed now."""
        return below(self.env, "action_masks")()

    def attach_policy(self, policy: Policy) -> None:
        """As `View.attach_policy`."""
        below(self.env, "attach_policy")(self.translate(policy))

    def translate(self, policy: Policy) -> Policy:
        """A policy of this view as one of the environment below."""
        return policy

    def out(self, values: Any) -> Any:
        """A tensor as the environment hands arrays out; a view's model may be on another device."""
        if self.unwrapped.array == "torch":  # type: ignore[attr-defined]
            return values.to(self.task.device)
        return values.cpu().numpy()


class VectorObservationView(VectorView):
    """A `TextVectorEnv` with other observations, the final ones of rows that end among them."""

    def observe(self, observation: Any) -> Any:
        """What the agent sees in place of observations of the environment below."""
        return observation

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts episodes."""
        observation, infos = self.env.reset(seed=seed, options=options)
        return self.observe(observation), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of the environment below."""
        observation, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:  # seen before the fresh ones: a decoder then goes on by one token in every row
            infos = {**infos, "final_obs": self._observe_final(infos["final_obs"], infos["_final_obs"], observation)}
        return self.observe(observation), rewards, terminated, truncated, infos

    def _observe_final(self, final: np.ndarray, ended: np.ndarray, observation: dict[str, Any]) -> np.ndarray:
        """The last observations of rows that ended, looked at together with all other rows."""
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
    """An attribute of the outermost of some vector wrappers that has it; Gymnasium looks through single ones only."""
    while env is not env.unwrapped and not hasattr(env, name):
        env = env.env
    return getattr(env, name)


def model_or_reference(model: Any, task: TextTask, wrapper: str, device: Device = None) -> TokenModel:
    """The model of a view: the one given, or else the environment's reference, and then its cache too.

    Raises:
        ValueError: neither.
    """
    if model is not None:
        return TokenModel.load(model, device=device or task.device)
    if task.penalty is None:
        raise ValueError(
            f"{wrapper} takes the environment's reference unless told otherwise, and this one has none: "
            f"name a model, for example {wrapper}(env, ..., model='tiny')"
        )
    return task.penalty.reference


def check_tokens_are_seen(env: Any, wrapper: str) -> None:
    """Asked by views of observations.

    Raises:
        ValueError: the observations below are no longer those of a text environment, or they are in two halves.
    """
    space = getattr(env, "single_observation_space", env.observation_space)
    if not isinstance(space, gym.spaces.Dict) or not {"input_ids", "attention_mask"} <= set(space):
        raise ValueError(
            f"{wrapper} reads the tokens, and the observations of what it is to wrap are {space}: of several views of "
            "the observation only one can be used"
        )
    if "decoder_input_ids" in space.spaces:
        raise ValueError(
            f"{wrapper} shows prompt and response as one text, which an encoder-decoder model does not read: make the "
            "environment without decoder_start_ids"
        )
