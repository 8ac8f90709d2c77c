"""Tools for tests of environments, rewards and agents: mock models, checks, exact optima, float comparison."""

from __future__ import annotations

from textgym.models.letter_tokenizer import letter_tokenizer
from textgym.testing.checks import check_text_env
from textgym.testing.exact import ExactOptimum, ExactTask
from textgym.testing.learning import Measured, assert_learns
from textgym.testing.mocks import byte_tokenizer, mock_lm, mock_seq2seq_lm
from textgym.testing.numerics import assert_close, assert_trained_alike, terms_of, tolerance
from textgym.testing.play import Played, mean_and_error, play
from textgym.testing.rewards import check_reward
from textgym.testing.table import TableConfig, TableLM

__all__ = [
    "ExactOptimum",
    "ExactTask",
    "Measured",
    "Played",
    "TableConfig",
    "TableLM",
    "assert_close",
    "assert_learns",
    "assert_trained_alike",
    "byte_tokenizer",
    "check_reward",
    "check_text_env",
    "letter_tokenizer",
    "mean_and_error",
    "mock_lm",
    "mock_seq2seq_lm",
    "play",
    "terms_of",
    "tolerance",
]
