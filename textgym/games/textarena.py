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
    """A game of TextArena's for one player.

    Args:
        make_game: such as `lambda: textarena.make("GuessTheNumber-v0")`.
        tokenizer: name, path or tokenizer.
        num_envs: rows; a single environment if not given.
        kwargs: as `GameEnv`.
    """
    return from_gem(partial(_ArenaGame, make_game), tokenizer, num_envs=num_envs, **kwargs)


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
