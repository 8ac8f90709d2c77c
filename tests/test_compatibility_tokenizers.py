"""The tokenizers part of the compatibility page: every check holds for every small tokenizer, and can fail."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from textgym.envs import text_task
from textgym.testing.small_tokenizers import SMALL, llama

FOLDER = Path(__file__).parents[1] / "scripts" / "pages"
CHECKS = [
    "decoded in context",
    "first space in rewards",
    "ids of the whole text",
    "one BOS, no EOS",
    "stop strings",
    "special stop strings",
    "turns of games",
    "reward models alike",
    "content is text",
    "messages continued",
    "stop strings at once",
    "prompts whole, or a warning",
]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("compatibility_tokenizers")


def test_every_check_is_tested_here(page: Any) -> None:
    assert list(page.CHECKS) == CHECKS


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore::textgym.errors.CutPromptsWarning")
def test_every_check_holds_for_a_small_tokenizer(page: Any, name: str) -> None:
    tokenizer = page.with_template(SMALL[name]())
    outcomes = {check: page.outcome(holds, tokenizer) for check, holds in page.CHECKS.items()}
    assert outcomes == dict.fromkeys(CHECKS, "right")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::textgym.errors.CutPromptsWarning")
def test_every_check_holds_for_the_tokenizers_of_packages(page: Any) -> None:
    assert "WRONG" not in page.section()


def test_checks_notice_completions_that_are_decoded_alone(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(tokenizer: Any, prompt_ids: list[int], completion_ids: list[int]) -> str:
        return str(tokenizer.decode(completion_ids, skip_special_tokens=True))

    monkeypatch.setattr(text_task, "decode_continuation", alone)
    checks: dict[str, Callable[[Any], bool]] = page.CHECKS
    for name in ("first space in rewards", "stop strings", "special stop strings", "turns of games"):
        assert page.outcome(checks[name], page.with_template(llama())) == "WRONG"
