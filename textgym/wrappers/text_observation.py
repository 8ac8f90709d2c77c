"""TextObservation: the text so far as a string observation."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from textgym.wrappers.text_space import TextSpace, longest_text
from textgym.wrappers.views import VectorObservationView, View, check_tokens_are_seen


class TextObservation(View, gym.utils.RecordConstructorArgs):
    """Wrapper that returns prompt and completion so far as one string; the space is a `gymnasium.spaces.Text`.

    The string is the decoded observation, special tokens included. `env.unwrapped.transcript` has prompt and completion
    separately. If the bytes of a character are spread over several tokens, it appears with the last of them.

    Args:
        env: A `TextEnv`, with wrappers that do not change its observations.

    Raises:
        ValueError: If the observations are not tokens.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import TextObservation
    >>> env = TextObservation(gym.make("textgym/Sentiment-v0"))
    >>> env.reset(options={"prompt_index": 0})[0]
    'The first half hour of this film'
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        check_tokens_are_seen(env, "TextObservation")
        self.observation_space = TextSpace(longest_text(self.base_env.tokenizer, self.base_env.max_tokens))

    def observe(self, observation: Any) -> str:
        """Return the text."""
        ids = observation["input_ids"][: int(observation["attention_mask"].sum())]
        return str(self.base_env.tokenizer.decode(ids))


class VectorTextObservation(VectorObservationView):
    """Version of `TextObservation` for a `TextVectorEnv`; observations are tuples with one string per row.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import VectorTextObservation
    >>> envs = VectorTextObservation(gym.make_vec("textgym/Sentiment-v0", num_envs=2))
    >>> envs.reset(options={"prompt_index": [0, 0]})[0]
    ('The first half hour of this film', 'The first half hour of this film')
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        check_tokens_are_seen(env, "VectorTextObservation")
        self.single_observation_space = TextSpace(longest_text(self.base_env.tokenizer, self.base_env.max_tokens))
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def observe(self, observation: Any) -> tuple[str, ...]:
        """Return the texts `(B,)`."""
        lengths = observation["attention_mask"].sum(-1).tolist()
        rows = [ids[:length] for ids, length in zip(observation["input_ids"].tolist(), lengths, strict=True)]
        return tuple(self.base_env.tokenizer.batch_decode(rows))
