"""Time limits of reward functions, the threads that keep them, and runs in which too many rows fail."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable

import gymnasium as gym
import pytest
import torch

from textgym.rewards.engine import background
from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.engine.failures import FIRST_ROWS
from textgym.rewards.engine.scoring import RewardError, Scorer


def works(completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def spins(completions: list[str]) -> list[float]:
    while True:
        pass


def sleeps(completions: list[str]) -> list[float]:
    while True:
        time.sleep(0.01)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("textgym-rewards")]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return condition()


def test_a_plain_function_that_hangs_is_late_and_its_thread_ends(finished: Finished) -> None:
    scorer = Scorer(spins, timeout=0.05)
    with pytest.raises(RewardError, match=r"'spins' did not answer within 0.05 s for 2 rows, the first being row 0"):
        scorer(finished)
    assert eventually(lambda: not threads()), "it still spins"


def test_one_that_hangs_leaves_the_others_their_answers(finished: Finished) -> None:
    async def answers(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [2.0, 3.0]

    # One that spins would take turns with the others, which on a busy machine would be late, too.
    scorer = Scorer([sleeps, works, answers], timeout=1.5, on_error="penalise")
    with pytest.warns(UserWarning, match="'sleeps' did not answer within"):
        scores = scorer(finished)
    assert scores.raw.tolist() == [-1.0 + 1.0 + 2.0, -1.0 + 1.0 + 3.0]
    assert scorer.errors == {"sleeps": 2, "works": 0, "answers": 0}


def test_a_plain_function_sees_the_state_of_the_callers_thread(finished: Finished) -> None:
    seen = []

    def looks(completions: list[str]) -> list[float]:
        seen.append((torch.is_grad_enabled(), threading.current_thread()))
        return [0.0, 0.0]

    scorer = Scorer(looks, timeout=20.0)
    with torch.no_grad():
        scorer(finished)
    scorer(finished)
    assert [gradients for gradients, _ in seen] == [False, True]
    assert seen[0][1] is seen[1][1], "calls have one thread, so that a connection can be kept"
    Scorer(looks)(finished)
    assert seen[2][1] is threading.current_thread(), "without a limit there is no other thread"


def test_what_a_late_function_waits_for_is_a_failure_of_its_own(finished: Finished) -> None:
    def gives_up(completions: list[str]) -> list[float]:
        raise TimeoutError("the judge is busy")

    with pytest.raises(RewardError, match=r"'gives_up' raised TimeoutError: the judge is busy"):
        Scorer(gives_up, timeout=20.0)(finished)


def test_threads_end_with_the_environment() -> None:
    async def answers(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    env = gym.make_vec(
        "textgym:textgym/Text-v0",
        num_envs=2,
        prompts=["a"],
        tokenizer="tiny",
        reward=[works, answers],
        reward_timeout=20.0,
        max_new_tokens=1,
    )
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert eventually(lambda: len(threads()) == 2), "those of earlier tests end when their late functions return"
    env.close()
    assert eventually(lambda: not threads())


def test_a_scorer_may_be_released_while_the_thread_of_the_loop_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new thread may begin with a garbage collection, which releases scorers, while its starter waits for it."""
    shared, released = background.SharedLoop(), threading.Event()

    def release() -> None:
        shared.release(1)
        released.set()

    class Collecting(threading.Thread):
        def start(self) -> None:
            super().start()
            if self.name == "textgym-rewards-async":
                threading.Thread(target=release).start()
                assert released.wait(30)

    monkeypatch.setattr(background.threading, "Thread", Collecting)
    shared.take(2)
    assert released.is_set()
    shared.release(2)


def test_threads_end_with_a_scorer_that_nobody_closed(finished: Finished) -> None:
    async def answers(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    kept = Scorer(answers)
    kept(finished)
    Scorer([works, answers], timeout=20.0)(finished)
    assert eventually(lambda: len(threads()) == 1), "the loop is shared with the other one"
    del kept
    assert eventually(lambda: not threads())


# --- too many failures ---


def rows(number: int) -> Finished:
    return Finished(["p"] * number, ["c"] * number, [[1]] * number, [[2]] * number, {})


def failing(share: float) -> Callable[[list[str]], list[float]]:
    def judge(completions: list[str]) -> list[float]:
        failed = round(share * len(completions))
        return [float("nan")] * failed + [1.0] * (len(completions) - failed)

    return judge


@pytest.mark.filterwarnings("ignore:.*said once")
@pytest.mark.parametrize("mode", ["skip", "penalise"])
def test_a_run_stops_when_too_many_rows_fail(mode: str) -> None:
    Scorer(failing(0.1), on_error=mode)(rows(100))  # type: ignore[arg-type]
    with pytest.raises(RewardError, match=r"failed in 11 of the last 100 rows, 11%, and max_reward_failures=0.1"):
        Scorer(failing(0.11), on_error=mode)(rows(100))  # type: ignore[arg-type]
    Scorer(failing(0.5), on_error=mode, max_failures=0.5)(rows(100))  # type: ignore[arg-type]


def test_rows_without_an_opinion_have_not_failed() -> None:
    scorer = Scorer(lambda completions: [None] * len(completions), on_error="skip")
    assert scorer.failures.share == 0, "before the first row"
    assert not scorer(rows(200)).scored.any()
    assert scorer.failures.share == 0


@pytest.mark.parametrize(("size", "counted"), [(40, 1000), (70, 1400), (300, 6000)])
def test_the_share_is_that_of_a_thousand_rows_or_of_twenty_calls(size: int, counted: int) -> None:
    scorer = Scorer(failing(0.0), on_error="skip")
    for _ in range(60):
        scorer(rows(size))
    assert scorer.failures.rows == counted


def test_a_long_call_counts_until_a_thousand_rows_have_followed() -> None:
    scorer = Scorer(failing(0.0), on_error="skip")
    scorer(rows(500))
    for _ in range(24):
        scorer(rows(40))
    assert scorer.failures.rows == 500 + 24 * 40
    scorer(rows(40))
    assert scorer.failures.rows == 25 * 40


@pytest.mark.filterwarnings("ignore:.*said once")
def test_one_lost_batch_of_a_long_run_is_no_outage_and_three_are() -> None:
    down = [False]

    def judge(completions: list[str]) -> list[float]:
        if down[0]:
            raise ConnectionError("refused")
        return [1.0] * len(completions)

    scorer = Scorer(judge, on_error="skip")
    for _ in range(20):
        scorer(rows(100))
    down[0] = True
    scorer(rows(100))
    down[0] = False
    for _ in range(20):
        scorer(rows(100))
    assert scorer.failures.share == 0, "it is forgotten"
    down[0] = True
    for _ in range(2):
        scorer(rows(100))
    with pytest.raises(RewardError, match=r"rows in all: 'judge' 400"):
        scorer(rows(100))


@pytest.mark.filterwarnings("ignore:.*said once")
def test_of_few_rows_no_share_is_judged() -> None:
    scorer = Scorer(failing(1.0), on_error="skip")
    for _ in range(FIRST_ROWS - 1):
        scorer(rows(1))
    with pytest.raises(RewardError, match="max_reward_failures"):
        scorer(rows(1))
