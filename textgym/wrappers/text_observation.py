"""TextObservation: the text so far as a string."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from textgym.wrappers.text_space import TextSpace, longest_text
from textgym.wrappers.views import VectorObservationView, View, check_tokens_are_seen


class TextObservation(View, gym.utils.RecordConstructorArgs):
    """The observation is the text so far, prompt and completion, as one string: a `gymnasium.spaces.Text`.

    It is what the tokens of the observation decode to, special tokens included; the two apart are in
    `env.unwrapped.transcript`. A character whose bytes lie in several tokens shows when the last of them is there.

    Args:
        env: a `TextEnv`, with wrappers that leave its observations alone.

    Raises:
        ValueError: observations that are no longer tokens.

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
        self.observation_space = TextSpace(longest_text(self.task.tokenizer, self.task.episodes.width))

    def observe(self, observation: Any) -> str:
        """The text."""
        ids = observation["input_ids"][: int(observation["attention_mask"].sum())]
        return str(self.task.tokenizer.decode(ids))


class VectorTextObservation(VectorObservationView):
    """`TextObservation` of a `TextVectorEnv`, see there: a tuple with a string for each row.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import VectorTextObservation
    >>> envs = VectorTextObservation(gym.make_vec("textgym/Sentiment-v0", num_envs=2))
    >>> envs.reset(options={"prompt_index": [0, 0]})[0]
    ('The first half hour of this film', 'The first half hour of this film')
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        check_tokens_are_seen(env, "VectorTextObservation")
        self.single_observation_space = TextSpace(longest_text(self.task.tokenizer, self.task.episodes.width))
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def observe(self, observation: Any) -> tuple[str, ...]:
        """The texts `(B,)`."""
        lengths = observation["attention_mask"].sum(-1).tolist()
        rows = [ids[:length] for ids, length in zip(observation["input_ids"].tolist(), lengths, strict=True)]
        return tuple(self.task.tokenizer.batch_decode(rows))
