"""Responses to one prompt share it in packed passes: fewer tokens, the same figures and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from textgym.models.actor_critic import ActorCritic, Evaluation
from textgym.models.architectures import packing
from textgym.models.architectures.attention import pack
from textgym.models.architectures.packing import plan
from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.models.sequences import Sequences
from textgym.testing import assert_close, mock_lm, terms_of

pytestmark = pytest.mark.numerics

FORWARD = terms_of(mock_lm())


def groups(prompts: tuple[int, ...] = (9, 5, 7), size: int = 4, longest: int = 6, seed: int = 0) -> Sequences:
    """Prompts of these lengths, each with as many responses of 1 to `longest` tokens, in mixed order."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(prompts).repeat(size)
    ids = torch.randint(3, 250, (len(lengths), max(prompts) + longest), generator=draw)
    for row in range(len(prompts), len(lengths)):
        first = row % len(prompts)
        ids[row, : lengths[row]] = ids[first, : lengths[row]]
    responses = torch.randint(1, longest + 1, (len(lengths),), generator=draw)
    order = torch.randperm(len(lengths), generator=draw)
    return Sequences(ids[order], lengths[order], responses[order])


def alone(policy: ActorCritic, sequences: Sequences) -> Evaluation:
    """Each row by itself, one token after another in a plain pass of the whole model."""
    shape, columns = sequences.response_mask.shape, []
    for row in range(len(sequences)):
        begin, end = int(sequences.prompt_lengths[row]), int(sequences.lengths[row])
        ids = sequences.input_ids[row : row + 1, :end]
        output = policy.lm(ids, output_hidden_states=True)
        log_probs = output.logits[0, begin - 1 : end - 1].log_softmax(-1)
        chosen = log_probs.gather(1, ids[0, begin:, None])[:, 0]
        trunk = output.hidden_states[-1] if policy.critic is None else policy.critic(ids).last_hidden_state
        values = policy.value_head(trunk[0, begin - 1 : end - 1])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        columns.append([torch.nn.functional.pad(x, (0, shape[1] - len(x))) for x in (chosen, values, entropy)])
    return Evaluation(*(torch.stack(column) for column in zip(*columns, strict=True)))


def gradients(policy: ActorCritic, evaluation: Evaluation) -> dict[str, Tensor]:
    policy.zero_grad()
    (evaluation.log_prob.mean() + evaluation.value.square().mean()).backward()
    return {name: weight.grad.clone() for name, weight in policy.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_shared_prompts_change_neither_figures_nor_gradients(architecture: str, critic: str) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(architecture=architecture), critic=critic)
    torch.nn.init.normal_(policy.value_head.weight, std=0.1)
    sequences = groups()
    packed = pack(sequences.input_ids, sequences.lengths - 1, sequences.prompt_lengths)
    assert (packed.shared > 0).all(), "nobody shares: vacuous"
    actual, expected = policy.evaluate(sequences), alone(policy, sequences)
    for figures, plain in zip(actual, expected, strict=True):
        assert_close(figures, plain, terms=FORWARD)
    expected_gradients = gradients(policy, expected)
    for name, gradient in gradients(policy, actual).items():
        assert_close(gradient, expected_gradients[name], terms=FORWARD, scale=1.0, what=name)


def test_a_response_is_blind_to_its_neighbours() -> None:
    policy, sequences = ActorCritic.from_pretrained(mock_lm()), groups(prompts=(9,), longest=5)
    sequences = replace(sequences, response_lengths=torch.full_like(sequences.response_lengths, 5))
    with torch.no_grad():
        before = policy.sequence_log_probs(sequences)
        changed = sequences.input_ids.clone()
        changed[1, 9:] = 77
        after = policy.sequence_log_probs(replace(sequences, input_ids=changed))
    others = torch.arange(len(sequences)) != 1
    assert_close(after[others], before[others], terms=FORWARD)
    assert (after[1] - before[1]).abs().max() > 0.1


def test_a_long_prompt_is_read_once() -> None:
    policy = ActorCritic.from_pretrained(mock_lm(max_position_embeddings=256))
    sequences = groups(prompts=(100,), size=8, longest=4)
    flops = []
    for shared in (True, False):
        ids = sequences.input_ids.clone()
        if not shared:
            ids[:, 0] = torch.arange(len(sequences)) + 3
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            policy.sequence_log_probs(replace(sequences, input_ids=ids))
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.25 * flops[1]


def test_prompts_are_not_shared_where_wide_rows_cost_more() -> None:
    """Two tokens saved are not worth rows of eight responses."""
    planned = plan([302] * 8, prompts=[2] * 8, alike=[list(range(8))])
    assert not any(planned.shared)
    assert planned.width == 302


def test_like_tokens_of_unlike_lengths_are_no_common_prompt() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    packed = pack(ids, torch.tensor([4, 4]), torch.tensor([2, 3]))
    assert not packed.shared.any()


@pytest.mark.parametrize("seed", range(5))
def test_every_token_has_a_slot_and_sees_its_own_past(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WIDTH_COST", 0.0)  # so that whole groups share
    sequences = groups(size=5, seed=seed)
    lengths = sequences.lengths
    packed = pack(sequences.input_ids, lengths, sequences.prompt_lengths)
    flat: dict[str, Any] = {name: getattr(packed, name).flatten() for name in ("input_ids", "position_ids", "segments")}
    taken = 0
    for row, length in enumerate(lengths.tolist()):
        slots = packed.slots(torch.full((length,), row), torch.arange(length))
        assert torch.equal(flat["input_ids"][slots], sequences.input_ids[row, :length])
        assert torch.equal(flat["position_ids"][slots], torch.arange(length))
        assert (slots[1:] > slots[:-1]).all()
        assert len(set((slots // packed.input_ids.shape[1]).tolist())) == 1
        taken += length
    assert int((flat["segments"] > 0).sum()) == taken - int(packed.shared.sum()) + 9 + 5 + 7


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_that_several_rows_begin_with_is_read_once(architecture: str) -> None:
    lm = mock_lm(architecture=architecture)
    lengths = torch.tensor([20, 7, 20, 20, 7, 9, 20, 20])
    ids = torch.randint(3, 250, (3, 30), generator=torch.Generator().manual_seed(0))[[0, 1, 0, 0, 1, 2, 0, 0]]
    ids = torch.where(torch.arange(30) < lengths[:, None], ids, 0)
    once, apart = CachedDecoder(lm, 8, 30), CachedDecoder(lm, 8, 30)
    flops, states = [], []
    for read in (once.begin, apart.advance):
        with FlopCounterMode(display=False) as counter:
            states.append([read(ids, lengths).clone()])
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.3 * flops[1]
    for step in range(4):  # and they go on apart from each other
        tokens = torch.arange(8) + 10 * step
        states[0].append(once.extend(tokens, 20 + step + 1).clone())
        ids[torch.arange(8), lengths] = tokens
        lengths = lengths + 1
        states[1].append(apart.advance(ids, lengths))
    assert_close(torch.stack(states[0]), torch.stack(states[1]), terms=FORWARD)
