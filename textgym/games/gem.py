"""Games of GEM as text environments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from textgym.games.game_env import Game, GameEnv, GameVectorEnv


def from_gem(
    make_game: Callable[[], Any], tokenizer: Any = "tiny", *, num_envs: int | None = None, **kwargs: Any
) -> GameEnv | GameVectorEnv:
    """Make an environment from a game with GEM's interface.

    The interface is `reset(seed) -> text, info` and `step(text) -> text, reward, terminated, truncated, info`.

    Args:
        make_game: Function that makes a game, such as `lambda: gem.make("game:GuessTheNumber-v0")`.
        tokenizer: Name, path or tokenizer.
        num_envs: Number of rows of a vector environment; `None` makes a single environment.
        kwargs: Arguments of `GameEnv`.
    """
    make = partial(_OwnRandomness, make_game)
    if num_envs is None:
        return GameEnv(make, tokenizer, **kwargs)
    return GameVectorEnv(num_envs, make, tokenizer, **kwargs)


class _OwnRandomness:
    """A game with its own state of the global random generators, which games of GEM and TextArena use."""

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
        """Replace the global random state by the game's own, so that games do not affect each other or the agent."""
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
