"""Captured steps: what they depend on, the shapes that are kept, and models that cannot be captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from textgym.models.actor_critic import ActorCritic
from textgym.models.decoding import generation
from textgym.models.decoding.cuda_graphs import Graphs, HostAccess, NotCapturedError, state_of
from textgym.models.decoding.generation import ResponseGenerator, Responses
from textgym.models.distributions.log_probs import StopRule
from textgym.testing import mock_lm

ROWS, WIDTH, NEW = 4, 20, 10
STOP = StopRule((3, 4, 5), 2)
LENGTHS = torch.tensor([3, 5, 1, 5])


def make_policy(**options: Any) -> ActorCritic:
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    return ActorCritic.from_pretrained(mock_lm(), lora=lora, **options)


def prompts(rows: int = ROWS) -> Tensor:
    return torch.randint(20, 200, (rows, WIDTH), generator=torch.Generator().manual_seed(0))


def generate(policy: ActorCritic, rows: int = ROWS, deterministic: bool = False) -> Responses:
    policy.seed(1)
    return policy.generate(prompts(rows), LENGTHS[:rows], NEW, STOP, deterministic)


def assert_as_eager(policy: ActorCritic, written: Responses, deterministic: bool = False) -> None:
    """The responses are those of a generator that captures nothing."""
    policy.seed(1)
    expected = ResponseGenerator(policy, len(written.lengths), WIDTH, NEW, STOP).generate(
        prompts(len(written.lengths)), LENGTHS[: len(written.lengths)], deterministic
    )
    assert torch.equal(written.lengths, expected.lengths)
    mask = torch.arange(NEW) < expected.lengths[:, None]
    assert torch.equal(written.tokens[mask], expected.tokens[mask])
    torch.testing.assert_close(written.log_probs[mask], expected.log_probs[mask], atol=1e-4, rtol=1e-4)


def generate_and_check(policy: ActorCritic, *rows: int) -> None:
    for number in rows:
        assert_as_eager(policy, generate(policy, number))


def cooler(policy: ActorCritic) -> None:
    policy.temperature = 0.5


def adapter_off(policy: ActorCritic) -> None:
    policy.lora.base_model.disable_adapter_layers()


def adapter_merged(policy: ActorCritic) -> None:
    policy.lora.merge_adapter()


def adapter_scaled(policy: ActorCritic) -> None:
    for module in policy.lm.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3


def another_adapter(policy: ActorCritic) -> None:
    policy.lora.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    policy.lora.set_adapter("other")


def weights_replaced(policy: ActorCritic) -> None:
    for weight in policy.lm.parameters():
        weight.data = weight.data * 1.2


def weights_trained(policy: ActorCritic) -> None:
    for weight in policy.lm.parameters():
        weight.data.mul_(1.2)


def hooked(policy: ActorCritic) -> None:
    policy.lm.base_model.norm.register_forward_hook(lambda module, inputs, output: output * 0.5)


def head_replaced(policy: ActorCritic) -> None:
    policy.value_head = nn.Linear(policy.value_head.in_features, 1)


CHANGES = [
    cooler, adapter_off, adapter_merged, adapter_scaled, another_adapter, weights_replaced, hooked, head_replaced,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_captured_step_depends_on_is_part_of_its_state(change: Callable[[ActorCritic], None]) -> None:
    policy = make_policy()
    generate(policy)
    before = state_of(policy)
    generate(policy)
    weights_trained(policy)
    assert state_of(policy) == before, "neither generating nor training changes it: weights are read where they are"
    change(policy)
    assert state_of(policy) != before


@pytest.mark.slow
def test_changes_between_captured_steps_are_followed(captures: list[Any]) -> None:
    policy = make_policy()
    before = generate(policy)
    for change in (weights_trained, weights_replaced, adapter_off):
        captured = len(captures)
        change(policy)
        after = generate(policy)
        assert_as_eager(policy, after)
        assert not torch.equal(before.log_probs, after.log_probs), "the change changes something"
        assert (len(captures) == captured) == (change is weights_trained)
        before = after


@pytest.mark.slow
def test_greedy_and_sampled_steps_are_captured_apart(captures: list[Any]) -> None:
    policy = make_policy()
    for deterministic in (False, True, False, True):
        assert_as_eager(policy, generate(policy, deterministic=deterministic), deterministic)
    assert len(captures) == 2


@pytest.mark.slow
def test_shapes_in_turn_are_captured_once_and_few_are_kept(
    captures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    generate_and_check(policy, 4, 3, 4, 3)
    assert len(captures) == 2
    monkeypatch.setattr(generation, "KEPT_GENERATORS", 2)
    generate(policy, 2)
    assert [shape[0] for shape in policy._generators.kept] == [3, 2], "the one that was used longest ago is gone"
    monkeypatch.setattr(generation, "KEPT_BYTES", policy.cache_bytes - 1)
    generate(policy, 2)
    assert [shape[0] for shape in policy._generators.kept] == [2]


def asks_for_a_value(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """What rope that depends on the length does, and so do mixtures of experts."""
    if output.max() > 1e9:
        raise AssertionError


def test_a_model_that_makes_the_host_wait_is_not_captured(captures: list[Any]) -> None:
    policy = make_policy()
    policy.lm.base_model.norm.register_forward_hook(asks_for_a_value)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM cannot be captured .* makes the host wait") as seen:
        generate_and_check(policy, 4, 3, 4)
    assert len(seen) == 1
    assert not captures
    policy.reset_cache()
    assert policy.cache_bytes == 0


def test_a_capture_that_fails_leaves_the_step_as_it_was(captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where the operation that fails was not known beforehand."""
    monkeypatch.setattr(HostAccess, "__torch_dispatch__", lambda self, func, types, args, kwargs: func(*args, **kwargs))
    policy = make_policy()
    policy.lm.base_model.norm.register_forward_hook(asks_for_a_value)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM cannot be captured") as seen:
        generate_and_check(policy, 4, 3, 4)
    assert len(seen) == 1
    assert not captures


def test_a_failed_capture_is_ended_for_the_allocator_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself leaves it open, and then its allocator fails later on, far away from here."""
    ended: list[Any] = []

    class Broken:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: Any) -> None: ...
        def replay(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    for name in ("graph", "CUDAGraph", "stream"):
        monkeypatch.setattr(torch.cuda, name, Broken)
    for name in ("current_stream", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *place: ended.append(place))
    graphs = Graphs()
    graphs.capture(lambda: None)
    assert not ended
    with pytest.raises(NotCapturedError, match="not permitted"):
        graphs.capture(lambda: (_ for _ in ()).throw(RuntimeError("operation not permitted")).__next__())
    assert ended == [(0, (0, 7))]
