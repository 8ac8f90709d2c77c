"""Reward functions in a process of their own: killed when late or too large, restarted, inputs copied."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from textgym.errors import ConfigError, IsolatedError
from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.engine.scoring import RewardError, Scorer
from textgym.rewards.isolated import Isolated
from textgym.rewards.isolated.process import _checked

MEMORY = 256 * 2**20


# The functions are defined within tests: those of a module are imported in the process, with all that the module needs.


def test_the_values_are_those_of_the_function(finished: Finished) -> None:
    def lengths(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    def by_token(completion_ids: list[list[int]]) -> list[Any]:
        return [np.arange(len(ids)) for ids in completion_ids]

    async def asks(completions: list[str]) -> list[float | None]:
        return [None, 2.0]

    functions = [Isolated(lengths, memory=MEMORY), Isolated(by_token, memory=MEMORY), Isolated(asks, memory=MEMORY)]
    scores, direct = Scorer(functions)(finished), Scorer([lengths, by_token, asks])(finished)
    np.testing.assert_equal(scores.components, direct.components)
    assert [row.tolist() for row in scores.rewards] == [row.tolist() for row in direct.rewards]
    for function in functions:
        function.close()


def test_one_process_answers_all_calls_until_the_scorer_is_closed(finished: Finished) -> None:
    def process_of(completions: list[str]) -> list[float]:
        return [float(os.getpid())] * len(completions)

    scorer = Scorer(Isolated(process_of, memory=MEMORY))
    [first, _], [second, _] = scorer(finished).raw.tolist(), scorer(finished).raw.tolist()
    assert first == second != os.getpid()
    scorer.close()
    assert not psutil.pid_exists(int(first))


def test_inputs_are_copies(finished: Finished) -> None:
    def spoils(completions: list[str]) -> list[float]:
        completions.clear()
        return [0.0, 0.0]

    completions = ["a", "b"]
    with_copy = Isolated(spoils, memory=MEMORY)
    assert with_copy(completions=completions) == [0.0, 0.0]
    assert completions == ["a", "b"]
    with_copy.close()


def test_what_a_function_logs_arrives(finished: Finished) -> None:
    def logs(completions: list[str], log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("share", np.float32(0.5))
        log_extra("seen", completions)
        return [1.0] * len(completions)

    scorer = Scorer(Isolated(logs, memory=MEMORY))
    scores = scorer(finished)
    assert scores.metrics == {"share": 0.5}
    assert scores.columns == {"seen": finished.completions}
    scorer.close()


def test_a_late_call_is_killed_with_what_it_started_and_the_next_has_a_new_process(tmp_path: Path) -> None:
    def hangs(completions: list[str], where: str) -> list[float]:
        if completions == ["ok"]:
            return [1.0]
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(where).write_text(str(child.pid))
        while True:
            time.sleep(0.01)

    function = Isolated(hangs, timeout=600.0, memory=2**30)
    assert function(completions=["ok"], where="") == [1.0]
    pid = tmp_path / "pid"
    for seconds in (1.0, 10.0, 100.0):  # on a busy machine it may be killed before it has started anything
        function.timeout = seconds
        with pytest.raises(IsolatedError, match=rf"took longer than timeout={seconds:g} s: its process was killed"):
            function(completions=["no"], where=str(pid))
        if pid.exists() and pid.read_text():
            break
    _wait_for_end(int(pid.read_text()))
    function.timeout = 600.0
    assert function(completions=["ok"], where="") == [1.0]
    function.close()


def test_a_call_that_needs_too_much_memory_is_killed() -> None:
    def grows(completions: list[str]) -> list[float]:
        kept = []
        while True:
            kept.append(bytearray(2**20))

    function = Isolated(grows, timeout=60.0, memory=MEMORY)
    with pytest.raises(IsolatedError, match=rf"bytes, more than memory={MEMORY:,}: its process was killed"):
        function(completions=["a"])
    function.close()


def test_an_exception_a_crash_and_a_result_that_is_no_result_fail_the_rows(finished: Finished) -> None:
    def raises(completions: list[str]) -> list[float]:
        raise KeyError("gone")

    def leaves(completions: list[str]) -> list[float]:
        os._exit(3)

    def returns_objects(completions: list[str]) -> list[Any]:
        return [object(), object()]

    for function, words in (
        (raises, "'raises' raised IsolatedError: KeyError: 'gone'"),
        (leaves, r"'leaves' raised IsolatedError: a call ended its process \(exit code 3\)"),
        (returns_objects, "IsolatedError: TypeError: Object of type object is not JSON"),
    ):
        scorer = Scorer(Isolated(function, memory=MEMORY))
        with pytest.raises(RewardError, match=words):
            scorer(finished)
        scorer.close()


@pytest.mark.parametrize(
    "content",
    [b'{"values": []', b"[]", b"3", b'{"values": [1.0]}', b'{"values": [], "logged": [], "error": "x"}', b'{"a": 1}'],
)
def test_an_answer_of_another_form_is_refused(content: bytes) -> None:
    with pytest.raises(IsolatedError, match="the process answered with something that is not"):
        _checked(content)


def test_the_process_ends_with_the_run(tmp_path: Path) -> None:
    """However the run ends: here by SIGKILL, while the function works."""
    script = """
import pathlib, sys, time
from textgym.rewards.isolated import Isolated

def works(completions):
    import os
    pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else WHERE).write_text(str(os.getpid()))
    time.sleep(600)

WHERE = sys.argv[1]
Isolated(works, timeout=600.0)(completions=["a"])
"""
    where = tmp_path / "pid"
    run = subprocess.Popen([sys.executable, "-c", script, str(where)])
    deadline = time.monotonic() + 120
    while not where.exists() or not where.read_text():
        assert time.monotonic() < deadline, "it did not start"
        time.sleep(0.05)
    run.kill()
    run.wait()
    _wait_for_end(int(where.read_text()))


def test_arguments_are_checked_and_a_function_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigError, match=r"memory must be a number of bytes, at least 67108864"):
        Isolated(len, memory=512)
    with pytest.raises(ConfigError, match="timeout must be above 0"):
        Isolated(len, timeout=0.0)

    class Unloadable:
        __name__ = "unloadable"

        def __reduce__(self) -> Any:
            return int, ("not a number",)

        def __call__(self, completions: list[str]) -> list[float]:
            return [0.0]

    with pytest.raises(IsolatedError, match="'unloadable' cannot be imported in another process"):
        Isolated(Unloadable())(completions=["a"])


def test_a_process_may_have_two_gibibytes_if_not_told_otherwise() -> None:
    assert Isolated(len).memory == 2 * 1024**3
    assert Isolated(len, memory=64 * 1024**2).memory == 64 * 1024**2, "the smallest"


def test_an_isolated_function_is_pickled_without_its_process() -> None:
    function = Isolated(json.dumps, timeout=7.0, memory=MEMORY)
    assert function(obj=["abc"]) == '["abc"]'
    copy = pickle.loads(pickle.dumps(function))
    assert (copy.timeout, copy.memory, copy(obj=[1])) == (7.0, MEMORY, "[1]")
    function.close()
    copy.close()


def _wait_for_end(pid: int) -> None:
    """Wait for a process that was killed: a busy machine takes its time."""
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it outlived the run"
        time.sleep(0.05)
