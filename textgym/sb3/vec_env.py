"""make_vec_env: a batched text environment as a `VecEnv` of Stable-Baselines3."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from textgym.envs.spaces import TokenSpace
from textgym.envs.text_task import Policy
from textgym.envs.vector import TextVectorEnv

PER_ROW = ("action_masks", "render", "transcript")
"""Attributes and methods with one value per row; all others have the same value for all rows."""


def make_vec_env(id_or_env: str | EnvSpec | Any, n_envs: int = 1, **env_kwargs: Any) -> VecMonitor:
    """Make a `VecEnv` whose rows are the rows of one `TextVectorEnv`, with a monitor like SB3's own `make_vec_env`.

    By default the environment leaves the KL penalty to the agent (`kl_mode="deferred"`): `EpisodeRolloutBuffer` or
    `KLCallback` apply it. Algorithms without log-probs, such as DQN, need `kl_mode="reference"`. The `kl_mode` of an
    id's registration, such as that of `textgym/SentimentMLP-v0`, takes precedence over this default.

    Args:
        id_or_env: A registered id or its `EnvSpec`, or a `TextVectorEnv`.
        n_envs: Number of rows.
        env_kwargs: Arguments of the environment, as for `gym.make_vec`.

    Raises:
        ValueError: If there are arguments for an environment that exists already.
        TypeError: If the environment is not a `TextVectorEnv`.

    >>> env = make_vec_env("textgym/Sentiment-v0", n_envs=2, max_new_tokens=2)
    >>> observations = env.reset()
    >>> for _ in range(2):
    ...     observations, rewards, dones, infos = env.step([9, 10])
    >>> dones.tolist(), int(infos[0]["episode"]["l"]), infos[0]["terminal_observation"]["input_ids"].shape
    ([True, True], 2, (50,))
    """
    if isinstance(id_or_env, str | EnvSpec):
        kl_mode = _registered_arguments(id_or_env).get("kl_mode", "deferred")
        envs: Any = gym.make_vec(id_or_env, num_envs=n_envs, **{"kl_mode": kl_mode, **env_kwargs})
        return VecMonitor(TextVecEnv(envs))
    check_text_envs(id_or_env)
    if env_kwargs or n_envs not in (1, id_or_env.num_envs):
        raise ValueError("n_envs and arguments are only for an id: an existing environment has its own")
    return VecMonitor(TextVecEnv(id_or_env))


class TextVecEnv(VecEnv):
    """A `TextVectorEnv` as a `VecEnv`: a row is reset in the step that ends its episode; no Python loop over rows.

    Args:
        envs: A `TextVectorEnv`, perhaps with wrappers. Its autoreset mode becomes SAME_STEP and its arrays NumPy.

    Raises:
        TypeError: If it is another kind of environment.
    """

    def __init__(self, envs: Any) -> None:
        check_text_envs(envs)
        self.envs = envs
        envs.unwrapped.set_autoreset_mode(AutoresetMode.SAME_STEP)
        envs.unwrapped.array = "numpy"
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> VecEnvObs:
        """Start an episode in every row, with the seed and options that were set.

        Raises:
            ValueError: If an algorithm is in the middle of a rollout here.
        """
        if _collects_in(self):
            raise ValueError(
                "the training environment was reset in the middle of a rollout, as EvalCallback does if it evaluates "
                "in it: give it an environment of its own, EvalCallback(make_vec_env(...))"
            )
        observation, _ = self.envs.reset(seed=self._seeds[0], options=self._reset_options_of_all())
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return self._shown(observation)

    def step_async(self, actions: np.ndarray) -> None:
        """Store one token for each row."""
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Append the tokens.

        Raises:
            ValueError: If an algorithm trains and the KL penalty is not applied.
        """
        space = self.action_space
        if isinstance(space, TokenSpace) and space.kl_payer == "agent" and not space.agent_pays:
            algorithm = _learning_algorithm()
            if algorithm is not None and isinstance(algorithm.action_space, TokenSpace):
                algorithm.action_space.check_kl_is_paid()
        observation, rewards, terminated, truncated, infos = self.envs.step(self.actions)
        return self._shown(observation), rewards, terminated | truncated, self._row_infos(infos, truncated)

    def close(self) -> None:
        """Close the environment."""
        self.envs.close()

    def attach_policy(self, policy: Policy) -> None:
        """Set the policy of `kl_mode="exact"`, such as `model.policy`."""
        self._find("attach_policy")(policy)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the `TextVectorEnv` or of its wrappers for each row."""
        return self._rows(attr_name, self._find(attr_name), indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the `TextVectorEnv`, which all rows share."""
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the `TextVectorEnv` or of its wrappers once, and return the result for each row."""
        result = self._find(method_name)(*method_args, **method_kwargs)
        return self._rows(method_name, result, indices)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Return False for each row, because the rows are one batch without wrappers of single rows."""
        return [False for _ in self._get_indices(indices)]

    def _reset_options_of_all(self) -> dict[str, Any] | None:
        """Return the options of the rows as options of one vector environment."""
        names = {name for options in self._options for name in options}
        if any(set(options) != names for options in self._options):
            raise ValueError(f"the rows are reset together, so give each the same options: got {self._options}")
        return {name: [options[name] for options in self._options] for name in names} or None

    def _shown(self, observation: VecEnvObs) -> VecEnvObs:
        """Store the observation in the action space, for `Explorer`, and return it."""
        if isinstance(self.action_space, TokenSpace):  # with a wrapper, actions may not be tokens
            self.action_space.observation = observation  # type: ignore[assignment]  # a dict for token spaces
        return observation

    def _find(self, name: str) -> Any:
        """Return an attribute of the outermost wrapper that has it; vector wrappers do not forward attributes."""
        env = self.envs
        while env is not env.unwrapped and not hasattr(env, name):
            env = env.env
        return getattr(env, name)

    def _rows(self, name: str, value: Any, indices: VecEnvIndices) -> list[Any]:
        per_row = name in PER_ROW and not callable(value)
        return [value[row] if per_row else value for row in self._get_indices(indices)]

    def _row_infos(self, infos: dict[str, Any], truncated: np.ndarray) -> list[dict[str, Any]]:
        """Return one dict per row, as SB3 expects; empty for rows that have not ended."""
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if "final_info" in infos:
            final: dict[str, np.ndarray] = infos["final_info"]
            names: Sequence[str] = [name for name in final if not name.startswith("_")]
            for row in np.flatnonzero(infos["_final_info"]):
                known = {name: final[name][row] for name in names if final[f"_{name}"][row]}
                rows[row] = {name: value.item() if _is_number(final[name]) else value for name, value in known.items()}
                rows[row]["terminal_observation"] = infos["final_obs"][row]
                rows[row]["TimeLimit.truncated"] = bool(truncated[row])
        return rows


def check_text_envs(envs: Any) -> None:
    """Check that an environment is a `TextVectorEnv`, perhaps with wrappers.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(envs, VectorEnv) or not isinstance(envs.unwrapped, TextVectorEnv):
        raise TypeError(
            f"make_vec_env and TextVecEnv take a TextVectorEnv, got {type(envs).__name__}: pass an id, or what "
            "gym.make_vec returns for an id that is registered with a vector_entry_point"
        )


def _registered_arguments(id_or_spec: str | EnvSpec) -> dict[str, Any]:
    if isinstance(id_or_spec, EnvSpec):
        return id_or_spec.kwargs
    module, _, env_id = id_or_spec.rpartition(":")
    if module:
        importlib.import_module(module)  # it registers the id
    spec = gym.registry.get(env_id)
    return {} if spec is None else spec.kwargs  # `gym.make_vec` raises the error for an unknown id


def _learning_algorithm() -> BaseAlgorithm | None:
    """Return the algorithm whose `collect_rollouts` calls this step; `None` in an evaluation.

    SB3's own policies and buffers do not check that the KL penalty is applied, so the environment does. SB3 does not
    tell the environment which algorithm steps it, so this function reads it from the call stack.
    """
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
    caller = next((frame for frame in frames if not isinstance(frame.f_locals.get("self"), VecEnv)), None)
    if caller is None or caller.f_code.co_name != "collect_rollouts":
        return None
    algorithm: BaseAlgorithm = caller.f_locals["self"]
    return algorithm


def _collects_in(env: TextVecEnv) -> bool:
    """Return whether a `collect_rollouts` that steps this environment is under way, in the call stack."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        if frame.f_code.co_name == "collect_rollouts":
            stepped: Any = getattr(frame.f_locals.get("self"), "env", None)
            if isinstance(stepped, VecEnv) and stepped.unwrapped is env:
                return True
    return False


def _is_number(values: np.ndarray) -> bool:
    return values.dtype != object
