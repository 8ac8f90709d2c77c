"""docs/metrics.md: it explains each metric that agents log, and no metric that none logs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
NAMES = set(re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE))
UNTRIED = {"loss/ptx_avg"}
"""Metrics that only further data bring about."""


def load_logged() -> Any:
    spec = importlib.util.spec_from_file_location("logged_metrics", HERE / "logged_metrics.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOGGED = load_logged()


def general(names: set[str]) -> set[str]:
    """Names with <name> for that of the reward function."""
    return {re.sub(r"/length/", "/<name>/", name) for name in names}


def test_each_row_of_the_page_is_whole() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(NAMES) > 50
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)


@pytest.mark.parametrize("agent", LOGGED.MAIN)
def test_what_an_agent_logs_is_on_the_page(agent: str) -> None:
    assert general(LOGGED.MAIN[agent]()) <= NAMES


@pytest.mark.slow
def test_what_a_reward_model_logs_is_on_the_page(tmp_path: Path) -> None:
    logged = LOGGED.of_reward_model(tmp_path)
    assert "loss" in logged
    assert logged <= NAMES


@pytest.mark.slow
def test_what_is_on_the_page_is_logged_by_some_agent() -> None:
    logged = {name for run in (*LOGGED.MAIN.values(), *LOGGED.FURTHER.values()) for name in general(run())}
    assert logged == NAMES - UNTRIED
