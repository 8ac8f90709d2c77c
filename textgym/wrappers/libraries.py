"""Tasks of other libraries as text environments: GEM, TextArena, reasoning-gym."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from textgym.envs.games import Game, GameEnv, GameVectorEnv
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.rewards.functions import reasoning_gym_score


def from_gem(
    make_game: Callable[[], Any], tokenizer: Any = "tiny", *, num_envs: int | None = None, **kwargs: Any
) -> GameEnv | GameVectorEnv:
    """A game of GEM's, or of the same form: `reset(seed) -> text, info`, `step(text) -> text, reward, ...`.

    Args:
        make_game: such as `lambda: gem.make("game:GuessTheNumber-v0")`.
        tokenizer: name, path or tokenizer.
        num_envs: rows; a single environment if not given.
        kwargs: as `GameEnv`.
    """
    make = partial(_OwnRandomness, make_game)
    if num_envs is None:
        return GameEnv(make, tokenizer, **kwargs)
    return GameVectorEnv(num_envs, make, tokenizer, **kwargs)


def from_textarena(
    make_game: Callable[[], Any], tokenizer: Any = "tiny", *, num_envs: int | None = None, **kwargs: Any
) -> GameEnv | GameVectorEnv:
    """A game of TextArena's for one player.

    Args:
        make_game: such as `lambda: textarena.make("GuessTheNumber-v0")`.
        tokenizer: name, path or tokenizer.
        num_envs: rows; a single environment if not given.
        kwargs: as `GameEnv`.
    """
    return from_gem(partial(_ArenaGame, make_game), tokenizer, num_envs=num_envs, **kwargs)


def from_reasoning_gym(
    dataset: Any, tokenizer: Any = "tiny", *, num_envs: int | None = None, **kwargs: Any
) -> TextEnv | TextVectorEnv:
    """The questions of a data set of reasoning-gym's, scored by its own scorer (extra `tasks`).

    Args:
        dataset: such as `reasoning_gym.create_dataset("leg_counting", size=100, seed=0)`.
        tokenizer: name, path or tokenizer.
        num_envs: rows; a single environment if not given.
        kwargs: as `TextEnv`.

    >>> import reasoning_gym
    >>> env = from_reasoning_gym(reasoning_gym.create_dataset("chain_sum", size=3, seed=1))
    >>> observation, info = env.reset(options={"prompt_index": 0})
    >>> env.transcript["prompt"].splitlines()[0]
    'State the final answer to the following arithmetic problem: ...'
    """
    prompts = [{"prompt": entry["question"], "entry": entry} for entry in dataset]
    if num_envs is None:
        return TextEnv(prompts, tokenizer, reasoning_gym_score, **kwargs)
    return TextVectorEnv(num_envs, prompts, tokenizer, reasoning_gym_score, **kwargs)


class _ArenaGame:
    """A game of TextArena's, in the form of GEM's."""

    def __init__(self, make_game: Callable[[], Any]) -> None:
        self.arena = make_game()

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.arena.reset(num_players=1, seed=seed)
        return self.arena.get_observation()[1], {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        done, _ = self.arena.step(action=action)
        if not done:
            return self.arena.get_observation()[1], 0.0, False, False, {}
        rewards, _ = self.arena.close()
        return "", float(rewards[0]), True, False, {}


class _OwnRandomness:
    """A game that draws from global generators, as those of both libraries do, with a state of them for itself."""

    def __init__(self, make_game: Callable[[], Game]) -> None:
        self.state: tuple[Any, Any] | None = None
        with self._own():
            self.game = make_game()

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        with self._own():
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002  (theirs)
            return self.game.reset(seed=seed)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        with self._own():
            return self.game.step(action)

    @contextmanager
    def _own(self) -> Iterator[None]:
        kept = random.getstate(), np.random.get_state()  # noqa: NPY002
        if self.state is not None:
            random.setstate(self.state[0])
            np.random.set_state(self.state[1])  # noqa: NPY002
        try:
            yield
        finally:
            self.state = random.getstate(), np.random.get_state()  # noqa: NPY002
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002
