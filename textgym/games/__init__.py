"""Games and tasks of other libraries as text environments; a step is a token, or with `TurnActions` a whole turn."""

from __future__ import annotations

from textgym.games.game_env import Game, GameEnv, GameVectorEnv
from textgym.games.gem import from_gem
from textgym.games.reasoning_gym import from_reasoning_gym
from textgym.games.textarena import from_textarena
from textgym.games.turn_actions import TurnActions

__all__ = [
    "Game",
    "GameEnv",
    "GameVectorEnv",
    "TurnActions",
    "from_gem",
    "from_reasoning_gym",
    "from_textarena",
]
