"""Games of GEM itself (extra `gem`)."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest

from textgym.games import TurnActions, from_gem
from textgym.testing import byte_tokenizer
from textgym.wrappers import TextObservation

gem = pytest.importorskip("gem")

SETTINGS: dict[str, Any] = {"tokenizer": byte_tokenizer(), "max_prompt_tokens": 6000, "max_new_tokens": 3000}


def make(env_id: str) -> TurnActions:
    return TurnActions(TextObservation(from_gem(lambda: gem.make(env_id), **SETTINGS)))


def test_only_what_is_new_is_appended_and_what_infos_hold_is_read() -> None:
    env = make("game:GuessTheNumber-v0-easy")
    for seed in range(3):
        first, _ = env.reset(options={"prompt_index": seed})
        assert first.endswith("\nEnter your next guess.")
        text = env.step(r"\boxed{11}")[0]
        assert text.startswith(rf"{first}\boxed{{11}}<eos>At turn 1, you guessed 11")
        assert text.endswith("\nEnter your next guess.")


def test_the_board_is_in_sight() -> None:
    first, _ = make("game:FifteenPuzzle-v0-easy").reset()
    assert re.search(r"current board layout: \n.*__.*\n\nEnter your move", first, re.DOTALL)


def test_a_format_error_ends_the_episode() -> None:
    env = make("game:GuessTheNumber-v0-easy")
    first, _ = env.reset()
    text, reward, terminated, truncated, _ = env.step("nothing")
    assert (text, terminated, truncated) == (f"{first}nothing<eos>", True, False)
    assert reward == pytest.approx(-0.1)


def test_a_question_is_answered_in_one_turn() -> None:
    env = make("rg:chain_sum")
    first, _ = env.reset(options={"prompt_index": 3})
    total = sum(int(term.replace(" ", "")) for term in re.findall(r"(?:^|[+-]) ?\d+", first.rpartition(": ")[2]))
    text, reward, terminated, *_ = env.step(rf"\boxed{{{total}}}")
    assert (text, reward, terminated) == (rf"{first}\boxed{{{total}}}<eos>", 1.0, True), "no sentinel is appended"


def test_a_seed_is_a_game_and_global_generators_are_left_alone() -> None:
    env = make("rg:chain_sum")
    before = random.getstate(), repr(np.random.get_state())
    shown = [env.reset(options={"prompt_index": seed})[0] for seed in (4, 5, 4)]
    assert shown[0] == shown[2] != shown[1]
    assert (random.getstate(), repr(np.random.get_state())) == before
