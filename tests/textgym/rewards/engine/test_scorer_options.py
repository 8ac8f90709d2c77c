"""What a Scorer does beyond the protocol: failures, async functions, logs, functions as TRL's users write, scaling."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from textgym.rewards.engine.calling import Caller
from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.engine.scaling import RunningScale
from textgym.rewards.engine.scoring import RewardError, Scorer


def text_length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


# --- what is done about failures ---


def half_broken(completions: list[str]) -> list[float]:
    return [math.nan, 3.0]


def broken(completions: list[str]) -> list[float]:
    raise KeyError("gone")


@pytest.mark.parametrize(("mode", "expected"), [("penalise", [2 - 2.0 - 2.0, 5 + 6.0 - 2.0]), ("skip", [0.0, 0.0])])
def test_failures_are_counted_and_lived_with(mode: Any, expected: list[float], finished: Finished) -> None:
    scorer = Scorer([text_length, half_broken, broken], [1.0, 2.0, 2.0], on_error=mode)
    with pytest.warns(UserWarning, match="on_reward_error=.*said once, then counted") as said:
        scores = scorer(finished)
    assert len(said) == 2
    assert scores.score.tolist() == expected
    assert scores.scored.tolist() == [mode == "penalise"] * 2
    assert scores.errors.tolist() == [2, 1]
    scorer(finished)  # a warning now would be an error
    assert scorer.errors == {"text_length": 0, "half_broken": 2, "broken": 4}
    assert math.isnan(scores.components["broken"][0]) == (mode == "skip")


def no_opinion_on_the_first(completions: list[str]) -> list[float | None]:
    return [None, 4.0]


@pytest.mark.filterwarnings("ignore:reward function:UserWarning")
@pytest.mark.parametrize(
    ("functions", "weights", "scored", "score"),
    [
        ([no_opinion_on_the_first], None, [False, True], [0.0, 4.0]),
        ([no_opinion_on_the_first, text_length], None, [True, True], [2.0, 9.0]),
        ([half_broken], None, [False, True], [0.0, 3.0]),
        ([text_length, half_broken], None, [False, True], [0.0, 8.0]),
        ([text_length, half_broken], [1.0, 0.0], [True, True], [2.0, 5.0]),
        ([no_opinion_on_the_first, text_length], [1.0, 0.0], [False, True], [0.0, 4.0]),
        ([text_length], [0.0], [True, True], [0.0, 0.0]),
    ],
    ids=["none", "others answered", "failed", "one failed", "a reported one failed", "only reported", "no weight"],
)
def test_a_row_has_a_score_if_a_function_answered_and_none_failed(
    functions: list[Any], weights: Any, scored: list[bool], score: list[float], finished: Finished
) -> None:
    scores = Scorer(functions, weights, on_error="skip")(finished)
    assert scores.scored.tolist() == scored
    assert scores.score.tolist() == score
    assert np.isnan(scores.raw).tolist() == [not flag for flag in scored]
    assert [float(row.sum()) for row in scores.rewards] == score


@pytest.mark.parametrize("scaling", ["running", "running_std"])
def test_rows_without_a_score_do_not_move_the_running_scale(scaling: Any, finished: Finished) -> None:
    scorer = Scorer(no_opinion_on_the_first, scaling=scaling)
    scores = scorer(finished)
    assert (scorer.scale.count, scorer.scale.mean) == (1, 4.0)
    assert scores.score[0] == 0.0
    assert not scores.rewards[0].any()


@pytest.mark.parametrize("score", [100.3, -99_999.9, 1e12, 1e-12, 0.0])
def test_scaling_sees_no_deviation_in_equal_scores(score: float) -> None:
    scale = RunningScale("running_std")
    for size in (1, 3, 7, 100):
        paid, _ = scale(np.full(size, score))
        assert (paid == score).all()
    scale.take_moments(*scale.moments())  # as several processes add them up
    assert scale.std == 1.0


def test_a_function_that_cannot_be_called_is_never_lived_with(finished: Finished) -> None:
    def graded(completions: list[str], grade: list[float]) -> list[float]:
        return grade

    with pytest.raises(RewardError, match="cannot be called"):
        Scorer(graded, on_error="skip")(finished)


# --- async functions ---


def test_async_functions_of_a_batch_run_beside_each_other(finished: Finished) -> None:
    """Each waits for the other to have begun: one after the other they would never end."""
    begun = [asyncio.Event(), asyncio.Event()]

    async def first(completions: list[str]) -> list[float]:
        begun[0].set()
        await begun[1].wait()
        return [1.0, 1.0]

    async def second(completions: list[str]) -> list[float]:
        begun[1].set()
        await begun[0].wait()
        return [2.0, 2.0]

    assert Scorer([first, text_length, second], timeout=20.0)(finished).score.tolist() == [5.0, 8.0]


def test_when_one_function_fails_the_others_are_called_off(finished: Finished) -> None:
    called_off = threading.Event()

    async def waits(completions: list[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            called_off.set()
            raise
        return [0.0, 0.0]

    with pytest.raises(RewardError, match="'half_broken' returned nan"):
        Scorer([half_broken, waits])(finished)
    assert called_off.wait(timeout=10)


def test_async_functions_share_one_loop_between_calls(finished: Finished) -> None:
    """As clients and semaphores need, which belong to the loop that they were made in."""
    loops: list[Any] = []

    async def client(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0, 0.0]

    scorer = Scorer(client)
    scorer(finished)
    scorer(finished)
    assert loops[0] is loops[1]


# --- what functions log ---


def test_functions_log_metrics_and_columns(finished: Finished) -> None:
    def logs(completions: list[str], log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("accuracy", 0.25)
        log_metric("accuracy", 0.75)
        log_extra("upper", [text.upper() for text in completions])
        return [0.0, 1.0]

    scores = Scorer(logs)(finished)
    assert scores.metrics == {"accuracy": 0.5}
    assert scores.columns == {"upper": [" 4", " 8 OR"]}

    def too_few(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("upper", ["one"])
        return [0.0, 1.0]

    with pytest.raises(RewardError, match=r"'too_few' gave log_extra.'upper'. 1 values for 2 completions"):
        Scorer(too_few)(finished)


def test_trainer_state_is_handed_on(finished: Finished) -> None:
    def curriculum(completions: list[str], trainer_state: Any) -> list[float]:
        return [float(trainer_state.global_step)] * len(completions)

    scorer = Scorer(curriculum)
    scorer.trainer_state = SimpleNamespace(global_step=7)
    assert scorer(finished).score.tolist() == [7.0, 7.0]


# --- the functions that TRL's documentation describes, written anew from their descriptions ---


def test_functions_as_in_trl_documentation() -> None:
    def longer_in_tokens(completions_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(len(ids)) for ids in completions_ids]

    def longer_in_characters(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def boxed(completions: list[str], ground_truth: list[str], **kwargs: Any) -> list[float]:
        found = [re.search(r"boxed\{(.*?)\}", text) for text in completions]
        return [float((m.group(1) if m else "") == truth) for m, truth in zip(found, ground_truth, strict=True)]

    def only_maths(prompts: list[str], completions: list[str], task: list[str], **kwargs: Any) -> list[float | None]:
        return [1.0 if kind == "math" else None for kind in task]

    async def remote(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0.001)
        return [1.0 if text else 0.0 for text in completions]

    def logging(completions: list[str], log_extra: Any = None, log_metric: Any = None, **kwargs: Any) -> list[int]:
        if log_extra:
            log_extra("length", [len(text) for text in completions])
        if log_metric:
            log_metric("mean_length", sum(map(len, completions)) / len(completions))
        return [len(text) for text in completions]

    finished = Finished(
        ["2x + 3 = 7.", "Sort a list."],
        [" boxed{2}", ""],
        [[1], [2]],
        [[3, 4, 5], [6]],
        {"ground_truth": ["2", "5"], "task": ["math", "code"]},
    )
    functions = [longer_in_tokens, longer_in_characters, boxed, only_maths, remote, logging]
    scores = Scorer(functions)(finished)
    expected = [[3, 1], [9, 0], [1, 0], [1, math.nan], [1, 0], [9, 0]]
    np.testing.assert_array_equal(list(scores.components.values()), expected)
    assert scores.metrics == {"mean_length": 4.5}


def test_a_format_function_of_conversations_as_in_trl_documentation() -> None:
    def thinks_first(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
        pattern = r"^<think>.*?</think><answer>.*?</answer>$"
        return [1.0 if re.match(pattern, completion[0]["content"]) else 0.0 for completion in completions]

    said = ["<think>3 x 4</think><answer>12</answer>", "It is 8."]
    prompts: list[Any] = [[{"role": "user", "content": "(1 + 2) * 4?"}]] * 2
    completions: list[Any] = [[{"role": "assistant", "content": text}] for text in said]
    scores = Scorer(thinks_first)(Finished(prompts, completions, [[1]] * 2, [[2]] * 2, {}))
    assert scores.score.tolist() == [1.0, 0.0]


# --- scaling ---


def test_running_scale_is_that_of_all_scores_so_far() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(3.0, 2.0, size) for size in (1, 5, 7, 100)]
    scale = RunningScale("running")
    for index, batch in enumerate(batches):
        paid, factor = scale(batch)
        seen = np.concatenate(batches[: index + 1])
        deviation = seen.std() if index else 1.0
        np.testing.assert_allclose(paid, (batch - seen.mean()) / deviation, atol=1e-9)
        assert factor == pytest.approx(1 / deviation)
    only_divided, _ = RunningScale("running_std")(batches[2])
    np.testing.assert_allclose(only_divided, batches[2] / batches[2].std())
    assert RunningScale("running")(np.full(3, 5.0))[0].tolist() == [0.0, 0.0, 0.0]


def test_scores_are_scaled_then_clipped_and_the_raw_ones_reported(finished: Finished) -> None:
    def by_token(completions: list[str]) -> list[list[float]]:
        return [[4.0], [0.0, 0.0, -4.0]]

    scores = Scorer(by_token, scaling="running", clip=0.5)(finished)
    assert scores.raw.tolist() == [4.0, -4.0]
    assert scores.score.tolist() == [0.5, -0.5]
    # A clipped score shrinks its tokens, so that none has to make up for another.
    assert [row.tolist() for row in scores.rewards] == [[0.5], [0.0, 0.0, -0.5]]


def test_rows_that_nobody_judged_are_no_scores(finished: Finished) -> None:
    def partly(completions: list[str]) -> list[float | None]:
        return [None, 5.0]

    scorer = Scorer([partly, text_length], [1.0, 0.0], scaling="running")
    for _ in range(3):
        scores = scorer(finished)
    assert scores.score.tolist() == [0.0, 0.0]
    assert (scorer.scale.count, scorer.scale.mean) == (3, 5.0)


def test_a_failure_costs_under_a_negative_weight_too(finished: Finished) -> None:
    scorer = Scorer(broken, [-2.0], on_error="penalise")
    with pytest.warns(UserWarning, match="said once"):
        assert scorer(finished).score.tolist() == [-2.0, -2.0]


def test_functions_have_lists_of_their_own(finished: Finished) -> None:
    def spoils(completions: list[str]) -> list[float]:
        completions.clear()
        return [0.0, 0.0]

    assert Scorer([spoils, text_length])(finished).score.tolist() == [2.0, 5.0]


def test_an_async_function_that_blocks_is_given_up(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textgym.rewards.engine.calling.GRACE", 0.05)

    given_up, went_on = threading.Event(), threading.Event()

    async def blocks(completions: list[str]) -> list[float]:
        try:
            given_up.wait(timeout=100)
        finally:  # an exception ends it, since nobody waits for it any more
            went_on.set()
        return [0.0, 0.0]

    with pytest.raises(RewardError, match=r"'blocks' did not answer within 0.05 s"):
        Scorer(blocks, timeout=0.05)(finished)
    assert not went_on.is_set(), "it was waited for"
    given_up.set()
    assert went_on.wait(timeout=100)


def test_one_that_blocks_is_named_and_later_calls_have_a_fresh_loop(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textgym.rewards.engine.calling.GRACE", 0.05)
    released = threading.Event()

    async def blocks(completions: list[str]) -> list[float]:
        released.wait(timeout=100)
        return [0.0, 0.0]

    async def works(completions: list[str]) -> list[float]:
        return [1.0, 2.0]

    # The one that blocks comes first in the loop, the one that suffers is waited for first.
    caller = Caller(timeout=0.05)
    caller.start("blocks", blocks, {"completions": ["a", "b"]}, finished)
    error = caller.start("works", works, {"completions": ["a", "b"]}, finished).wait()
    assert "'works' did not answer within 0.05 s" in str(error)
    assert "since 'blocks' blocks the event loop" in str(error)
    assert Scorer(works, timeout=20.0)(finished).score.tolist() == [1.0, 2.0], "while the other still blocks"
    released.set()


def test_an_async_function_that_exits_does_not_take_the_loop_with_it(finished: Finished) -> None:
    async def leaves(completions: list[str]) -> list[float]:
        raise SystemExit(3)

    async def works(completions: list[str]) -> list[float]:
        return [1.0, 2.0]

    with pytest.raises(RewardError, match=r"'leaves' raised RuntimeError: SystemExit"):
        Scorer(leaves, timeout=100.0)(finished)
    assert Scorer(works, timeout=100.0)(finished).score.tolist() == [1.0, 2.0]


def test_how_to_scale_is_not_resumed(finished: Finished) -> None:
    first, second = Scorer(text_length, scaling="running"), Scorer(text_length, clip=1.0)
    first(finished)
    second.load_state(first.state())
    assert (second.scale.scaling, second.scale.clip, second.scale.count) == (None, 1.0, 2)


def test_state_goes_on_where_it_stopped(finished: Finished) -> None:
    first, second = (Scorer(text_length, scaling="running", clip=3.0) for _ in range(2))
    first(finished)
    second.load_state(json.loads(json.dumps(first.state())))
    assert second(finished).score.tolist() == first(finished).score.tolist()
    assert second.state() == first.state()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "on_reward_error must be one of"),
        ({"timeout": 0.0}, "reward_timeout must be above 0"),
        ({"scaling": "batch"}, "unknown score_scaling 'batch'"),
        ({"clip": -1.0}, "score_clip must be above 0"),
    ],
)
def test_bad_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer(text_length, **options)


# --- what functions are handed ---


def test_what_a_function_changes_neither_another_one_nor_the_next_call_sees() -> None:
    def tears_apart(prompts: Any, completions: Any, completion_ids: Any, answers: Any) -> list[float]:
        for column in (prompts, completions, completion_ids, answers):
            column[0].pop()
            column.pop()
        return [0.0, 0.0]

    seen: list[Any] = []

    def looks(**columns: Any) -> list[float]:
        seen.append([columns[name] for name in ("prompts", "completions", "completion_ids", "answers")])
        return [0.0, 0.0]

    said = [{"role": "user", "content": "2 + 2?"}, {"role": "user", "content": "Quick!"}]
    finished = Finished(
        [said, said], [[*said], [*said]], [[1], [2]], [[3, 4], [5, 6]], {"answers": [["4", "four"]] * 2}
    )  # type: ignore[arg-type]
    scorer = Scorer([tears_apart, looks])
    for _ in range(2):
        scorer(finished)
    assert seen[0] == seen[1] == [[said] * 2, [said] * 2, [[3, 4], [5, 6]], [["4", "four"]] * 2]


@pytest.mark.parametrize("padding", [0.0, math.nan, None])
def test_token_rewards_are_for_the_tokens_and_not_for_padding(padding: Any, finished: Finished) -> None:
    """A batch of token rewards as wide as the longest completion has too many for a row that ended early."""
    widest = max(len(ids) for ids in finished.completion_ids) + 1

    def as_wide_as_the_batch(completion_ids: list[list[int]]) -> list[list[Any]]:
        return [[1.0] * len(ids) + [padding] * (widest - len(ids)) for ids in completion_ids]

    with pytest.raises(RewardError, match=f"{widest} token-level rewards for the . completion tokens of row 0"):
        Scorer(as_wide_as_the_batch)(finished)
    with pytest.warns(UserWarning, match="token-level rewards"):
        scores = Scorer(as_wide_as_the_batch, on_error="skip")(finished)
    assert not scores.scored.any()
    assert not any(row.any() for row in scores.rewards)
