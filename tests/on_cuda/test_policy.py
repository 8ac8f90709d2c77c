"""A policy on a GPU: token by token, whole responses by captured steps, whole sequences, and after it was moved."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from textgym.models.actor_critic import ActorCritic
from textgym.models.decoding.cuda_graphs import Graphs
from textgym.models.distributions.log_probs import StopRule
from textgym.models.machine.flops import FlopCount
from textgym.models.token_model import TokenModel
from textgym.testing import mock_lm, mock_seq2seq_lm

PRETEND = sys.modules.get("tests.pretend_cuda")
same_numbers = pytest.mark.usefixtures("the_cpus_numbers")
STOP = StopRule(tuple(range(40)), 2)
LENGTHS = [3, 3, 2, 5, 4, 8, 1, 6]


def respond(policy: ActorCritic, stop: StopRule = STOP, rows: int = 8, tokens: int = 8, **kwargs: Any) -> Any:
    """Responses of a policy to always the same prompts; their log-probs and values are zero after their ends."""
    ids = torch.randint(3, 50, (rows, 24), generator=torch.Generator().manual_seed(0))
    ids[1] = ids[0]
    lengths = torch.tensor(LENGTHS[:rows])
    responses = policy.generate(ids.to(policy.device), lengths.to(policy.device), tokens, stop, **kwargs)
    real = torch.arange(tokens, device=policy.device) < responses.lengths[:, None]
    return {name: column * real if column.dim() == 2 else column for name, column in responses._asdict().items()}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pools of all graphs that were captured."""
    pools: list[Any] = []
    real = Graphs.capture

    def capture(self: Graphs, step: Callable[[], object]) -> Callable[[], object]:
        replay = real(self, step)
        pools.append(self.pool)
        return replay

    monkeypatch.setattr(Graphs, "capture", capture)
    return pools


@pytest.fixture
def both(tiny_policy: Callable[..., ActorCritic]) -> tuple[ActorCritic, ActorCritic]:
    """The same policy on a GPU and on a CPU."""
    return tiny_policy("cuda"), tiny_policy("cpu")


def seeded(*policies: ActorCritic, seed: int = 0) -> None:
    for policy in policies:
        policy.seed(seed)


# --- token by token, and whole sequences ---


@same_numbers
@pytest.mark.parametrize("settings", [{}, {"critic": "separate", "temperature": 0.7}])
def test_actions_and_evaluations_equal_those_on_a_cpu(
    settings: dict[str, Any],
    tiny_policy: Callable[..., ActorCritic],
    text_envs: Callable[..., Any],
    same: Callable[..., None],
) -> None:
    given, expected = tiny_policy("cuda", **settings), tiny_policy("cpu", **settings)
    envs, theirs = text_envs("cuda"), text_envs("cpu")
    observation, observed = envs.reset(seed=0)[0], theirs.reset(seed=0)[0]
    seeded(given, expected)
    for _ in range(3):
        step, other = given.act(observation), expected.act(observed)
        assert step.action.device.type == "cuda"
        same(step, other)
        same(given.value(observation), expected.value(observed))
        same(given.log_prob(observation, step.action), expected.log_prob(observed, other.action))
        observation, observed = envs.step(step.action)[0], theirs.step(other.action)[0]
    losses = []
    for policy, env in ((given, envs), (expected, theirs)):
        sequences = env.unwrapped.task.episodes.sequences()
        evaluation = policy.evaluate(sequences, True)
        same(policy.sequence_log_probs(sequences), evaluation.log_prob)
        same(policy.sequence_values(sequences), evaluation.value)
        losses.append(evaluation.log_prob.sum() + evaluation.value.sum() + evaluation.entropy.sum())
        losses[-1].backward()
    same(*losses)
    for ours, other in zip(given.parameters(), expected.parameters(), strict=True):
        if other.grad is not None:
            same(ours.grad, other.grad, 1e-2)


def test_a_policy_in_bf16_acts_there_and_evaluates_within_the_band(
    tiny_policy: Callable[..., ActorCritic], text_envs: Callable[..., Any], same: Callable[..., None]
) -> None:
    """Processors add up bfloat16 in other orders, so a log-prob may move by up to half a nat, and tokens with it."""
    policy, envs = tiny_policy(dtype=torch.bfloat16), text_envs()
    observation, _ = envs.reset(seed=0)
    for _ in range(3):
        step = policy.act(observation)
        observation, *_ = envs.step(step.action)
    assert step.log_prob.dtype == torch.float32
    sequences = envs.unwrapped.task.episodes.sequences()
    expected = tiny_policy("cpu", dtype=torch.bfloat16).evaluate(sequences.to(torch.device("cpu")))
    same(policy.evaluate(sequences).log_prob, expected.log_prob, 0.5)


def test_observations_and_masks_may_be_arrays(
    tiny_policy: Callable[..., ActorCritic], text_envs: Callable[..., Any]
) -> None:
    policy, envs = tiny_policy(), text_envs()
    observation, _ = envs.reset(seed=0)
    arrays = {name: column.cpu().numpy() for name, column in observation.items()}
    allowed = np.zeros((4, policy.vocab_size), bool)
    allowed[:, 7] = True
    assert policy.act(arrays, action_masks=allowed).action.tolist() == [7] * 4
    row = {name: column[0] for name, column in arrays.items()}
    assert policy.act(row, deterministic=True).action.device == policy.device
    assert policy.predict(row).shape == ()
    assert policy.frozen_copy().device == policy.reference().device == policy.device


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_decoder_models(architecture: str, text_envs: Callable[..., Any], same: Callable[..., None]) -> None:
    lm = mock_seq2seq_lm(architecture=architecture)
    results = []
    for device in ("cuda", "cpu"):
        policy = ActorCritic.from_pretrained(copy.deepcopy(lm), device=device)
        envs = text_envs(device, decoder_start_ids=policy.decoder_start_ids)
        observation, _ = envs.reset(seed=0)
        for _ in range(3):
            observation, *_ = envs.step(policy.act(observation, deterministic=True).action)
        results.append(policy.evaluate(envs.unwrapped.task.episodes.sequences()))
    same(*results)


# --- whole responses, in captured steps ---


@same_numbers
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2", "gpt_neox"])
def test_captured_responses_equal_those_on_a_cpu(
    architecture: str, captured: list[Any], same: Callable[..., None]
) -> None:
    window = {"sliding_window": 4} if architecture == "mistral" else {}
    lm = mock_lm(60, architecture=architecture, **window)
    given, expected = (ActorCritic.from_pretrained(copy.deepcopy(lm), device=device) for device in ("cuda", "cpu"))
    for _ in range(2):
        seeded(given, expected)
        same(respond(given, StopRule((5, 6, 7), 2)), respond(expected, StopRule((5, 6, 7), 2)))
    assert captured


@same_numbers
@pytest.mark.filterwarnings("default")
def test_what_cannot_be_captured_is_generated_without(same: Callable[..., None]) -> None:
    lm = mock_lm(60, architecture="phimoe", num_local_experts=4, num_experts_per_tok=2)
    given, expected = (ActorCritic.from_pretrained(copy.deepcopy(lm), device=device) for device in ("cuda", "cpu"))
    for _ in range(3):
        seeded(given, expected)
        same(respond(given), respond(expected))


@same_numbers
def test_a_changed_temperature_counts_at_once(both: tuple[ActorCritic, ActorCritic], same: Callable[..., None]) -> None:
    for temperature in (1.0, 1.0, 0.3):
        for policy in both:
            policy.temperature = temperature
        seeded(*both)
        same(*map(respond, both))


@same_numbers
def test_an_adapter_that_is_switched_off_counts_at_once(same: Callable[..., None]) -> None:
    peft = pytest.importorskip("peft")
    both = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        adapter = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        both.append(ActorCritic.from_pretrained(mock_lm(), device=device, lora=adapter))
    for off in (False, False, True, False):
        seeded(*both)
        contexts = [policy.lora.disable_adapter() if off else contextlib.nullcontext() for policy in both]
        with contexts[0], contexts[1]:
            same(*map(respond, both))


@same_numbers
def test_replaced_parameters_count_at_once(both: tuple[ActorCritic, ActorCritic], same: Callable[..., None]) -> None:
    for _ in range(2):
        seeded(*both)
        same(*map(respond, both))
    with torch.no_grad():
        for policy in both:
            for weight in policy.lm.parameters():
                weight.data = weight.data * 1.1
    seeded(*both)
    same(*map(respond, both))


@same_numbers
def test_weights_written_in_place_count_at_once(
    both: tuple[ActorCritic, ActorCritic], same: Callable[..., None]
) -> None:
    for factor in (1.0, 1.0, 1.1):
        with torch.no_grad():
            for policy in both:
                for weight in policy.parameters():
                    weight.mul_(factor)
        seeded(*both)
        same(*map(respond, both))


def test_shapes_in_turn_capture_once(captured: list[Any], tiny_policy: Callable[..., ActorCritic]) -> None:
    policy, counts = tiny_policy(), []
    for _ in range(3):
        for rows in (8, 5):
            respond(policy, rows=rows, tokens=4)
        counts.append(len(captured))
    assert 0 < counts[1] == counts[2]


def test_all_graphs_share_one_pool_of_memory(captured: list[Any], tiny_policy: Callable[..., ActorCritic]) -> None:
    policy = tiny_policy()
    for rows in (8, 5, 8, 5):
        respond(policy, rows=rows, tokens=4)
    assert len(captured) > 1
    assert len(set(captured)) == 1


def test_replayed_steps_are_counted(both: tuple[ActorCritic, ActorCritic]) -> None:
    totals = []
    for policy in both:
        for _ in range(2):
            respond(policy, StopRule((256,), 8))
        with FlopCount() as count:
            respond(policy, StopRule((256,), 8))
        totals.append(count.total)
    given, expected = totals
    assert expected <= given < 2 * expected  # captured steps read some slots that are not in use


def test_models_are_checked_in_full_precision() -> None:
    lm, seen = mock_lm().to("cuda"), set()
    lm.register_forward_pre_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        ActorCritic(lm)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"highest"}


# --- sampling ---


@pytest.mark.skipif(PRETEND is None, reason="exaggerates how CUDA rounds")
@pytest.mark.parametrize("whole", [False, True], ids=["act", "whole responses"])
def test_no_banned_token_is_chosen_where_cumulative_sums_are_uneven(
    whole: bool, tiny_policy: Callable[..., ActorCritic]
) -> None:
    """CUDA adds up in blocks, so a cumulative sum may rise and fall a little where nothing is added (pytorch#21780)."""
    assert PRETEND is not None
    PRETEND.machine.uneven_sums = 0.05
    policy = tiny_policy()
    policy.seed(0)
    if whole:
        banned = tuple(range(10, 250))
        responses = respond(policy, StopRule(banned, 8))
        assert responses["lengths"].tolist() == [8] * 8
        assert not torch.isin(responses["tokens"], torch.tensor(banned, device="cuda")).any()
        return
    observation = {"input_ids": torch.full((64, 4), 97), "attention_mask": torch.ones(64, 4, dtype=torch.long)}
    allowed = torch.zeros(64, policy.vocab_size, dtype=torch.bool)
    allowed[:, [0, 200]] = True
    for _ in range(4):
        step = policy.act(observation, action_masks=allowed)
        assert set(step.action.tolist()) <= {0, 200}
        assert (step.log_prob > -50).all()


# --- moving ---


def test_a_scorer_that_has_scored_is_moved(same: Callable[..., None]) -> None:
    model = TokenModel.load(mock_lm())
    observation = observations()
    expected = model.log_prob(observation, torch.full((4,), 97))
    model.to("cuda")
    same(model.log_prob(observation, torch.full((4,), 97)), expected)


def test_copies_and_pickles_capture_their_own(tiny_policy: Callable[..., ActorCritic]) -> None:
    policy = tiny_policy()
    respond(policy, tokens=4)
    policy.generator = None
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert other.device.type == "cuda"
        respond(other, tokens=4)


def observations() -> dict[str, Tensor]:
    return {"input_ids": torch.full((4, 9), 97), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
