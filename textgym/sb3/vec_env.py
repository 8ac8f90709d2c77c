"""make_vec_env: a text environment of many rows in the form that Stable-Baselines3 takes."""

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
"""What the environment answers with one entry a row; anything else is the same for all rows."""


def make_vec_env(id_or_env: str | EnvSpec | Any, n_envs: int = 1, **env_kwargs: Any) -> VecMonitor:
    """A `VecEnv` whose rows are one batch of a `TextVectorEnv`, monitored as SB3's own `make_vec_env` does.

    Unless told otherwise the environment leaves the KL to the agent (`kl_mode="deferred"`): `EpisodeRolloutBuffer` or
    `KLCallback` pay it. Algorithms without behaviour log-probs, such as DQN, ask for `kl_mode="reference"`. An id that
    is registered with a `kl_mode`, as `textgym/SentimentMLP-v0` is, keeps it.

    Args:
        id_or_env: a registered id or its `EnvSpec`, or a `TextVectorEnv`.
        n_envs: rows.
        env_kwargs: arguments of the environment, as of `gym.make_vec`.

    Raises:
        ValueError: arguments beside an environment that is already made.
        TypeError: an environment that is no `TextVectorEnv`.

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
        raise ValueError("n_envs and arguments are for an id; an environment that is made already has its own")
    return VecMonitor(TextVecEnv(id_or_env))


class TextVecEnv(VecEnv):
    """A `TextVectorEnv` as a `VecEnv`: rows reset in the step that ends them, and there is no loop over the others.

    Args:
        envs: a `TextVectorEnv`, or a view of one; it is taken over (SAME_STEP, NumPy arrays).

    Raises:
        TypeError: another kind of environment.
    """

    def __init__(self, envs: Any) -> None:
        check_text_envs(envs)
        self.envs = envs
        envs.unwrapped.set_autoreset_mode(AutoresetMode.SAME_STEP)
        envs.unwrapped.array = "numpy"
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> VecEnvObs:
        """Starts an episode in every row, by the seed and options that were set."""
        observation, _ = self.envs.reset(seed=self._seeds[0], options=self._reset_options_of_all())
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return self._shown(observation)

    def step_async(self, actions: np.ndarray) -> None:
        """Takes one token for each row."""
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Appends the tokens.

        Raises:
            ValueError: an algorithm trains, and nobody pays the KL penalty.
        """
        algorithm = _learning_algorithm()
        if algorithm is not None and isinstance(algorithm.action_space, TokenSpace):
            algorithm.action_space.check_kl_is_paid()
        observation, rewards, terminated, truncated, infos = self.envs.step(self.actions)
        return self._shown(observation), rewards, terminated | truncated, self._row_infos(infos, truncated)

    def close(self) -> None:
        """Closes the environment."""
        self.envs.close()

    def attach_policy(self, policy: Policy) -> None:
        """Hands over the policy whose exact KL is paid in `kl_mode="exact"`, such as `model.policy`."""
        self._find("attach_policy")(policy)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the `TextVectorEnv` or of its views, once for each row."""
        return self._rows(attr_name, self._find(attr_name), indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of the `TextVectorEnv`, which all rows share."""
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a method of the `TextVectorEnv` or of its views once; its answer for each row."""
        answer = self._find(method_name)(*method_args, **method_kwargs)
        return self._rows(method_name, answer, indices)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """No row is wrapped: the rows are one batch."""
        return [False for _ in self._get_indices(indices)]

    def _reset_options_of_all(self) -> dict[str, Any] | None:
        """The options of the rows as those of one environment."""
        names = {name for options in self._options for name in options}
        if any(set(options) != names for options in self._options):
            raise ValueError(f"the rows are reset together, so give each the same options: got {self._options}")
        return {name: [options[name] for options in self._options] for name in names} or None

    def _shown(self, observation: VecEnvObs) -> VecEnvObs:
        if isinstance(self.action_space, TokenSpace):  # through a view, actions may be no tokens
            self.action_space.observation = observation  # type: ignore[assignment]  # a dict, there
        return observation

    def _find(self, name: str) -> Any:
        """From the outermost view that has it; vector wrappers do not hand it on."""
        env = self.envs
        while env is not env.unwrapped and not hasattr(env, name):
            env = env.env
        return getattr(env, name)

    def _rows(self, name: str, answer: Any, indices: VecEnvIndices) -> list[Any]:
        return [
            answer[row] if name in PER_ROW and not callable(answer) else answer for row in self._get_indices(indices)
        ]

    def _row_infos(self, infos: dict[str, Any], truncated: np.ndarray) -> list[dict[str, Any]]:
        """One dict a row, as SB3 wants them: empty, but for the rows that ended."""
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
    """Refuses what is no `TextVectorEnv`, with any wrappers around it.

    Raises:
        TypeError: something else.
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
        importlib.import_module(module)  # which registers the id
    spec = gym.registry.get(env_id)
    return {} if spec is None else spec.kwargs  # `gym.make_vec` says what is wrong with an unknown id


def _learning_algorithm() -> BaseAlgorithm | None:
    """Return the algorithm that collects with this step what it learns from; `None` if this is an evaluation.

    Policies and buffers of SB3's own do not ask who pays the KL, so the environment has to, and is told of nobody.
    """
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
    caller = next((frame for frame in frames if not isinstance(frame.f_locals.get("self"), VecEnv)), None)
    if caller is None or caller.f_code.co_name != "collect_rollouts":
        return None
    algorithm: BaseAlgorithm = caller.f_locals["self"]
    return algorithm


def _is_number(values: np.ndarray) -> bool:
    return values.dtype != object
