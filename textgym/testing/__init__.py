"""What tests need, for users' own environments, rewards and agents too: mock models, checks, exact optima."""

from __future__ import annotations

from textgym.testing.mocks import byte_tokenizer, letter_tokenizer, mock_lm
from textgym.testing.rewards import check_reward

__all__ = ["byte_tokenizer", "check_reward", "letter_tokenizer", "mock_lm"]
