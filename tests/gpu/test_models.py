"""Models on a device give the CPU's numbers: log-probs, values, gradients, decoding, captured steps, bans.

Run by `make test` on the CPU, where they compare two runs, and by `make gpu` with TEXTGYM_DEVICE=cuda.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from textgym.models.actor_critic import ActorCritic, Evaluation
from textgym.models.decoding.generation import ResponseGenerator, Responses
from textgym.models.distributions.log_probs import StopRule
from textgym.models.distributions.masks import TopKMask
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.testing import assert_close, mock_lm, mock_seq2seq_lm, terms_of

pytestmark = pytest.mark.gpu

Plainly = Callable[[TokenModel, Sequences], Evaluation]

V, WIDTH, NEW = 60, 24, 12
PROMPTS = torch.tensor([3, 1, 7, 4, 2, 6])
STOP = StopRule((*range(8), V - 2), min_new_tokens=2)
MODELS: dict[str, dict[str, Any]] = {
    "rotary positions": {},
    "absolute positions": {"architecture": "gpt2"},
    "sliding windows": {"architecture": "mistral", "sliding_window": 4},
    "tied embedding": {"tie_word_embeddings": True},
}


def make_policy(device: torch.device, model: str = "rotary positions", critic: str = "shared") -> ActorCritic:
    policy = ActorCritic.from_pretrained(mock_lm(V, **MODELS[model]), critic, temperature=0.8, device=device)
    weight = torch.randn(policy.value_head.weight.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        policy.value_head.weight.copy_(weight)
    policy.seed(0)
    return policy


def make_prompts(device: torch.device) -> Tensor:
    """Right-padded, `(6, WIDTH)`."""
    ids = torch.randint(8, V - 2, (len(PROMPTS), WIDTH), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.arange(WIDTH) < PROMPTS[:, None], ids, 0).to(device)


def make_sequences(device: torch.device) -> Sequences:
    ids = torch.randint(8, V - 2, (len(PROMPTS), WIDTH), generator=torch.Generator().manual_seed(0))
    return Sequences(ids, PROMPTS, torch.tensor([5, 9, 1, 12, 3, 8]), STOP).to(device)


def evaluated(policy: ActorCritic, sequences: Sequences) -> tuple[Evaluation, dict[str, Tensor]]:
    """Log-probs, values and entropies, and the gradients of a sum in which each has a weight of its own."""
    evaluation = policy.evaluate(sequences, entropy_gradient=True)
    total = torch.zeros((), device=policy.device)
    columns = (evaluation.log_prob, evaluation.value, evaluation.entropy)
    for start, end, column in zip((-1, 1, 2), (2, -1, 0), columns, strict=True):
        weights = torch.linspace(start, end, column.numel(), device=column.device).view(column.shape)
        total = total + (weights * column).sum()
    policy.zero_grad()
    total.backward()
    return evaluation, {name: x.grad.clone() for name, x in policy.named_parameters() if x.grad is not None}


def written(policy: ActorCritic, device: torch.device, stop: StopRule = STOP) -> tuple[Sequences, Responses]:
    """Responses by `write`, and the same as sequences."""
    prompts = make_prompts(device)
    responses = policy.generate(prompts, PROMPTS.to(device), NEW, stop)
    return as_sequences(prompts, responses, stop), responses


def as_sequences(prompts: Tensor, responses: Responses, stop: StopRule) -> Sequences:
    ids = prompts.clone()
    for row, (start, count) in enumerate(zip(PROMPTS.tolist(), responses.lengths.tolist(), strict=True)):
        ids[row, start : start + count] = responses.tokens[row, :count]
    return Sequences(ids, PROMPTS.to(ids.device), responses.lengths, stop)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("model", MODELS)
def test_log_probs_values_entropies_and_gradients_are_the_cpus(device: torch.device, model: str, critic: str) -> None:
    cpu = torch.device("cpu")
    expected, gradients = evaluated(make_policy(cpu, model, critic), make_sequences(cpu))
    policy = make_policy(device, model, critic)
    actual, mine = evaluated(policy, make_sequences(device))

    terms = terms_of(policy)
    for name in Evaluation._fields:
        assert_close(getattr(actual, name), getattr(expected, name), terms=terms, what=name)
    # A gradient goes forward and back, and adds up over tokens.
    assert_close(mine, gradients, terms=2 * terms + 38)


@pytest.mark.parametrize("model", MODELS)
def test_a_packed_pass_is_the_whole_model_row_by_row(device: torch.device, model: str, plainly: Plainly) -> None:
    policy, sequences = make_policy(device, model), make_sequences(device)
    with torch.no_grad():
        packed, plain = policy.evaluate(sequences), plainly(policy, sequences)
    for name in Evaluation._fields:
        assert_close(getattr(packed, name), getattr(plain, name), terms=terms_of(policy), what=name)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("model", MODELS)
def test_what_act_and_write_note_is_the_whole_model_row_by_row(
    device: torch.device, model: str, critic: str, plainly: Plainly
) -> None:
    policy = make_policy(device, model, critic)
    for turn in range(3):  # a captured step is replayed from the third time on
        sequences, responses = written(policy, device)
        with torch.no_grad():
            plain, mask = plainly(policy, sequences), sequences.response_mask
        noted = responses.log_probs[:, : mask.shape[1]][mask]
        assert_close(noted, plain.log_prob[mask], terms=terms_of(policy), what=f"turn {turn}")

    for length in range(int(sequences.response_lengths.max())):
        lengths = sequences.response_lengths.clamp(max=length)
        step = policy.act(sequences.observation(lengths))
        rows = sequences.response_lengths > length
        assert_close(step.value[rows], plain.value[rows, length], terms=terms_of(policy), what=f"value {length}")


def test_captured_steps_write_what_eager_steps_write(device: torch.device) -> None:
    """Two shapes in turns, and weights that change in between: no graph is replayed that is not right any more."""
    policy, prompts, lengths = make_policy(device), make_prompts(device), PROMPTS.to(device)
    for turn in range(4):
        for rows in (6, 4):
            policy.seed(turn)
            fast = policy.generate(prompts[:rows], lengths[:rows], NEW, STOP)
            eager = ResponseGenerator(policy, rows, WIDTH, NEW, STOP)
            policy.seed(turn)
            plain = eager.generate(prompts[:rows], lengths[:rows])

            assert fast.lengths.tolist() == plain.lengths.tolist()
            mask = torch.arange(NEW, device=device) < plain.lengths[:, None]
            assert fast.tokens[mask].tolist() == plain.tokens[mask].tolist()
            assert_close(fast.log_probs[mask], plain.log_probs[mask], terms=terms_of(policy), what=f"turn {turn}")
        with torch.no_grad():
            for weight in policy.lm.parameters():
                weight.mul_(0.9)


def test_one_seed_writes_the_same_twice(device: torch.device) -> None:
    policy = make_policy(device)
    (first, _), (other, _) = written(policy, device), written(policy, device)
    policy.seed(0)
    again, _ = written(policy, device)
    assert again.input_ids.tolist() == first.input_ids.tolist()
    assert other.input_ids.tolist() != first.input_ids.tolist()


def test_what_is_banned_is_never_sampled(device: torch.device) -> None:
    """Stop tokens before the minimum, and what a mask forbids; thousands of samples, and every log-prob is finite."""
    policy = make_policy(device)
    rows = 512
    prompts, lengths = make_prompts(device)[:1].repeat(rows, 1), PROMPTS[:1].repeat(rows).to(device)
    stops = torch.tensor(STOP.ids, device=device)
    for _ in range(3):
        responses = policy.generate(prompts, lengths, NEW, STOP)
        assert int(responses.lengths.min()) > STOP.min_new_tokens
        assert not torch.isin(responses.tokens[:, : STOP.min_new_tokens], stops).any()
        assert responses.log_probs.isfinite().all()
        assert (responses.log_probs > -50).all()

    observation = {"input_ids": prompts, "attention_mask": (torch.arange(WIDTH, device=device) < PROMPTS[0]).long()}
    observation["attention_mask"] = observation["attention_mask"].expand(rows, -1)
    allowed = torch.rand(rows, V, device=device) < 0.1
    allowed[:, 20] = True
    for _ in range(20):
        step = policy.act(observation, action_masks=allowed)
        assert allowed.gather(1, step.action[:, None]).all()
        assert step.log_prob.isfinite().all()
        assert (step.log_prob > -50).all()


def test_samples_follow_the_distribution(device: torch.device) -> None:
    """Counts of the first token: a chi-square test with 59 degrees of freedom exceeds 130 in one of 10^6 runs."""
    policy, rows = make_policy(device), 20_000
    prompts, lengths = make_prompts(device)[:1].repeat(rows, 1), PROMPTS[:1].repeat(rows).to(device)
    tokens = policy.generate(prompts, lengths, 1, StopRule()).tokens[:, 0]
    mask = (torch.arange(WIDTH, device=device) < PROMPTS[0]).long()[None]
    expected = rows * policy.next_logits({"input_ids": prompts[:1], "attention_mask": mask})[0].softmax(0).double()
    counts = torch.bincount(tokens, minlength=V)
    common = expected >= 5
    squares = (counts - expected).square() / expected
    rest = (counts[~common].sum() - expected[~common].sum()).square() / expected[~common].sum().clamp(min=1)
    assert float(squares[common].sum() + rest) < 130


def test_masks_of_a_model_are_the_cpus(device: torch.device) -> None:
    def allowed(place: torch.device) -> Tensor:
        mask = TopKMask(make_policy(place), k=5)
        return mask(make_sequences(place).observation(torch.ones(6, dtype=torch.long, device=place))).cpu()

    assert allowed(device).tolist() == allowed(torch.device("cpu")).tolist()


def test_a_moved_policy_acts_and_writes_as_one_that_was_made_there(device: torch.device) -> None:
    policy = make_policy(torch.device("cpu"))
    policy.act(make_sequences(torch.device("cpu")).observation(torch.ones(6, dtype=torch.long)))
    moved = policy.to(device)
    moved.seed(0)
    made = make_policy(device)
    (mine, _), (other, _) = written(moved, device), written(made, device)
    assert mine.input_ids.tolist() == other.input_ids.tolist()


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_decoder_models_give_the_cpus_numbers(device: torch.device, architecture: str) -> None:
    cpu = torch.device("cpu")
    results = []
    for place in (cpu, device):
        policy = ActorCritic.from_pretrained(mock_seq2seq_lm(V, architecture=architecture), device=place)
        sequences = make_sequences(place)
        sequences = Sequences(
            sequences.input_ids,
            sequences.prompt_lengths,
            sequences.response_lengths,
            STOP,
            decoder_start=policy.decoder_start_ids,
        )
        log_probs = policy.evaluate(sequences).log_prob
        observation = sequences.observation(torch.ones(6, dtype=torch.long, device=place))
        results.append((log_probs, policy.next_logits(observation)))
    for name, actual, expected in zip(("log-probs", "logits"), results[1], results[0], strict=True):
        assert_close(actual, expected, terms=terms_of(policy), what=name)
