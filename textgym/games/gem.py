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
