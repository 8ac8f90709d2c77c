"""Explorer: what DQN's random actions are drawn from."""

from __future__ import annotations

import os
import warnings

from textgym.envs.spaces import TokenSpace
from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import freeze
from textgym.models.token_model import Observation


class Explorer:
    """Draws tokens from a language model, in place of the uniform draws of epsilon-greedy algorithms.

    Of tens of thousands of tokens hardly any makes sense after a given text, so uniform exploration never finds one.
    DQN calls `action_space.sample()` once for each row, without saying for which state; `TokenSpace` passes that on to
    here. The states are those of the observation that `look` was shown last, until each had its draw, and otherwise
    those that the environment shows.

    Args:
        tokens: the action space.
        model: the language model, frozen; it moves with the policy, see `ExploringPolicy`.
    """

    def __init__(self, tokens: TokenSpace, model: str | os.PathLike[str]) -> None:
        self.tokens = tokens
        self.actor = freeze(ActorCritic.from_pretrained(model))  # a copy of its own, which can be moved
        self.actor.generator = None  # torch's own, which `model.set_random_seed` seeds
        self.draws: list[int] = []
        self.drawn_for: object = None
        self.warned = False

    def look(self, observation: Observation) -> None:
        """The next draws are for these states `(B, W)` or `(W,)`."""
        self.draws = self.actor.act(observation, with_value=False).action.reshape(-1).tolist()
        self.drawn_for = None

    def __call__(self) -> int | None:
        """The next draw; `None` where the state is not known."""
        current = self.tokens.observation
        if self.drawn_for is not None and self.drawn_for is not current:
            self.draws = []  # the environment has moved on
        if not self.draws:
            if current is None:
                self._warn()
                return None
            self.look(current)
            self.drawn_for = current
        return self.draws.pop(0)

    def _warn(self) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(
                "the warm-up's random tokens are uniform over the vocabulary, since the action space does not know the "
                "state: make the environment with textgym.sb3.make_vec_env, pass load(..., action_space="
                "env.action_space), or set learning_starts=0",
                stacklevel=4,
            )
