"""ResponseGenerator: what `act` would sample token by token, in one go; captured steps; no look at the device."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from textgym.models.actor_critic import ActorCritic
from textgym.models.decoding import generation
from textgym.models.decoding.generation import ResponseGenerator, Responses
from textgym.models.distributions import log_probs
from textgym.models.distributions.log_probs import StopRule
from textgym.models.sequences import Sequences
from textgym.testing import assert_close, mock_lm, terms_of

FORWARD = terms_of(mock_lm())

ROWS, PROMPT, NEW = 8, 7, 70  # long enough for several spans of a captured step
STOPS = StopRule(tuple(range(9)))
LENGTHS = torch.tensor([3, 7, 1, 5, 5, 2, 6, 4])


def make_policy(critic: str = "shared", temperature: float = 1.0) -> ActorCritic:
    policy = ActorCritic.from_pretrained(mock_lm(), critic=critic, temperature=temperature)
    torch.nn.init.constant_(policy.value_head.weight, 0.1)
    policy.seed(0)
    return policy


def prompts() -> Tensor:
    ids = torch.randint(20, 200, (ROWS, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.arange(PROMPT + NEW) < LENGTHS[:, None], ids, 0)


def stepped(policy: ActorCritic, stop: StopRule, deterministic: bool) -> Responses:
    """The same by `act`."""
    ids, lengths = prompts(), LENGTHS.clone()
    alive, by_stop = torch.ones(ROWS, dtype=torch.bool), torch.zeros(ROWS, dtype=torch.bool)
    tokens, log_probs, values = torch.zeros(ROWS, NEW, dtype=torch.long), torch.zeros(ROWS, NEW), torch.zeros(ROWS, NEW)
    for step in range(NEW):
        allowed = torch.ones(ROWS, policy.vocab_size, dtype=torch.bool)
        allowed[:, list(stop.ids)] = step >= stop.min_new_tokens
        observation = {"input_ids": ids, "attention_mask": (torch.arange(PROMPT + NEW) < lengths[:, None]).long()}
        action, log_prob, value = policy.act(observation, deterministic, allowed)
        for buffer, new in ((tokens, action), (log_probs, log_prob), (values, value)):
            buffer[alive, step] = new[alive]
        ids[alive, lengths[alive]] = action[alive]
        lengths += alive
        by_stop |= alive & torch.isin(action, torch.tensor(stop.ids))
        alive &= ~by_stop
        if not alive.any():
            break
    return Responses(tokens, log_probs, values, lengths - LENGTHS, by_stop)


def assert_same(written: Responses, expected: Responses) -> None:
    assert written.lengths.tolist() == expected.lengths.tolist()
    assert written.by_stop.tolist() == expected.by_stop.tolist()
    mask = torch.arange(NEW) < expected.lengths[:, None]
    assert torch.equal(written.tokens[mask], expected.tokens[mask])
    assert_close(written.log_probs[mask], expected.log_probs[mask], terms=FORWARD)
    assert_close(written.values[mask], expected.values[mask], terms=FORWARD)


def write(policy: ActorCritic, stop: StopRule, deterministic: bool = False) -> Responses:
    return ResponseGenerator(policy, ROWS, PROMPT + NEW, NEW, stop).generate(prompts(), LENGTHS, deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_that_draw_apart_draw_the_same(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    together = write(make_policy(), STOPS, deterministic)
    monkeypatch.setattr(generation, "LOGIT_ELEMENTS", 3 * make_policy().vocab_size)
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", 2 * make_policy().vocab_size)
    assert_same(write(make_policy(), STOPS, deterministic), together)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("stop", [STOPS, StopRule(STOPS.ids, 6), StopRule(())], ids=["stop", "minimum", "endless"])
def test_it_writes_what_act_would(stop: StopRule, deterministic: bool) -> None:
    expected = stepped(make_policy(temperature=0.8), stop, deterministic)
    written = write(make_policy(temperature=0.8), stop, deterministic)
    assert_same(written, expected)
    if stop is STOPS and not deterministic:
        assert len(set(written.lengths.tolist())) > 4, "a test of rows that end needs some"


def test_a_policy_writes_the_same_twice_from_one_seed_and_frees_its_cache() -> None:
    policy, once = make_policy(), None
    for _ in range(2):
        policy.seed(3)
        responses = policy.generate(prompts(), LENGTHS, NEW, STOPS)
        assert once is None or torch.equal(once.tokens, responses.tokens)
        once = responses
        assert policy.cache_bytes > 0
    policy.reset_cache()
    assert policy.cache_bytes == 0


def test_weights_that_change_without_a_trace_are_noticed() -> None:
    """Fused optimisers write weights without a new version; every writing begins with the prompts anew."""
    policy = make_policy()
    generator = ResponseGenerator(policy, ROWS, PROMPT + NEW, NEW, STOPS)
    generator.generate(prompts(), LENGTHS)
    for weight in policy.lm.parameters():
        weight.data.mul_(0.5)
    policy.seed(0)
    written = generator.generate(prompts(), LENGTHS)
    policy.seed(0)
    assert_same(written, stepped(policy, STOPS, False))


def test_log_probs_and_values_are_those_of_a_pass_over_the_whole() -> None:
    policy = make_policy()
    responses = write(policy, STOPS)
    ids = prompts()
    for row, (start, length) in enumerate(zip(LENGTHS.tolist(), responses.lengths.tolist(), strict=True)):
        ids[row, start : start + length] = responses.tokens[row, :length]
    evaluation = policy.evaluate(Sequences(ids, LENGTHS, responses.lengths, STOPS))
    mask = torch.arange(evaluation.log_prob.shape[1]) < responses.lengths[:, None]
    for mine, whole in ((responses.log_probs, evaluation.log_prob), (responses.values, evaluation.value)):
        assert_close(mine[:, : mask.shape[1]][mask], whole[mask].detach(), terms=FORWARD)


class Asked(TorchDispatchMode):
    """Counts questions to the device: values that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_the_host_asks_at_most_once_for_ten_tokens(captures: list[Any]) -> None:
    """Where steps are captured: the prompts once, and now and then whether rows have ended."""
    policy = make_policy()
    for _ in range(2):
        policy.generate(prompts(), LENGTHS, NEW, StopRule(()))
    captured = len(captures)
    with Asked() as asked:
        policy.generate(prompts(), LENGTHS, NEW, StopRule(()))
    assert len(captures) == captured > 0
    assert 0 < asked.count <= 0.1 * NEW


@pytest.mark.slow
def test_captured_steps_write_the_same(captures: list[Any]) -> None:
    """Replayed on the same tensors, over several spans and numbers of rows, and again for the next prompts."""
    policy = make_policy()
    for turn in range(3):
        policy.seed(turn)
        written = policy.generate(prompts(), LENGTHS, NEW, STOPS)
        captured = len(captures)
        policy.seed(turn)
        assert_same(written, stepped(policy, STOPS, False))
    ((_, generator),) = policy._generators.kept.values()
    assert len(generator.sizes) > 1
    assert captured == len(captures), "the last round replays what the first ones captured"
    assert captured >= 2
    for copied in (copy.deepcopy(policy._generators), pickle.loads(pickle.dumps(policy._generators))):
        assert not copied.kept


def test_a_stop_token_that_the_model_does_not_have_is_never_drawn() -> None:
    policy = make_policy()
    beyond = StopRule((policy.vocab_size,))
    assert (policy.generate(prompts(), LENGTHS, NEW, beyond).lengths == NEW).all()
