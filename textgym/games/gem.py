"""Games of GEM as text environments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from textgym.games.fresh_game import FreshGame
from textgym.games.game_env import GameEnv, GameVectorEnv


def from_gem(
    make_game: Callable[[], Any], tokenizer: Any = "tiny", *, num_envs: int | None = None, **kwargs: Any
) -> GameEnv | GameVectorEnv:
    """Make an environment from a game with GEM's interface.

    The interface is `reset(seed) -> text, info` and `step(text) -> text, reward, terminated, truncated, info`, where
    each text is new. Where `info` has a `prefix` or `suffix`, as GEM's games put the board there, the player reads them
    too. Make the game without GEM's wrappers of observations, which repeat all earlier texts.

    Args:
        make_game: Function that makes a game, such as `lambda: gem.make("game:GuessTheNumber-v0-easy")`; it is called
            for each episode.
        tokenizer: Name, path or tokenizer.
        num_envs: Number of rows of a vector environment; `None` makes a single environment.
        kwargs: Arguments of `GameEnv`.

    Raises:
        TypeError: At `reset` or `step`, if the game says something else than a string.
    """
    make = partial(FreshGame, partial(_GemGame, make_game))
    if num_envs is None:
        return GameEnv(make, tokenizer, **kwargs)
    return GameVectorEnv(num_envs, make, tokenizer, **kwargs)


class _GemGame:
    """A game whose texts are whole."""

    def __init__(self, make_game: Callable[[], Any]) -> None:
        self.game = make_game()

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        text, info = self.game.reset(seed=seed)
        return _whole(text, info), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        text, reward, terminated, truncated, info = self.game.step(action)
        return _whole(text, info), reward, terminated, truncated, info


def _whole(text: str, info: dict[str, Any]) -> str:
    """Return a text between its prefix and suffix, which begins on a line of its own as in GEM's wrappers."""
    if not isinstance(text, str):
        raise TypeError(f"a game with GEM's interface says strings, got a {type(text).__name__}: {text!r:.200}")
    if "suffix" in info:
        text = f"{text}\n" if text and not text.endswith("\n") else text
    return info.get("prefix", "") + text + info.get("suffix", "")
