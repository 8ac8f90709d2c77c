"""FreshGame: a game of another library, kept apart from the process around it."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np

from textgym.games.game_env import Game


class FreshGame:
    """A game that is made anew for each episode, with random numbers of its own and nothing on the display.

    Libraries keep the text of earlier episodes, draw from the global generators of `random` and NumPy, and print.

    Args:
        make_game: Function that makes a game.
    """

    def __init__(self, make_game: Callable[[], Game]) -> None:
        self.make_game = make_game
        self.random_state: tuple[Any, Any] | None = None
        with self._apart():
            self.game = make_game()  # a game that cannot be made is an error now, not in the first episode

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Begin the game of this seed."""
        with self._apart():
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002  (theirs)
            self.game = self.make_game()
            return self.game.reset(seed=seed)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take a turn."""
        with self._apart():
            return self.game.step(action)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Put the game's random numbers in the place of the global ones, and its output nowhere."""
        kept = random.getstate(), np.random.get_state()  # noqa: NPY002
        if self.random_state is not None:
            random.setstate(self.random_state[0])
            np.random.set_state(self.random_state[1])  # noqa: NPY002
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield
        finally:
            self.random_state = random.getstate(), np.random.get_state()  # noqa: NPY002
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002
