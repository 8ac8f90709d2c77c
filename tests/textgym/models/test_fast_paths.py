"""Every fast path against the plain one, alone and with every other: log-probs, values, entropies and gradients.

Packed passes, chunks of logits, layers run again in the backward pass, micro-batches, cached and captured decoding, a
critic of its own, LoRA: in float32 none of them may move anything by more than rounding. What bfloat16 moves is within
the published band.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from textgym.models.actor_critic import ActorCritic, Evaluation
from textgym.models.decoding import generation
from textgym.models.distributions import log_probs
from textgym.models.distributions.log_probs import StopRule
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.testing import assert_close, mock_lm, mock_seq2seq_lm, terms_of

pytestmark = pytest.mark.numerics

Plainly = Callable[[TokenModel, Sequences], Evaluation]

V = 60
PROMPTS, RESPONSES, WIDTH = torch.tensor([3, 1, 7, 4, 2, 6]), torch.tensor([5, 9, 1, 12, 3, 8]), 20
STOP = StopRule((*range(8), V - 2), min_new_tokens=2)
MODELS: dict[str, dict[str, Any]] = {
    "rotary positions": {},
    "absolute positions": {"architecture": "gpt2"},
    "sliding windows": {"architecture": "mistral", "sliding_window": 4},
    "tied embedding": {"tie_word_embeddings": True},
}
KINDS = ["shared", "separate", "lora", "lora, separate"]
"""What is trained: the policy's trunk with a value head, one more trunk, an adapter, or two of them."""
PAIRS = [("rotary positions", kind) for kind in KINDS] + [(model, "shared") for model in [*MODELS][1:]]
PATHS: dict[str, dict[str, Any]] = {
    "packed": {},
    "many chunks": {"chunk": 5 * V},
    "checkpointing": {"checkpointing": True},
    "micro-batches": {"micro": 4},
    "prompts in common": {"groups": True},
    "all of them": {"chunk": 5 * V, "checkpointing": True, "micro": 4, "groups": True},
}


def make_policy(kind: str = "shared", **model: Any) -> ActorCritic:
    lora = None
    if "lora" in kind:
        targets = ["c_attn"] if model.get("architecture") == "gpt2" else ["q_proj", "v_proj"]
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # peft draws from torch's global generator
        policy = ActorCritic.from_pretrained(
            mock_lm(V, **model), "separate" if "separate" in kind else "shared", temperature=0.8, lora=lora
        )
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(3))
    policy.seed(0)
    return policy


def make_sequences(groups: bool = False) -> Sequences:
    """Six rows; with `groups`, the last four of them respond to the same prompt."""
    ids = torch.randint(8, V - 2, (len(PROMPTS), WIDTH), generator=torch.Generator().manual_seed(0))
    prompts = PROMPTS.clone()
    if groups:
        ids[2:, :7], prompts[2:] = ids[2, :7], 7
    return Sequences(ids, prompts, RESPONSES, STOP)


def gradients(policy: ActorCritic, *evaluations: Evaluation) -> dict[str, Tensor]:
    """Of a loss in which every log-prob, value and entropy has a weight of its own, by parameter."""
    policy.zero_grad()
    for evaluation in evaluations:
        rows = evaluation.log_prob.shape
        weights = (torch.linspace(start, end, rows.numel()).view(rows) for start, end in ((-1, 2), (1, -1), (2, 0)))
        sum((weight * column).sum() for weight, column in zip(weights, evaluation[:3], strict=True)).backward()
    return {name: x.grad.clone() for name, x in policy.named_parameters() if x.grad is not None}


FORWARD = terms_of(mock_lm(V))


def assert_rounded(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal up to rounding, of numbers that come out of the model or are normed to 1."""
    scale = max(1.0, float(expected.detach().abs().max()))
    assert_close(actual, expected, terms=FORWARD, scale=scale, what=what)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("model", "kind"), PAIRS)
def test_passes_over_whole_sequences_are_the_plain_path(
    model: str, kind: str, path: str, plainly: Plainly, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, sequences = PATHS[path], make_sequences("groups" in PATHS[path])
    parts = torch.arange(len(sequences)).split(options.get("micro", len(sequences)))
    plain, fast = (make_policy(kind, **MODELS[model]) for _ in range(2))
    expected = [plainly(plain, sequences[rows]) for rows in parts]
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", options.get("chunk", log_probs.CHUNK_ELEMENTS))
    if "checkpointing" in options:
        fast.checkpoint_layers()
    actual = [fast.evaluate(sequences[rows], entropy_gradient=True) for rows in parts]
    for mine, other in zip(actual, expected, strict=True):
        for name in ("log_prob", "value", "entropy"):
            assert_rounded(getattr(mine, name), getattr(other, name), name)
    mine, other = gradients(fast, *actual), gradients(plain, *expected)
    assert mine.keys() == other.keys()
    assert len(mine) == sum(weight.requires_grad for weight in fast.parameters())
    for name in mine:
        assert other[name].norm() > 1e-4, f"{name}: nothing to compare"
        assert_rounded(mine[name] / other[name].norm(), other[name] / other[name].norm(), name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "t5", "bart"])
def test_checkpointed_layers_run_again_in_the_backward_pass(architecture: str) -> None:
    make = mock_seq2seq_lm if architecture in ("t5", "bart") else mock_lm
    calls, gradients = [], []
    for checkpointed in (False, True):
        policy = ActorCritic.from_pretrained(make(V, architecture=architecture), critic="separate")
        torch.nn.init.ones_(policy.value_head.weight)
        if checkpointed:
            policy.checkpoint_layers()
        projections = [m for m in policy.modules() if type(m).__name__ in ("Linear", "Conv1D")]
        heads = {id(policy.head), id(policy.lm.get_output_embeddings()), id(policy.value_head)}
        made: list[Any] = []
        for module in projections:
            if id(module) not in heads:
                module.register_forward_pre_hook(lambda module, _, made=made: made.append(module))
        sequences = dataclasses.replace(make_sequences(), decoder_start=policy.decoder_start_ids)
        evaluation = policy.evaluate(sequences)
        forward = len(made)
        (evaluation.log_prob + evaluation.value).sum().backward()
        calls.append((forward, len(made)))
        gradients.append({name: x.grad for name, x in policy.named_parameters() if x.grad is not None})
        assert not any(module.training for trunk in (policy.lm, policy.critic) for module in trunk.modules())
    (forward, _), (again, total) = calls
    assert again == forward == calls[0][1]
    assert total == 2 * forward
    for name, expected in gradients[0].items():
        norm = max(1.0, float(expected.norm()))
        assert_rounded(gradients[1][name] / norm, expected / norm, name)


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_a_packed_pass_and_of_cached_decoding_are_those_of_the_whole_model(model: str) -> None:
    policy, sequences = make_policy(**MODELS[model]), make_sequences()
    packed = policy.logits(sequences.states())
    assert packed.dtype == torch.float32
    rows, steps = sequences.steps
    for step in range(int(RESPONSES.max())):
        cached = policy.next_logits(sequences.observation(torch.full_like(PROMPTS, step).minimum(RESPONSES)))
        for row in (step < RESPONSES).nonzero()[:, 0].tolist():
            ids = sequences.input_ids[row : row + 1, : PROMPTS[row] + step]
            plain = policy.lm(input_ids=ids, use_cache=False).logits[0, -1] / 0.8
            assert_rounded(cached[row], plain, "cached")
            assert_rounded(packed[(rows == row) & (steps == step)][0], plain, "packed")


def acted(policy: ActorCritic, prompts: Tensor, new: int) -> tuple[Sequences, Tensor, Tensor]:
    """Responses by `act`, token by token."""
    ids, lengths = prompts.clone(), PROMPTS.clone()
    alive, counts = torch.ones(len(ids), dtype=torch.bool), torch.zeros(len(ids), dtype=torch.long)
    log_probs, values = torch.zeros(len(ids), new), torch.zeros(len(ids), new)
    for step in range(new):
        allowed = torch.ones(len(ids), V, dtype=torch.bool)
        allowed[:, list(STOP.ids)] = step >= STOP.min_new_tokens
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        action, log_prob, value = policy.act({"input_ids": ids, "attention_mask": mask}, action_masks=allowed)
        ids[alive, lengths[alive]] = action[alive]
        log_probs[:, step], values[:, step] = log_prob, value
        lengths, counts = lengths + alive, counts + alive
        alive = alive & ~torch.isin(action, torch.tensor(STOP.ids))
    return Sequences(ids, PROMPTS, counts, STOP), log_probs, values


def written(policy: ActorCritic, prompts: Tensor, new: int) -> tuple[Sequences, Tensor, Tensor]:
    """Responses in one go."""
    tokens, log_probs, values, counts, _ = policy.generate(prompts, PROMPTS, new, STOP)
    ids = prompts.clone()
    for row, (start, count) in enumerate(zip(PROMPTS.tolist(), counts.tolist(), strict=True)):
        ids[row, start : start + count] = tokens[row, :count]
    return Sequences(ids, PROMPTS, counts, STOP), log_probs, values


@pytest.mark.parametrize(
    ("model", "kind", "way"),
    [(*pair, way) for pair in PAIRS for way in ("act", "write", "chunks of rows")]
    + [(*pair, "captured steps") for pair in (PAIRS[0], PAIRS[2], PAIRS[4])],
)
def test_what_is_noted_while_writing_is_the_plain_path(
    model: str, kind: str, way: str, plainly: Plainly, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, new = make_policy(kind, **MODELS[model]), 16
    prompts = torch.nn.functional.pad(make_sequences().input_ids[:, :7], (0, new))
    captured = request.getfixturevalue("captures") if way == "captured steps" else None
    if way == "chunks of rows":
        monkeypatch.setattr(generation, "LOGIT_ELEMENTS", 2 * V)
    for _ in range(1 if captured is None else 3):
        sequences, log_probs, values = (acted if way == "act" else written)(policy, prompts, new)
    assert captured != []
    assert len({*sequences.response_lengths.tolist()}) > 2, "rows end one by one"
    with torch.no_grad():
        plain = plainly(policy, sequences)
    mask = sequences.response_mask
    assert_rounded(log_probs[:, : mask.shape[1]][mask], plain.log_prob[mask])
    if "separate" not in kind or way == "act":  # a critic of its own reads whole episodes afterwards
        assert_rounded(values[:, : mask.shape[1]][mask], plain.value[mask])


# --- bfloat16: the band that ActorCritic.from_pretrained and RolloutAgentConfig.bf16 state ---


def assert_in_band(log_probs: Tensor, others: Tensor) -> None:
    """In nats: below 0.03 a token on average, 99% of them below 0.15, all below 0.5; ratios average 1."""
    assert log_probs.dtype == others.dtype == torch.float32
    moved = (log_probs - others).detach().flatten()
    assert moved.abs().mean() < 0.03
    assert moved.abs().quantile(0.99) < 0.15
    assert moved.abs().max() < 0.5
    assert float(moved.exp().mean()) == pytest.approx(1.0, abs=0.01)


def surrogate_gradient(policy: ActorCritic, log_probs: Tensor) -> Tensor:
    """Of a policy loss with random advantages, in one vector."""
    advantages = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((log_probs * advantages).mean(), [*policy.lm.parameters()])
    return torch.cat([gradient.float().flatten() for gradient in found])


@pytest.mark.parametrize("name", ["mock", pytest.param("tiny", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_what_bf16_moves_is_within_the_published_band(name: str, seed: int) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(seed=seed) if name == "mock" else name)
    half = ActorCritic.from_pretrained(copy.deepcopy(policy.lm).bfloat16())
    size, vocabulary, new = 24, policy.vocab_size, 16
    prompts = torch.randint(vocabulary - 2, (size, 8 + new), generator=torch.Generator().manual_seed(seed))
    starts, played = torch.full((size,), 8), []
    for writer in (policy, half):
        writer.seed(seed)
        tokens, log_probs, *_ = writer.generate(prompts, starts, new, StopRule())
        ids = torch.cat([prompts[:, :8], tokens], 1)
        played.append((Sequences(ids, starts, torch.full((size,), new)), log_probs))
    (sequences, old), (by_half, old_of_half) = played
    exact = policy.evaluate(sequences).log_prob
    with torch.autocast("cpu", torch.bfloat16):
        rounded = policy.evaluate(sequences).log_prob
    assert_in_band(rounded, old)
    assert (rounded - exact).abs().mean() > 1e-3, "bfloat16 moves something"
    gradients = [surrogate_gradient(policy, log_probs) for log_probs in (exact, rounded)]
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()

    again = half.evaluate(by_half).log_prob
    assert_in_band(again, old_of_half)  # how far these two are apart is the processor's: on some they round alike
    exact = policy.evaluate(by_half).log_prob
    assert_in_band(again, exact)
    assert (again - exact).abs().mean() > 1e-3, "bfloat16 moves something"
