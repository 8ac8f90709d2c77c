"""Wrappers for agents that cannot handle tokens; each comes in a version for one row and a version for a batch.

>>> import gymnasium as gym
>>> from textgym.wrappers import HiddenStateObservation, TopKActions
>>> env = TopKActions(HiddenStateObservation(gym.make("textgym/Sentiment-v0")), k=8)
>>> env.observation_space, env.action_space
(Box(-inf, inf, (192,), float32), Discrete(8))
"""

from __future__ import annotations

from textgym.wrappers.chat_template import ChatTemplate, VectorChatTemplate
from textgym.wrappers.hidden_state import HiddenStateObservation, VectorHiddenStateObservation
from textgym.wrappers.text_observation import TextObservation, VectorTextObservation
from textgym.wrappers.token_history import TokenHistory, VectorTokenHistory
from textgym.wrappers.top_k import TopKActions, VectorTopKActions

__all__ = [
    "ChatTemplate",
    "HiddenStateObservation",
    "TextObservation",
    "TokenHistory",
    "TopKActions",
    "VectorChatTemplate",
    "VectorHiddenStateObservation",
    "VectorTextObservation",
    "VectorTokenHistory",
    "VectorTopKActions",
]
