"""The value head learns on a running scale, and says values in units of reward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from textgym.data.manifests import MANIFEST
from textgym.models.actor_critic import ActorCritic
from textgym.models.value_head import MOST_FITS, ValueHead
from textgym.testing import assert_close, mock_lm


def moments(mean: float, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64).square()


def trained_head() -> ValueHead:
    head = ValueHead(4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
        head.bias.fill_(0.5)
    return head


def test_a_head_that_was_not_fitted_is_a_linear_layer() -> None:
    head, hidden = trained_head(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(head(hidden), torch.nn.functional.linear(hidden, head.weight, head.bias))


def test_a_fit_changes_the_scale_and_no_value() -> None:
    head, hidden = trained_head(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    values = head(hidden).detach()
    for mean, std in ((10.0, 5.0), (-2.0, 0.1), (3.0, 40.0)):
        assert not head.fit(*moments(mean, std))
        assert_close(head(hidden), values, terms=16, scale=40.0)


def test_values_of_a_head_that_learned_nothing_become_the_mean() -> None:
    head = ValueHead(4)
    assert head.fit(*moments(10.0, 5.0))
    assert (head(torch.ones(2, 4)) == 10.0).all()
    assert head.fit(*moments(20.0, 5.0))
    assert_close(head(torch.ones(1, 4)).item(), 15.0)


def test_moments_are_those_of_all_returns_at_first_and_follow_them_later() -> None:
    head = ValueHead(4)
    batches = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    for batch in batches:
        head.fit(batch.mean(), batch.var(correction=0))
    assert_close(head.mean.item(), batches.mean().item(), terms=4)
    assert_close(head.std.item(), batches.std(correction=0).item(), terms=4)
    for _ in range(20 * MOST_FITS):
        head.fit(*moments(-100.0, 2.0))
    assert head.mean.item() == pytest.approx(-100.0, abs=0.01)
    assert head.std.item() == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_returns_that_are_not_finite_leave_the_scale_alone(junk: float) -> None:
    head = trained_head()
    head.fit(*moments(10.0, 5.0))
    before = {name: tensor.clone() for name, tensor in head.state_dict().items() if name != "fits"}
    head.fit(*moments(junk, 5.0))
    head.fit(*moments(0.0, junk))
    for name, tensor in before.items():
        assert_close(head.state_dict()[name], tensor)


def test_equal_returns_have_no_scale() -> None:
    """Their standard deviation is rounding; the first returns that differ set the scale alone."""
    head = ValueHead(4)
    head.fit(*moments(1e6, 1e-3))
    assert (head.std.item(), head.mean.item()) == (1.0, 1e6)
    head.fit(*moments(8.0, 2.0))
    assert (head.std.item(), head.mean.item()) == (2.0, 8.0)


def test_moments_stay_float32_in_a_bfloat16_policy() -> None:
    policy = ActorCritic.from_pretrained(mock_lm())
    policy.value_head.fit(*moments(1024.37, 1.01))
    policy.to(torch.bfloat16)
    assert policy.lm.dtype == torch.bfloat16
    assert policy.value_head.mean.item() == pytest.approx(1024.37)
    assert policy.value_head.std.item() == pytest.approx(1.01)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_saved_policy_carries_the_scale(critic: str, tmp_path: Path) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(), critic=critic)
    policy.value_head.fit(*moments(10.0, 5.0))
    policy.save_pretrained(tmp_path)
    again = ActorCritic.from_pretrained(tmp_path, critic=critic)
    for name, tensor in policy.value_head.state_dict().items():
        assert torch.equal(again.value_head.state_dict()[name], tensor), name


def test_a_policy_without_a_scale_is_loaded_with_its_plain_values(tmp_path: Path) -> None:
    policy = ActorCritic.from_pretrained(mock_lm())
    with torch.no_grad():
        policy.value_head.weight.fill_(0.3)
    policy.save_pretrained(tmp_path)
    path = tmp_path / "critic.safetensors"
    saved = load_file(path)
    save_file({name: saved[name] for name in ("value_head.weight", "value_head.bias")}, path)
    (tmp_path / MANIFEST).unlink()
    head = ActorCritic.from_pretrained(tmp_path).value_head
    assert (head.mean.item(), head.std.item(), head.weight[0, 0].item()) == (0.0, 1.0, pytest.approx(0.3))
    plain = {name.removeprefix("value_head."): weight for name, weight in load_file(path).items()}
    head.fit(*moments(10.0, 5.0))
    head.load_state_dict(plain)  # as a zip of Stable-Baselines3 has it
    assert (head.mean.item(), head.std.item()) == (0.0, 1.0)
