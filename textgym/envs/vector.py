"""TextVectorEnv: token generation for a batch of rows as a Gymnasium vector environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from textgym.data.rows import Row
from textgym.envs.config import TextVectorConfig, takes
from textgym.envs.interface import TextProperties
from textgym.envs.rendering import RENDER_MODES, checked_render_mode, render
from textgym.envs.reset_options import check_options, chosen_rows, prompt_choice
from textgym.envs.spaces import as_actions
from textgym.envs.step_outcome import StepOutcome
from textgym.envs.text_task import Policy, TextTask
from textgym.errors import ConfigError
from textgym.models.machine.transfer import to_host
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.kl import KLPenalty

Array = Any
"""A numpy array, or with `array="torch"` a tensor on the device."""


class TextVectorEnv(TextProperties, VectorEnv[dict[str, Array], Array, Array]):
    """B rows of `TextEnv` in one batch: row i equals a `TextEnv` with the same prompts and actions.

    All rows that end in one step are scored by one call of each reward function. `step` has no Python loop over rows,
    except over rows that end (for their final observations) or that may contain a stop string. Prompts are sampled
    without replacement over all rows together. Spaces, rewards, ends and infos are those of `TextEnv`, batched in
    Gymnasium's way.

    ## Arguments
    The fields of `textgym.envs.config.TextVectorConfig`: those of `TextEnv`, and `num_envs`, `autoreset_mode` and
    `array`.

    Raises:
        ValueError: If arguments or actions are wrong, see `TextEnv`.
        gymnasium.error.ResetNeeded: If `step` is called before `reset`.

    >>> import gymnasium as gym, textgym
    >>> envs = gym.make_vec("textgym/Sentiment-v0", num_envs=2, max_new_tokens=3)
    >>> observations, infos = envs.reset(seed=0)
    >>> observations["input_ids"].shape == (2, 48 + 3)
    True
    >>> for _ in range(3):
    ...     observations, rewards, terminated, truncated, infos = envs.step([9, 10])
    >>> terminated.tolist(), infos["response_tokens"].tolist()
    ([True, True], [3, 3])
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (as in Gymnasium; instances replace it and never change it)
        "render_modes": list(RENDER_MODES),
        "render_fps": 8,
    }
    task_class: type[TextTask] = TextTask

    @takes(TextVectorConfig)
    def __init__(self, config: TextVectorConfig) -> None:
        self.task = self.task_class(config.num_envs, config)
        self.num_envs = config.num_envs
        self.array = config.array
        self._take_spaces()
        self.render_mode = checked_render_mode(config.render_mode)
        self.info_text = config.info_text
        self.info_action_mask = config.info_action_mask
        self.set_autoreset_mode(config.autoreset_mode)
        self.waiting: np.ndarray | None = None  # rows that have ended and were not reset yet
        self._checked_kl_mode = config.kl_mode is not None  # otherwise checked at the first reset outside of an agent
        self._in_rollout = False

    def fit(self, policy: TokenModel) -> None:
        """Compare a policy with tokenizer, reference and lengths, and use its vocabulary size and its stop tokens.

        Agents call this method. Call it yourself before `reset` if the environment has no reference, and the model's
        vocabulary is padded beyond the tokenizer's or its generation config has more stop tokens.

        Raises:
            ValueError: If the policy does not fit; the message names both sides.
        """
        self.task.fit(policy)
        self._take_spaces()

    def _take_spaces(self) -> None:
        self.single_observation_space = self.task.observation_space
        self.single_action_space = self.task.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def set_autoreset_mode(self, autoreset_mode: AutoresetMode | str) -> None:
        """Change the autoreset mode; the next call must be `reset`."""
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError as error:
            modes = ", ".join(mode.value for mode in AutoresetMode)
            raise ConfigError(f"autoreset_mode must be one of {modes}, got {autoreset_mode!r}") from error
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.waiting = None

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Start episodes in all rows, or in the rows of `options["reset_mask"]` (bool `(B,)`).

        `options["prompt_index"]` chooses the prompts of these rows.
        """
        check_options(options, ["prompt_index", "reset_mask"])
        if not (self._checked_kl_mode or self._in_rollout):
            self.task.check_kl_mode()
            self._checked_kl_mode = True
        if seed is not None:
            self._seed(seed)
            self.task.forget_prompts()
        mask = chosen_rows(options, self.num_envs)
        if self.waiting is None:
            mask[:] = True  # at the first reset all rows need a prompt, or they would have no observation
        rows = np.flatnonzero(mask)
        prompts = prompt_choice(options, len(rows), len(self.task.rows))
        self.task.begin(rows, self.task.next_prompts(len(rows), self.np_random) if prompts is None else prompts)
        self.waiting = np.zeros(self.num_envs, dtype=bool) if self.waiting is None else self.waiting & ~mask
        return self._shown()[0], self._with_mask({})

    def step(self, actions: Array) -> tuple[dict[str, Array], Array, Array, Array, dict[str, Any]]:
        """Append one token to every row that has not ended."""
        if self.waiting is None:
            raise gym.error.ResetNeeded("no episodes have started: call envs.reset() before envs.step(actions)")
        outcome = self.task.play(as_actions(actions, self.num_envs, self.task.device))
        infos = self._infos(outcome)
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._restart(self.waiting)
            self.waiting = outcome.ended
        elif self.autoreset_mode == AutoresetMode.SAME_STEP:
            if outcome.ended.any():
                infos = self._final(outcome.ended, infos)
            self._restart(outcome.ended)
        else:
            self.waiting = self.waiting | outcome.ended
        terminated, truncated = outcome.ends
        if not self.task.truncates:
            terminated, truncated = terminated | truncated, torch.zeros_like(truncated)
        observation, flags = self._shown(outcome.rewards, terminated, truncated)
        return observation, *flags, self._with_mask(infos)

    def submit(self, tokens: Tensor, lengths: Tensor) -> tuple[Array, dict[str, Any]]:
        """End the episodes of all rows, which were just reset, with whole responses.

        The result equals that of stepping through the responses, except that all are scored in one call. It is only for
        `kl_mode="deferred"`.

        Args:
            tokens: `(B, T)` int64, on any device; positions after the end of a response are ignored.
            lengths: `(B,)`, number of tokens of each response, with the stop token.

        Returns:
            Rewards `(B,)` of the last tokens, and the infos of the rows as in `step`.

        Raises:
            ValueError: If a response is not complete, or the environment does not support whole responses.
        """
        outcome = self.task.submit(tokens, lengths)
        self.waiting = outcome.ended
        return self._out(outcome.rewards)[0], self._infos(outcome)

    @property
    def takes_whole_responses(self) -> bool:
        """Whether the environment supports `submit`."""
        return self.task.takes_whole_responses

    @contextmanager
    def whole_episodes(self, wrapped: bool = False) -> Iterator[None]:
        """Return a context for rollouts: ended rows wait, arrays are tensors, and the agent applies the KL penalty.

        With wrappers arrays are NumPy arrays, because many wrappers do not support tensors. Afterwards the environment
        has its old settings, and must be reset before the next step.
        """
        if self._in_rollout:
            yield
            return
        mode, array, kl_mode = self.autoreset_mode, self.array, self.task.kl_mode
        self.set_autoreset_mode(AutoresetMode.DISABLED)
        self.array = "numpy" if wrapped else "torch"
        self.task.kl_mode, self._in_rollout = "deferred", True
        try:
            yield
        finally:
            self.set_autoreset_mode(mode)
            self.array, self.task.kl_mode, self._in_rollout = array, kl_mode, False

    def agent_penalty(self, start: Callable[[], TokenModel], agent: str) -> KLPenalty:
        """Return the KL penalty that an agent applies, to the environment's reference or else to the initial policy.

        Its controller starts where that of the environment's `kl_coef` did, whatever earlier agents did in it.

        Args:
            start: Function that makes the reference if the environment has none.
            agent: The agent's name, for the error message.

        Raises:
            ValueError: If the environment also applies the penalty.
        """
        task = self.task
        if task.kl_mode_given not in (None, "deferred") and task.kl_payer() != "nobody":
            raise ValueError(
                f"the KL penalty would be applied twice, by {agent} and by the environment "
                f"(kl_mode={task.kl_mode_given!r}): make the environment without kl_mode, or with kl_mode='deferred'"
            )
        reference = start() if task.penalty is None else task.penalty.reference
        return KLPenalty(reference, task.kl_coef, task.kl_estimator, task.kl_clamp)

    def next_prompts(self, number: int) -> np.ndarray:
        """Return the indices `(number,)` of the next prompts, without replacement, as `reset` does."""
        return self.task.next_prompts(number, self.np_random)

    def sequences(self) -> Sequences:
        """Return a copy of all rows."""
        return self.task.episodes.sequences()

    def token_rewards(self) -> list[np.ndarray]:
        """Return the rewards of each row's response tokens, none for a row whose first episode has not ended."""
        return [np.zeros(0) if last is None else last.rewards for last in self.task.last]

    def finished(self, rows: np.ndarray) -> Finished:
        """Return the arguments of reward functions for rows (indices) that have ended."""
        return self.task.finished(rows)

    def progress(self) -> dict[str, Any]:
        """Return the queue of prompts and the random generator, as plain values for a checkpoint."""
        return {"prompt_queue": self.task.queue, "np_random": self.np_random.bit_generator.state}

    def resume(self, progress: dict[str, Any]) -> None:
        """Restore the state that `progress` returned."""
        self.task.queue = progress["prompt_queue"]
        self.np_random.bit_generator.state = progress["np_random"]

    def render(self) -> tuple[str | None, ...]:  # type: ignore[override]  # None for rows that are not rendered
        """Render the last finished episode of every row, or else its current one, as `render_mode` says."""
        return tuple(render(self.render_mode, self.task, self.transcript, self.task.last))

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads and processes of reward functions; `close` calls it."""
        self.task.scorer.close()

    def action_masks(self) -> Array:
        """Return bool `(B, V)`: the actions that are currently allowed."""
        return self._out(self.task.action_masks())[0]

    def replace_prompts(self, prompts: list[Row]) -> None:
        """Use other prompts in all episodes that begin after this call; observations may become wider."""
        super().replace_prompts(prompts)
        self.single_observation_space = self.task.observation_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def attach_policy(self, policy: Policy) -> None:
        """Set the policy of `kl_mode="exact"`; it needs `policy.log_prob(observation, action)`."""
        self.task.attach_policy(policy)

    @property
    def transcript(self) -> list[dict[str, Any]]:
        """`prompt`, `completion` and columns of each row's last finished episode, or else of its current episode."""
        first = [row for row, last in enumerate(self.task.last) if last is None]
        current = iter(self.task.current_transcripts(first))
        return [next(current) if last is None else last.transcript for last in self.task.last]

    def _seed(self, seed: int | Sequence[int]) -> None:
        """Seed the generator of all rows; with several numbers `np_random_seed` is -1, as Gymnasium defines it."""
        if isinstance(seed, int | np.integer):
            self._np_random, self._np_random_seed = np_random(int(seed))
        else:
            self.np_random = np.random.default_rng(seed)

    def _restart(self, mask: np.ndarray) -> None:
        rows = np.flatnonzero(mask)
        if len(rows):
            self.task.begin(rows, self.task.next_prompts(len(rows), self.np_random))

    def _shown(self, *tensors: Tensor) -> tuple[dict[str, Array], list[Array]]:
        """Return the observation and other tensors for the caller; NumPy arrays are copied in one transfer."""
        observation = self.task.episodes.observation()
        if self.array == "torch":
            return observation, list(tensors)
        arrays = self._out(*observation.values(), *tensors)
        return dict(zip(observation, arrays, strict=False)), arrays[len(observation) :]

    def _out(self, *tensors: Tensor) -> list[Array]:
        """Return tensors for the caller: on the device, or as NumPy arrays after one transfer."""
        return list(tensors) if self.array == "torch" else [tensor.numpy() for tensor in to_host(*tensors)]

    def _infos(self, outcome: StepOutcome) -> dict[str, Any]:
        """Return the infos of rows that have ended, each with a mask `_key`, in Gymnasium's format."""
        known = {key: outcome.known(key) for key in outcome.infos}
        infos: dict[str, Any] = {key: values for key, values in outcome.infos.items() if known[key].any()}
        if infos and self.info_text:
            last = [episode if ended else None for episode, ended in zip(self.task.last, outcome.ended, strict=True)]
            for key in {key: None for episode in last if episode is not None for key in episode.transcript}:
                texts = [None if episode is None else episode.transcript.get(key) for episode in last]
                infos[key] = np.array([*texts, None], dtype=object)[:-1]
        return {**infos, **{f"_{key}": known.get(key, outcome.ended).copy() for key in infos}}

    def _final(self, ended: np.ndarray, infos: dict[str, Any]) -> dict[str, Any]:
        observation, _ = self._shown()
        final = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(ended):
            final[row] = {key: value[row] for key, value in observation.items()}
        return {"final_obs": final, "_final_obs": ended.copy(), "final_info": infos, "_final_info": ended.copy()}

    def _with_mask(self, infos: dict[str, Any]) -> dict[str, Any]:
        if not self.info_action_mask:
            return infos
        [masks] = self._out(self.task.action_masks().to(torch.int8))  # as `Discrete.sample` takes them
        return {**infos, "action_mask": masks, "_action_mask": np.ones(self.num_envs, dtype=bool)}
