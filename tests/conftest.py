"""What every test runs under: no network, the same random examples in every run, and what `make test` leaves out.

The fixtures are in fixtures.py.
"""

from __future__ import annotations

import gc
import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: an unknown name fails at once, with no request
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest

if importlib.util.find_spec("hypothesis") is not None:  # the tests of `make gpu` do without
    from hypothesis import HealthCheck, settings

    # The same examples on every machine and in every run; a busy machine may be slow.
    patient = [HealthCheck.too_slow]
    settings.register_profile(
        "textgym", deadline=None, max_examples=30, derandomize=True, suppress_health_check=patient
    )
    settings.load_profile("textgym")

LONGER_TESTS = Path(__file__).parent / "longer_tests.txt"
"""Test functions that take more than a moment; `python scripts/checks/longer_tests.py` writes the file."""
MORE_CASES = Path(__file__).parent / "more_cases.txt"
"""Cases of parametrized tests that are slow tests, since others of the same function take a quarter of a second."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help=f"leave out the tests that {LONGER_TESTS.name} names")
    parser.addoption("--all-cases", action="store_true", help=f"the cases that {MORE_CASES.name} names are not slow")


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, unless this process only hands out the tests to workers: it starts without torch, at once."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    spec = importlib.util.spec_from_file_location("tests.fixtures", Path(__file__).with_name("fixtures.py"))
    assert spec is not None
    assert spec.loader is not None
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    config.pluginmanager.register(fixtures)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-cases"):
        more_cases = set(MORE_CASES.read_text().splitlines())
        for item in items:
            if item.nodeid in more_cases:
                item.add_marker(pytest.mark.slow)
    if not config.getoption("--fast"):
        return
    longer = set(LONGER_TESTS.read_text().splitlines())
    left_out = [item for item in items if item.nodeid.split("[")[0] in longer]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid.split("[")[0] not in longer]


def pytest_collection_finish() -> None:
    """Exempt all that is imported so far from garbage collection, which would look at it again and again."""
    gc.collect()
    gc.freeze()
