"""Token-level reinforcement learning algorithms for language models, installed as `textgym.agents`."""

from __future__ import annotations

from .ppo import PPO, PPOConfig

__all__ = ["PPO", "PPOConfig"]
