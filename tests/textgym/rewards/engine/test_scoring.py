"""The reward protocol: what a reward function may take and return, and what is said about one that breaks it."""

from __future__ import annotations

import asyncio
import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.engine.scoring import RewardError, Scorer, Scores, load_reward
from textgym.rewards.functions import completion_length
from textgym.rewards.models import RewardModel


def returning(values: Any) -> Callable[..., Any]:
    def given(completions: list[str]) -> Any:
        return values

    return given


def scores_of(values: Any, finished: Finished) -> Scores:
    return Scorer(returning(values))(finished)


# --- what a function takes ---


def text_length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def correct(completions: list[str], answer: list[str]) -> list[bool]:
    return [text.strip() == right for text, right in zip(completions, answer, strict=True)]


def trl_style(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **kwargs: Any
) -> list[float]:
    assert sorted(kwargs) == ["answer", "log_extra", "log_metric", "prompt_ids", "trainer_state"]
    return [float(len(ids)) for ids in completion_ids]


class Brevity:
    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, *, completion_ids: list[list[int]]) -> list[float]:
        return [float(self.limit - len(ids)) for ids in completion_ids]


async def slow_length(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return text_length(completions)


class SlowBrevity(Brevity):
    async def __call__(self, *, completion_ids: list[list[int]]) -> list[float]:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().__call__(completion_ids=completion_ids)


@pytest.mark.parametrize(
    ("reward", "name", "expected"),
    [
        (text_length, "text_length", [2, 5]),
        (correct, "correct", [1, 0]),
        (trl_style, "trl_style", [1, 3]),
        (completion_length, "completion_length", [1, 3]),
        (Brevity(4), "Brevity", [3, 1]),
        (functools.partial(text_length), "partial", [2, 5]),
        (slow_length, "slow_length", [2, 5]),
        (SlowBrevity(4), "SlowBrevity", [3, 1]),
        ("textgym.rewards.functions:completion_length", "completion_length", [1, 3]),
    ],
)
def test_forms_of_a_reward_function(reward: Any, name: str, expected: list[float], finished: Finished) -> None:
    scores = Scorer(reward)(finished)
    assert scores.score.tolist() == expected
    assert scores.score.dtype == np.float64
    assert {key: values.tolist() for key, values in scores.components.items()} == {name: expected}
    assert [row[-1] for row in scores.rewards] == expected


def test_async_function_under_a_running_loop(finished: Finished) -> None:
    """As in a notebook, whose cells run inside a loop."""

    async def cell() -> Scores:
        return Scorer(slow_length)(finished)

    assert asyncio.run(cell()).score.tolist() == [2, 5]


def test_reward_model_by_name_reads_ids_of_its_own_tokenizer(finished: Finished) -> None:
    function = load_reward("tiny")
    assert isinstance(function, RewardModel)
    scorer = Scorer(function, tokenizer=function.tokenizer)
    assert function.shared_ids
    other = Finished(["?", "?"], ["?", "?"], finished.prompt_ids, finished.completion_ids, {})
    np.testing.assert_array_equal(scorer(finished).score, scorer(other).score)
    assert scorer.names == ["reward_model"]


# --- what a function returns ---


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5],
        (1.0, 0.5),
        np.array([1, 0.5]),
        np.array([1, 0.5], dtype=np.float32),
        torch.tensor([1, 0.5], requires_grad=True),
        torch.tensor([1, 0.5], dtype=torch.bfloat16),
        [torch.tensor(1.0), np.float32(0.5)],
        [[torch.tensor(1.0)], [np.float32(0.5), torch.tensor(0.0), 0]],
    ],
    ids=["ints", "tuple", "array", "float32", "tensor", "bfloat16", "scalars", "scalars of tokens"],
)
def test_numbers_of_any_kind(values: Any, finished: Finished) -> None:
    assert scores_of(values, finished).score.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("values", [[True, False], np.array([True, False]), torch.tensor([True, False])])
def test_booleans_are_one_and_zero(values: Any, finished: Finished) -> None:
    assert scores_of(values, finished).score.tolist() == [1.0, 0.0]


def test_none_leaves_a_row_out_of_that_function(finished: Finished) -> None:
    scores = Scorer([returning([None, 2.0]), text_length])(finished)
    assert scores.score.tolist() == [2.0, 7.0]
    np.testing.assert_array_equal(scores.components["given"], [math.nan, 2.0])


def test_token_level_rewards(finished: Finished) -> None:
    scores = scores_of([[0.5], [1, 2, -4]], finished)
    assert scores.score.tolist() == [0.5, -1.0]
    assert [row.tolist() for row in scores.rewards] == [[0.5], [1.0, 2.0, -4.0]]
    assert scores.components["given"].tolist() == [0.5, -1.0]


def test_token_level_beside_whole_scores_and_none(finished: Finished) -> None:
    scores = Scorer([returning([None, np.array([1.0, 2.0, 3.0])]), text_length], [2.0, 1.0])(finished)
    assert scores.score.tolist() == [2.0, 17.0]
    assert [row.tolist() for row in scores.rewards] == [[2.0], [2.0, 4.0, 11.0]]


# --- several functions ---


def test_weights(finished: Finished) -> None:
    scores = Scorer([text_length, correct], [0.5, -1.0])(finished)
    assert scores.score.tolist() == [0.0, 2.5]
    assert scores.components["text_length"].tolist() == [2.0, 5.0]


def test_weight_zero_is_only_reported(finished: Finished) -> None:
    scores = Scorer([text_length, returning([100.0, -100.0])], [1.0, 0.0])(finished)
    assert scores.score.tolist() == [2.0, 5.0]
    assert scores.components["given"].tolist() == [100.0, -100.0]


def test_names_are_made_unique() -> None:
    def given_3(completions: list[str]) -> None: ...

    functions = [returning(None), given_3, returning(None), returning(None), Brevity(1), Brevity(2)]
    assert Scorer(functions).names == ["given", "given_3", "given_2", "given_4", "Brevity", "Brevity_2"]


def test_a_scorer_of_plain_functions_is_pickled(finished: Finished) -> None:
    scorer = pickle.loads(pickle.dumps(Scorer([completion_length, len_of_prompts], [1.0, 2.0])))
    assert scorer(finished).score.tolist() == [15.0, 17.0]


def len_of_prompts(prompts: list[str]) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


# --- what breaks the contract ---

FIRST = r"row 0 \(prompt '2 \+ 2 =', completion ' 4'\)"
SECOND = r"row 1 \(prompt '3 \+ 4 =', completion ' 8 or'\)"


@pytest.mark.parametrize("value", [1e39, -1e39, 10**39])
def test_rewards_beyond_float32_are_refused_and_not_paid_as_infinite(value: float) -> None:
    with pytest.raises(RewardError, match="beyond the largest number of float32"):
        Scorer(lambda completions: [value])(Finished(["a"], ["b"], [[1]], [[2]], {}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], f"must return a list of 2 values.*; got 1 values.*{FIRST}"),
        ([1.0, 2.0, 3.0], f"must return a list of 2 values.*; got 3 values.*{FIRST}"),
        (3.0, f"must return a list of 2 values.*; got 3.0.*{FIRST}"),
        (None, f"must return a list of 2 values.*; got None.*{FIRST}"),
        ("ab", f"must return a list of 2 values.*; got 'ab'.*{FIRST}"),
        ({0: 1.0, 1: 2.0}, f"must return a list of 2 values.*; got .*{FIRST}"),
        (torch.tensor(1.0), f"must return a list of 2 values.*; got 1.0.*{FIRST}"),
        ([0.0, math.nan], f"returned nan, not a finite number, for {SECOND}"),
        ([-math.inf, 0.0], f"returned -inf, not a finite number, for {FIRST}"),
        (torch.tensor([0.0, torch.nan]), f"returned nan, not a finite number, for {SECOND}"),
        ([0.0, "1.0"], f"returned '1.0', not a finite number, for {SECOND}"),
        ([0.0, {}], rf"returned \{{\}}, not a finite number, for {SECOND}"),
        ([0.0, 10**400], f"returned 1000*, not a finite number, for {SECOND}"),
        ([0.0, torch.zeros((), device="meta")], f"returned a Tensor that cannot be read .* for {SECOND}"),
        ([0.0, 1j], f"returned 1j, not a finite number, for {SECOND}"),
        ([[0.0], [1.0, 2.0]], f"returned 2 token-level rewards for the 3 completion tokens of {SECOND}"),
        ([[], [1.0, 2.0, 3.0]], f"returned 0 token-level rewards for the 1 completion tokens of {FIRST}"),
        ([[0.0], [1.0, None, 3.0]], f"returned None, not a finite number, for {SECOND}"),
        ([[0.0], [1.0, math.inf, 3.0]], f"returned inf, not a finite number, for {SECOND}"),
    ],
)
def test_wrong_returns_are_named(values: Any, message: str, finished: Finished) -> None:
    with pytest.raises(RewardError, match=f"^reward function 'given' {message}"):
        scores_of(values, finished)


def test_exceptions_are_named(finished: Finished) -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("no such thing")

    async def broken_later(completions: list[str]) -> list[float]:
        raise OSError("unreachable")

    for function, cause in ((broken, "KeyError: 'no such thing'"), (broken_later, "OSError: unreachable")):
        message = f"^reward function '{function.__name__}' raised {cause} while scoring 2 rows, the first being {FIRST}"
        with pytest.raises(RewardError, match=message) as caught:
            Scorer([text_length, function])(finished)
        assert isinstance(caught.value.__cause__, KeyError | OSError)


def test_a_column_that_the_prompts_lack(finished: Finished) -> None:
    def graded(completions: list[str], grade: list[float]) -> list[float]:
        return grade

    with pytest.raises(
        RewardError, match=r"'graded' cannot be called: missing .* 'grade'. It is offered answer, prompts"
    ):
        Scorer(graded)(finished)


def test_a_tensor_that_holds_no_numbers(finished: Finished) -> None:
    """Tensors of any device are read; the meta device stands for one that cannot be."""
    with pytest.raises(RewardError, match=f"'given' returned a Tensor that cannot be read .*{FIRST}"):
        scores_of(torch.zeros(2, device="meta"), finished)


def test_an_answer_that_comes_too_late(finished: Finished) -> None:
    async def asleep(completions: list[str]) -> list[float]:
        await asyncio.sleep(60)
        return [0.0, 0.0]

    async def gave_up(completions: list[str]) -> list[float]:
        raise TimeoutError("the service did")

    with pytest.raises(
        RewardError, match=rf"'asleep' did not answer within 0.05 s for 2 rows.*{FIRST}: raise reward_timeo"
    ):
        Scorer(asleep, timeout=0.05)(finished)
    with pytest.raises(RewardError, match="'gave_up' raised TimeoutError: the service did"):
        Scorer(gave_up, timeout=10.0)(finished)


def test_interrupts_pass_through(finished: Finished) -> None:
    def interrupted(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Scorer(interrupted)(finished)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "reward is empty: give a reward function"),
        (([text_length], [1.0, 2.0]), "reward_weights has 2 values for 1 reward functions"),
        (([3],), "a reward is a function, a 'module:attribute' string or a reward model, got 3"),
        (("textgym.rewards.functions:nothing",), "has no 'nothing'"),
        (("no_such_module:f",), "there is no module 'no_such_module'"),
        ((str(Path("no") / "such" / "folder"),), "cannot load a model called"),
    ],
)
def test_bad_arguments_are_explained(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer(*arguments)
