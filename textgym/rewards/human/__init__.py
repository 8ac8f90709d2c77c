"""Ratings that people give while a policy trains."""

from textgym.rewards.human.ratings import HumanRatings

__all__ = ["HumanRatings"]
