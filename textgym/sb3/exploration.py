"""Explorer: the distribution of DQN's random actions."""

from __future__ import annotations

import os
import warnings

from textgym.envs.spaces import TokenSpace
from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import freeze
from textgym.models.token_model import Observation


class Explorer:
    """Samples tokens from a language model, instead of the uniform random actions of epsilon-greedy algorithms.

    Only a few of tens of thousands of tokens make sense after a text, so uniform exploration rarely finds one. DQN
    calls `action_space.sample()` once for each row without an argument for the state, and `TokenSpace` calls this
    object. The states are those of the last observation that `look` was called with, until each row has a sample, and
    otherwise those of the environment's current observation.

    Args:
        tokens: The action space.
        model: The language model; it is frozen, and moves with the policy, see `ExploringPolicy`.
    """

    def __init__(self, tokens: TokenSpace, model: str | os.PathLike[str]) -> None:
        self.tokens = tokens
        self.actor = freeze(ActorCritic.from_pretrained(model))  # its own copy, which can be moved to another device
        self.actor.generator = None  # use torch's generator, which `model.set_random_seed` seeds
        self.samples: list[int] = []
        self.sampled_for: object = None
        self.warned = False

    def look(self, observation: Observation) -> None:
        """Sample the next tokens for these states, `(B, W)` or `(W,)`."""
        self.samples = self.actor.act(observation, with_value=False).action.reshape(-1).tolist()
        self.sampled_for = None

    def __call__(self) -> int | None:
        """Return the next sampled token; `None` if the state is unknown."""
        current = self.tokens.observation
        if self.sampled_for is not None and self.sampled_for is not current:
            self.samples = []  # the environment has made a step since
        if not self.samples:
            if current is None:
                self._warn()
                return None
            self.look(current)
            self.sampled_for = current
        return self.samples.pop(0)

    def _warn(self) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(
                "the warm-up's random tokens are uniform over the vocabulary, because the action space does not know "
                "the state: make the environment with textgym.sb3.make_vec_env, pass load(..., action_space="
                "env.action_space), or set learning_starts=0",
                stacklevel=4,
            )
