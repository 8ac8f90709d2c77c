"""Games of TextArena as text environments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from textgym.games.fresh_game import FreshGame
from textgym.games.game_env import GameEnv, GameVectorEnv

PLAYER = 0


def from_textarena(
    make_game: Callable[[], Any], tokenizer: Any = "tiny", *, num_envs: int | None = None, **kwargs: Any
) -> GameEnv | GameVectorEnv:
    """Make an environment from a single-player game of TextArena.

    The player reads each message of the game once, as `[GAME] ...`, in the words of the game itself: of TextArena's
    wrappers those of actions apply, and those of observations, which repeat earlier messages, do not. So an id with and
    without `-raw` is the same but for its actions. The reward is what `close()` gives the player.

    Args:
        make_game: Function that makes a game, such as `lambda: textarena.make("GuessTheNumber-v0")`; it is called for
            each episode.
        tokenizer: Name, path or tokenizer.
        num_envs: Number of rows of a vector environment; `None` makes a single environment.
        kwargs: Arguments of `GameEnv`.

    Raises:
        ValueError: At `reset` or `step`, if the game needs more players.
    """
    make = partial(FreshGame, partial(_ArenaGame, make_game))
    if num_envs is None:
        return GameEnv(make, tokenizer, **kwargs)
    return GameVectorEnv(num_envs, make, tokenizer, **kwargs)


class _ArenaGame:
    """Adapter from TextArena's interface to GEM's."""

    def __init__(self, make_game: Callable[[], Any]) -> None:
        self.arena = make_game()
        self.inner = self.arena
        while "env" in vars(self.inner):  # wrappers forward all other attributes
            self.inner = self.inner.env

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        try:
            self.arena.reset(num_players=1, seed=seed)
        except AssertionError as error:  # by which games check the number of players
            raise ValueError(f"from_textarena plays games for one player, and this one cannot be: {error}") from error
        return self._new_text().removeprefix("\n"), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        done, info = self.arena.step(action=action)
        if not done:
            return self._new_text(), 0.0, False, False, info
        rewards, _ = self.arena.close()  # rewards are known only when a game is closed
        if rewards is None:
            raise ValueError("the game ended without rewards for its players, so there is nothing to learn from")
        return "", float(rewards[PLAYER]), True, False, info

    def _new_text(self) -> str:
        """Return what the game has said since the last call."""
        player, messages = self.inner.get_observation()
        if player != PLAYER:
            raise ValueError(f"from_textarena plays games for one player, and in this one it is player {player}'s turn")
        return messages if isinstance(messages, str) else "".join(map(_line, _others(messages)))


def _others(messages: Sequence[tuple[int, str, Any]]) -> list[str]:
    """Return the messages but for the player's own actions, which are in the context already."""
    return [text for _, text, kind in messages if kind.name != "PLAYER_ACTION"]


def _line(message: str) -> str:
    return f"\n[GAME] {message}"
