"""TurnActions: an action is a whole reply."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from textgym.envs.spaces import TokenSpace
from textgym.wrappers.text_space import TextSpace, longest_text
from textgym.wrappers.views import View


class TurnActions(View, gym.utils.RecordConstructorArgs):
    """An action is a string: the shape of GEM, SkyRL-gym and TextArena.

    The string is written token by token and closed by the tokenizer's EOS, once that is allowed; what the episode's
    end leaves over is dropped. The rewards of its tokens are summed and the turn is one transition. For many rows take
    `gymnasium.vector.SyncVectorEnv`: their turns differ in length.

    Args:
        env: a `TextEnv`, with any wrappers that leave its actions alone.

    Raises:
        ValueError: actions that are no tokens; a turn that writes none.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import TextObservation
    >>> from textgym.games import TurnActions
    >>> env = TurnActions(TextObservation(gym.make("textgym/Sentiment-v0", kl_coef=0.0)))
    >>> observation, info = env.reset(options={"prompt_index": 0})
    >>> observation, reward, terminated, truncated, info = env.step(" a joy.")
    >>> terminated, observation
    (True, 'The first half hour of this film a joy.<|endoftext|>')
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        if not isinstance(env.action_space, TokenSpace):
            raise ValueError(f"TurnActions writes tokens, and the actions of what it is to wrap are {env.action_space}")
        self.action_space = TextSpace(longest_text(self.task.tokenizer, self.task.episodes.max_new_tokens))

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Writes a reply."""
        if not isinstance(action, str):
            raise ValueError(f"an action is a string here, got {action!r}")
        tokens, eos = self.task.tokenizer(action, add_special_tokens=False).input_ids, self.task.tokenizer.eos_token_id
        total, outcome = 0.0, None
        for token in [*tokens, eos]:
            if token == eos and not self.env.get_wrapper_attr("action_masks")()[eos]:
                continue
            outcome = super().step(token)
            total += float(outcome[1])
            if outcome[2] or outcome[3]:
                break
        if outcome is None:
            raise ValueError("a turn has at least one token, and min_new_tokens does not allow the EOS yet: say more")
        observation, _, terminated, truncated, info = outcome
        return observation, total, terminated, truncated, info
