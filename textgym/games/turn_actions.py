"""TurnActions: whole replies as actions."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from textgym.data.continuations import encode_after
from textgym.envs.spaces import TokenSpace
from textgym.wrappers.text_space import TextSpace, longest_text
from textgym.wrappers.views import View


class TurnActions(View, gym.utils.RecordConstructorArgs):
    """Wrapper whose actions are strings, as in GEM, SkyRL-gym and TextArena.

    The wrapper steps through the tokens of the string, and through EOS if it is allowed. If the episode ends earlier,
    the remaining tokens are dropped. The reward is the sum over the tokens. For several rows use
    `gymnasium.vector.SyncVectorEnv`, because turns have different lengths.

    Args:
        env: A `TextEnv`, with wrappers that do not change its actions.

    Raises:
        ValueError: If the actions of `env` are not tokens, or a turn has no token.

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
            raise ValueError(
                f"TurnActions needs an environment whose actions are tokens, but the actions are {env.action_space}"
            )
        self.action_space = TextSpace(longest_text(self.base_env.tokenizer, self.base_env.max_new_tokens))

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step through the tokens of a reply."""
        if not isinstance(action, str):
            raise ValueError(f"an action of TurnActions is a string, got {action!r}")
        tokenizer = self.base_env.tokenizer
        tokens, eos = encode_after(tokenizer, self._context(), action), tokenizer.eos_token_id
        total, outcome = 0.0, None
        for token in [*tokens, eos]:
            # Before min_new_tokens, EOS would count as an ordinary token of the reply.
            if token == eos and not self.env.get_wrapper_attr("action_masks")()[eos]:
                continue
            outcome = super().step(token)
            total += float(outcome[1])
            if outcome[2] or outcome[3]:
                break
        if outcome is None:
            raise ValueError("the reply has no tokens, and min_new_tokens does not allow EOS yet: pass a longer reply")
        observation, _, terminated, truncated, info = outcome
        return observation, total, terminated, truncated, info

    def _context(self) -> list[int]:
        """Return the tokens that the reply follows."""
        observation = self.base_env.current_observation()
        half = "decoder_" if self.base_env.decoder_start else ""
        length = int(observation[f"{half}attention_mask"][0].sum())
        ids: list[int] = observation[f"{half}input_ids"][0, :length].tolist()
        return ids
