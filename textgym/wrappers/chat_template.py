"""ChatTemplate: prompts as conversations, in the words of the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from textgym.data.rows import Row
from textgym.wrappers.views import VectorView, View


class ChatTemplate(View, gym.utils.RecordConstructorArgs):
    """Each prompt becomes a user's message, and the chat template opens the assistant's turn after it.

    Reward functions then get conversations, as TRL's do: `prompts` are lists of messages, `completions` a message of
    the assistant's each. Prompts that are conversations already only get the system message, before all others. Wrap
    before the first `reset`; spaces and actions stay as they are.

    Args:
        env: a `TextEnv`, with any wrappers.
        system: the system message, if there is to be one.

    Raises:
        ValueError: the tokenizer has no chat template.

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
        self.task.take_prompts([conversational(row, system) for row in self.task.rows])


class VectorChatTemplate(VectorView):
    """`ChatTemplate` of a `TextVectorEnv`, see there.

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
        self.task.take_prompts([conversational(row, system) for row in self.task.rows])


def conversational(row: Row, system: str | None = None) -> Row:
    """A row whose prompt is a conversation.

    >>> conversational({"prompt": "Hi", "answer": 1})
    {'prompt': [{'role': 'user', 'content': 'Hi'}], 'answer': 1}
    """
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    opening = [] if system is None else [{"role": "system", "content": system}]
    return {**row, "prompt": [*opening, *messages]}
