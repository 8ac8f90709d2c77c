"""Reward functions in a process of their own."""

from textgym.rewards.isolated.process import Isolated

__all__ = ["Isolated"]
