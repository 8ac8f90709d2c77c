"""assert_close: rounding passes, mistakes do not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from textgym.testing import assert_close, assert_trained_alike, mock_lm, terms_of, tolerance

pytestmark = pytest.mark.numerics


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", [16, 256, 4096])
def test_a_sum_in_any_order_is_close(dtype: torch.dtype, terms: int) -> None:
    """One addition after the other, the order that rounds most; in float16 it stays below the largest number."""
    numbers = torch.rand(200, terms, generator=generator()).to(dtype)
    exact = numbers.double().sum(1)
    for order in (torch.arange(terms), torch.randperm(terms, generator=generator(1))):
        total = torch.zeros(200, dtype=dtype)
        for column in order:
            total += numbers[:, column]
        if dtype != torch.bfloat16 or terms < 4096:  # a bfloat16 sum stops growing: additions are lost, not rounded
            assert_close(total, exact, terms=terms)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_forward_pass_is_close_to_that_in_float64(architecture: str) -> None:
    lm = mock_lm(architecture=architecture)
    ids = torch.randint(250, (8, 40), generator=generator())
    with torch.no_grad():
        log_probs, exact = (model(ids).logits.log_softmax(-1) for model in (lm, copy.deepcopy(lm).double()))
    assert_close(log_probs, exact, terms=terms_of(lm))
    assert (log_probs - exact).abs().max() > 1e-7, "nothing was rounded"


def test_precision_that_was_lost_on_the_way_is_not_rounding() -> None:
    ids = torch.randint(250, (8, 40), generator=generator())
    with torch.no_grad():
        plain = mock_lm()(ids).logits.log_softmax(-1)
        half = mock_lm().bfloat16()(ids).logits.float().log_softmax(-1)
        rough = mock_lm()
        for weight in rough.parameters():  # TF32 keeps 10 bits of a number
            mantissa, exponent = torch.frexp(weight)
            weight.copy_(torch.ldexp((mantissa * 2**11).round() / 2**11, exponent))
        tf32 = rough(ids).logits.log_softmax(-1)
    for log_probs in (half, tf32):
        with pytest.raises(AssertionError, match="differ by more than rounding"):
            assert_close(log_probs, plain, terms=terms_of(rough))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (1.0, 1.00001),
        ([1.0, 2.0], [1.0, 2.00001]),
        (np.array([0.0, 1.0]), np.array([1e-5, 1.0])),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 1.0])),
        (torch.tensor([1.0, 1.0]), torch.tensor([1.0, torch.nan])),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, -torch.inf])),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 2.0])),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.1}),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0}),
        ([torch.ones(2)], [torch.ones(2), torch.ones(3)]),
        ([torch.ones(2), torch.zeros(3)], [torch.ones(2), torch.ones(3)]),
        (torch.ones(2, 1), torch.ones(2)),
        (torch.ones(1), 1.0),
    ],
)
def test_what_is_not_rounding_fails(actual: object, expected: object) -> None:
    with pytest.raises(AssertionError):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    "numbers",
    [
        0.3,
        [0.1, 0.2],
        np.float32(0.1),
        np.array([[0.1, np.inf]]),
        torch.tensor([0.1, torch.nan, -torch.inf]),
        torch.tensor([1, 2]),
        {"a": torch.ones(2), "b": {"c": 0.1}},
        [torch.ones(2), torch.zeros(3, 2)],
        (torch.tensor(0.1), 0.1),
        [[0.1, 0.2], [0.3]],
        torch.zeros(0),
    ],
)
def test_numbers_are_close_to_themselves(numbers: object) -> None:
    assert_close(numbers, copy.deepcopy(numbers))


def test_the_scale_is_the_size_of_what_is_summed() -> None:
    small = torch.tensor([1e5, 3.0]).diff() + 99997.0  # 0, from numbers of 1e5
    assert_close(small + 0.01, torch.zeros(1), scale=1e5)
    with pytest.raises(AssertionError, match="allowed"):
        assert_close(small + 0.01, torch.zeros(1), scale=1e3)


def test_float64_is_held_to_float64_where_all_of_it_was() -> None:
    assert_close(np.float64(1 + 1e-7), np.float64(1))
    with pytest.raises(AssertionError):
        assert_close(1 + 1e-14, 1.0, dtype=torch.float64)
    assert_close(0.1 + 0.2, 0.3, dtype=torch.float64)


def test_a_tolerance_grows_with_the_root_of_the_length() -> None:
    assert tolerance(terms=400) == 20 * tolerance()
    assert tolerance(scale=3.0) == 3 * tolerance()
    assert tolerance(dtype=torch.bfloat16) == 2**16 * tolerance()


def test_the_message_names_what_is_wrong() -> None:
    with pytest.raises(AssertionError, match=r"log-probs: b: 1 of 3 numbers .* at \[2\], .* is allowed"):
        assert_close({"b": [1.0, 2.0, 3.5]}, {"b": [1.0, 2.0, 3.0]}, what="log-probs")


def test_runs_that_differ_by_rounding_are_trained_alike() -> None:
    """Two sums of a batch in two orders; a weight whose gradient cancels goes either way."""
    runs = []
    for order in (torch.arange(64), torch.randperm(64, generator=generator(1))):
        weights = torch.nn.Parameter(torch.zeros(2000))
        adam = torch.optim.Adam([weights], lr=1e-2, eps=1e-8)
        numbers = torch.randn(64, 2000, generator=generator())
        numbers[32:, 0] = -numbers[:32, 0]
        for _ in range(5):
            weights.grad = sum(numbers[row] for row in order)
            adam.step()
        runs.append(weights.detach())
    assert (runs[0] - runs[1]).abs().max() > 1e-3, "the cancelled gradient is rounding, and moves its weight"
    assert_trained_alike(*runs, learning_rate=1e-2)


def test_a_mistake_is_not_trained_alike() -> None:
    expected = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    wrong = {"a": torch.zeros(1000), "b": torch.full((1000,), 1e-3)}
    assert_trained_alike({"b": expected["b"], "a": expected["a"]}, expected, learning_rate=1e-3)
    with pytest.raises(AssertionError, match="1000 of 2000 weights"):
        assert_trained_alike(wrong, expected, learning_rate=1e-3)
    with pytest.raises(AssertionError):
        assert_trained_alike([torch.full((10,), torch.nan)], [torch.zeros(10)], learning_rate=1e-3)
