"""ChatTemplate: prompts as conversations, rendered with the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from textgym.data.rows import Row
from textgym.wrappers.views import VectorView, View


class ChatTemplate(View, gym.utils.RecordConstructorArgs):
    """Wrapper that turns each prompt into a user's message, rendered with the tokenizer's chat template.

    Reward functions then get conversations, as in TRL: `prompts` are lists of messages, and each completion is one
    message of the assistant. If a prompt is a conversation already, only the system message is put before it. Apply the
    wrapper before the first `reset`. Observations and actions do not change.

    Args:
        env: A `TextEnv`, with any wrappers.
        system: Text of the system message; `None` adds no system message.

    Raises:
        ValueError: If the tokenizer has no chat template.

    >>> import gymnasium as gym, textgym
    >>> from textgym.testing import byte_tokenizer
    >>> from textgym.wrappers import ChatTemplate
    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"
    >>> env = gym.make("textgym/Text-v0", prompts=["Hi"], tokenizer=tokenizer, reward=lambda prompts: [0.0])
    >>> env = ChatTemplate(env, system="Be brief.")
    >>> observation, info = env.reset()
    >>> env.unwrapped.transcript["prompt"]
    'system: Be brief. user: Hi assistant:'
    """

    def __init__(self, env: gym.Env[Any, Any], system: str | None = None) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, system=system)
        super().__init__(env)
        self.base_env.replace_prompts([conversational(row, system) for row in self.base_env.prompts])


class VectorChatTemplate(VectorView):
    """Version of `ChatTemplate` for a `TextVectorEnv`.

    >>> import gymnasium as gym, textgym
    >>> from textgym.testing import byte_tokenizer
    >>> from textgym.wrappers import VectorChatTemplate
    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"
    >>> settings = {"prompts": ["Hi"], "tokenizer": tokenizer, "reward": lambda prompts: [0.0] * len(prompts)}
    >>> envs = VectorChatTemplate(gym.make_vec("textgym/Text-v0", num_envs=2, **settings))
    >>> observations, infos = envs.reset()
    >>> envs.unwrapped.transcript[1]["prompt"]
    'user: Hi assistant:'
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], system: str | None = None) -> None:
        super().__init__(env)
        self.base_env.replace_prompts([conversational(row, system) for row in self.base_env.prompts])


def conversational(row: Row, system: str | None = None) -> Row:
    """Return a row with its prompt as a conversation.

    >>> conversational({"prompt": "Hi", "answer": 1})
    {'prompt': [{'role': 'user', 'content': 'Hi'}], 'answer': 1}
    """
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    opening = [] if system is None else [{"role": "system", "content": system}]
    return {**row, "prompt": [*opening, *messages]}
