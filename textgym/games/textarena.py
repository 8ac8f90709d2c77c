"""Games of TextArena as text environments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from textgym.games.game_env import GameEnv, GameVectorEnv
from textgym.games.gem import from_gem


def from_textarena(
    make_game: Callable[[], Any], tokenizer: Any = "tiny", *, num_envs: int | None = None, **kwargs: Any
) -> GameEnv | GameVectorEnv:
    """Make an environment from a single-player game of TextArena.

    Args:
        make_game: Function that makes a game, such as `lambda: textarena.make("GuessTheNumber-v0")`.
        tokenizer: Name, path or tokenizer.
        num_envs: Number of rows of a vector environment; `None` makes a single environment.
        kwargs: Arguments of `GameEnv`.
    """
    return from_gem(partial(_ArenaGame, make_game), tokenizer, num_envs=num_envs, **kwargs)


class _ArenaGame:
    """Adapter from TextArena's interface to GEM's."""

    def __init__(self, make_game: Callable[[], Any]) -> None:
        self.arena = make_game()

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.arena.reset(num_players=1, seed=seed)
        return self.arena.get_observation()[1], {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        done, _ = self.arena.step(action=action)
        if not done:  # TextArena computes rewards only when a game is closed
            return self.arena.get_observation()[1], 0.0, False, False, {}
        rewards, _ = self.arena.close()
        return "", float(rewards[0]), True, False, {}
