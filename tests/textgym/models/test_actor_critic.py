"""ActorCritic: sampling and scoring agree, whatever the padding, batch, temperature or mode."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import StopRule
from textgym.models.sequences import Sequences
from textgym.rewards.kl import ESTIMATORS, KLPenalty
from textgym.testing import assert_close, mock_lm, terms_of, tolerance

pytestmark = pytest.mark.numerics

FORWARD = terms_of(mock_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

V = 258


def observe(ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def play(policy: ActorCritic, sequences: Sequences, **act: Any) -> tuple[Sequences, Tensor, Tensor]:
    """Samples all response tokens step by step; returns the sequences written, their log-probs and values."""
    ids, lengths = sequences.input_ids.clone(), sequences.prompt_lengths.clone()
    mask, log_probs, values = sequences.response_mask, [], []
    for t in range(mask.shape[1]):
        step = policy.act(observe(ids, lengths), **act)
        log_probs.append(step.log_prob * mask[:, t])
        values.append(step.value * mask[:, t])
        rows = mask[:, t].nonzero()[:, 0]
        ids[rows, lengths[rows]] = step.action[rows]
        lengths = lengths + mask[:, t]
    return (
        Sequences(ids, sequences.prompt_lengths, sequences.response_lengths, sequences.stop),
        torch.stack(log_probs, 1),
        torch.stack(values, 1),
    )


def blank(prompts: list[int], responses: list[int], width: int = 24, stop: StopRule | None = None) -> Sequences:
    ids = torch.randint(V, (len(prompts), width), generator=torch.Generator().manual_seed(5))
    return Sequences(ids, torch.tensor(prompts), torch.tensor(responses), stop or StopRule())


EIGHT = ([3, 1, 7, 4, 2, 6, 5, 8], [5, 9, 1, 12, 3, 12, 8, 2])


def policy_of(
    architecture: str = "llama", critic: str = "shared", temperature: float = 1.0, **config: Any
) -> ActorCritic:
    policy = ActorCritic.from_pretrained(mock_lm(architecture=architecture, **config), critic, temperature)
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(3))
    policy.seed(0)
    return policy


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("minibatch", [1, 3, 8])
def test_ratio_is_one_before_the_first_update(architecture: str, critic: str, minibatch: int) -> None:
    policy = policy_of(architecture, critic)
    sequences, log_probs, values = play(policy, blank(*EIGHT))
    for rows in torch.randperm(8).split(minibatch):
        new = policy.evaluate(sequences[rows])
        width = new.log_prob.shape[1]
        assert (new.log_prob - log_probs[rows, :width]).abs().max() < ROUNDING
        assert (new.value - values[rows, :width]).abs().max() < ROUNDING


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_is_zero_at_step_zero(estimator: Any, temperature: float) -> None:
    policy = policy_of(temperature=temperature)
    sequences, log_probs, _ = play(policy, blank(*EIGHT))
    kl = KLPenalty(policy.reference(), 0.1, estimator).of_sequences(policy, sequences, log_probs)
    assert kl.abs().max() < ROUNDING


def test_kl_is_zero_through_lora_and_the_reference_stays_there() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    policy = ActorCritic.from_pretrained(mock_lm(), lora=lora)
    before, reference = copy.deepcopy(policy), policy.reference()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    sequences, log_probs, _ = play(before, blank(*EIGHT))
    assert_close(reference.sequence_log_probs(sequences), log_probs, terms=FORWARD)
    assert (policy.evaluate(sequences).log_prob - log_probs).abs().max() > 0.1, "the adapter does nothing: vacuous"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dropout_is_off_even_in_training_mode(architecture: str) -> None:
    rates = {"gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}, "llama": {"attention_dropout": 0.5}}
    policy = policy_of(architecture, critic="separate", **rates[architecture])
    policy.train()
    sequences, log_probs, values = play(policy, blank(*EIGHT))
    new = policy.evaluate(sequences)
    assert (new.log_prob - log_probs).abs().max() < ROUNDING
    assert (new.value - values).abs().max() < ROUNDING
    reference = policy.reference().train()
    assert (reference.sequence_log_probs(sequences) - log_probs).abs().max() < ROUNDING


def test_temperature_is_in_training_and_reference_too() -> None:
    policy = policy_of(temperature=0.7)
    sequences, log_probs, _ = play(policy, blank(*EIGHT))
    assert (policy.evaluate(sequences).log_prob - log_probs).abs().max() < ROUNDING
    assert policy.reference().temperature == 0.7
    plain = torch.log_softmax(policy.lm(sequences.input_ids[:1, :3]).logits[0, -1] / 0.7, -1)
    assert_close(plain[sequences.input_ids[0, 3]], log_probs[0, 0], terms=FORWARD, scale=8.0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_checkpointed_layers_keep_less_and_have_the_same_gradients(architecture: str, critic: str) -> None:
    kept, gradients = [], []
    for checkpointed in (False, True):
        policy = policy_of(architecture, critic, num_layers=4)
        if checkpointed:
            policy.checkpoint_layers()
        sequences, log_probs, _ = play(policy, blank(*EIGHT))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            new = policy.evaluate(sequences)
        assert (new.log_prob - log_probs).abs().max() < ROUNDING
        (new.log_prob.sum() + new.value.square().sum()).backward()
        play(policy, blank(*EIGHT))  # decodes with its cache again
        kept.append(sum(sizes))
        gradients.append([weight.grad for weight in policy.parameters()])
    assert kept[1] < 0.7 * kept[0]
    assert_close(gradients[1], gradients[0], terms=FORWARD, scale=1.0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("pads", [0, 1, 5])
def test_right_padding_invariance(architecture: str, pads: int) -> None:
    policy = policy_of(architecture)
    sequences = blank([4], [6], width=10)
    plain = policy.evaluate(sequences)
    junk = torch.randint(V, (1, pads))
    wider = Sequences(torch.cat([sequences.input_ids, junk], 1), sequences.prompt_lengths, sequences.response_lengths)
    padded = policy.evaluate(wider)
    logits = policy.lm(sequences.input_ids).logits.log_softmax(-1)[0]
    expected = logits[3:9].gather(1, sequences.input_ids[0, 4:10, None])[:, 0]
    for result in (plain, padded):
        assert_close(result.log_prob[0], expected, terms=FORWARD)
        assert_close(result.value, plain.value, terms=FORWARD)
    lengths = torch.tensor([10])
    step = policy.act(observe(wider.input_ids, lengths), deterministic=True)
    assert step.action[0] == logits[-1].argmax()


def test_pad_token_equal_to_eos() -> None:
    """EOS inside a response, and the same id in the padding: lengths decide, so its log-prob stays."""
    policy = policy_of()
    sequences = blank([3, 3], [6, 2])
    eos = V - 2
    sequences.input_ids[0, 5] = eos
    sequences.input_ids[1, 5:] = eos
    result = policy.evaluate(sequences)
    assert result.log_prob[0, 2] < 0
    assert (result.log_prob[1, 2:] == 0).all()
    assert sequences.response_mask.sum(1).tolist() == [6, 2]


def test_masks_come_from_lengths_not_from_ids() -> None:
    """The pad id sampled as an ordinary token: log-probs after it still agree."""
    policy = policy_of("gpt2")
    pad = V - 1
    only_pad = torch.zeros(8, V, dtype=torch.bool)
    only_pad[:, pad] = True
    sequences, _, _ = play(policy, blank(*EIGHT), action_masks=only_pad)
    assert (sequences.actions == pad).all()
    stepped = []
    for t in range(12):
        lengths = torch.minimum(sequences.prompt_lengths + t, sequences.lengths - 1)
        stepped.append(policy.log_prob(observe(sequences.input_ids, lengths), torch.full((8,), pad)))
    new = policy.evaluate(sequences)
    assert_close(new.log_prob, torch.stack(stepped, 1) * sequences.response_mask, terms=FORWARD)


def test_entropy_is_exact_positive_and_blind_to_padding() -> None:
    policy = policy_of(temperature=0.7)
    sequences = blank([4, 2], [6, 3])
    entropy = policy.evaluate(sequences).entropy
    log_p = (policy.lm(sequences.input_ids[:1, :10]).logits / 0.7).log_softmax(-1)[0, 3:9]
    assert_close(entropy[0], -(log_p.exp() * log_p).sum(-1), terms=FORWARD)
    assert (entropy[sequences.response_mask] >= 0).all()
    assert (entropy[~sequences.response_mask] == 0).all()
    wider = Sequences(
        torch.cat([sequences.input_ids, torch.zeros(2, 9, dtype=torch.long)], 1),
        sequences.prompt_lengths,
        sequences.response_lengths,
    )
    torch.testing.assert_close(policy.evaluate(wider).entropy, entropy)


def test_no_off_by_one() -> None:
    """A model whose next token is planted: id + 1. Log-prob t belongs to token t, value t to the state before it."""
    policy = policy_of()
    ids = torch.arange(10, 34)[None].clone()
    sequences = Sequences(ids, torch.tensor([4]), torch.tensor([6]))
    hidden = policy.lm.base_model(ids).last_hidden_state[0]

    class Planted(torch.nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            position = torch.cdist(states, hidden).argmin(1)  # which context this state belongs to
            return 50.0 * torch.nn.functional.one_hot(ids[0, position] + 1, V).float()

    policy.head = Planted()
    assert policy.evaluate(sequences).log_prob.abs().max() < ROUNDING
    expected = policy.value_head(hidden[3:9])[:, 0]
    assert_close(policy.evaluate(sequences).value[0], expected, terms=FORWARD)


def test_log_softmax_in_float32() -> None:
    """bf16 weights: the log-probs are float32, sum to one, and stay within the documented band of the fp32 model's."""
    policy = policy_of()
    sequences, _, _ = play(policy, blank(*EIGHT))
    exact = policy.evaluate(sequences)
    half = ActorCritic.from_pretrained(copy.deepcopy(policy.lm).bfloat16())
    result = half.evaluate(sequences)
    assert result.log_prob.dtype == torch.float32
    hidden = half.hidden(sequences.states())
    total = (half.head(hidden).float().log_softmax(-1)).logsumexp(-1)
    assert_close(total, torch.zeros_like(total), terms=V, scale=1.0)
    assert (result.log_prob - exact.log_prob).abs().max() < 0.5


def test_batch_composition_changes_nothing() -> None:
    policy = policy_of("gpt2")
    sequences, _, _ = play(policy, blank(*EIGHT))
    together = policy.evaluate(sequences)
    for row in range(8):
        alone = policy.evaluate(sequences[row : row + 1])
        width = alone.log_prob.shape[1]
        for name in ("log_prob", "value", "entropy"):
            expected = getattr(alone, name)[0]
            assert_close(getattr(together, name)[row, :width], expected, terms=FORWARD)


def test_value_loss_leaves_the_policy_alone_with_a_separate_critic() -> None:
    policy = policy_of(critic="separate")
    policy.evaluate(blank(*EIGHT)).value.square().sum().backward()
    assert all(parameter.grad is None for parameter in policy.lm.parameters())
    assert any(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in policy.critic.parameters()
    )


def test_a_fresh_value_head_says_zero() -> None:
    assert (ActorCritic.from_pretrained(mock_lm()).evaluate(blank(*EIGHT)).value == 0).all()


def test_stop_tokens_are_banned_before_the_minimum_everywhere() -> None:
    eos = V - 2
    stop = StopRule((eos,), min_new_tokens=4)
    policy = policy_of()
    with torch.no_grad():
        policy.lm.lm_head.weight[eos] *= 30  # EOS would be drawn at once
    masks = torch.ones(8, V, dtype=torch.bool)
    masks[:, eos] = False
    sequences, log_probs, _ = play(policy, blank(EIGHT[0], [4] * 8, stop=stop), action_masks=masks)
    assert (sequences.actions != eos).all()
    assert_close(policy.evaluate(sequences).log_prob, log_probs, terms=FORWARD)
    assert_close(policy.reference().sequence_log_probs(sequences), log_probs, terms=FORWARD)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    sequences = blank(*EIGHT)

    def gradients() -> list[Tensor]:
        policy.zero_grad()
        result = policy.evaluate(sequences, entropy_gradient=True)
        (result.log_prob.sum() + 0.1 * result.entropy.sum()).backward()
        return [parameter.grad.clone() for parameter in policy.lm.parameters()]

    whole = gradients()
    monkeypatch.setattr("textgym.models.distributions.log_probs.CHUNK_ELEMENTS", 7 * V)
    for expected, actual in zip(whole, gradients(), strict=True):
        assert_close(actual, expected, terms=FORWARD)


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    policy = policy_of()
    ids, lengths = torch.full((4000, 4), 7), torch.full((4000,), 4)
    policy.seed(1)
    first = policy.act(observe(ids, lengths)).action
    policy.seed(1)
    assert (policy.act(observe(ids, lengths)).action == first).all()
    expected = policy.lm(ids[:1]).logits[0, -1].softmax(-1)
    frequency = torch.bincount(first, minlength=V) / 4000
    assert (frequency - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_save_and_load(tmp_path: Path) -> None:
    policy = policy_of(critic="separate")
    policy.save_pretrained(tmp_path / "policy")
    again = ActorCritic.from_pretrained(tmp_path / "policy", critic="separate")
    for key, value in policy.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.randint(V, (1, 5))
    assert_close(plain(ids).logits, policy.lm(ids).logits, terms=FORWARD)


def test_a_critic_of_another_form_comes_back(tmp_path: Path) -> None:
    """A critic that started from a reward model of its own depth and width."""
    mock_lm(num_layers=1, hidden_size=16, seed=1).save_pretrained(tmp_path / "reward")
    policy = ActorCritic.from_pretrained(mock_lm(), critic=str(tmp_path / "reward"))
    torch.nn.init.normal_(policy.value_head.weight)
    policy.save_pretrained(tmp_path / "policy")
    again = ActorCritic.from_pretrained(tmp_path / "policy", critic="separate")
    assert again.state_dict().keys() == policy.state_dict().keys()
    for key, value in policy.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    states = Sequences(torch.randint(V, (2, 8)), torch.tensor([3, 4]), torch.tensor([5, 4]))
    assert_close(again.sequence_values(states), policy.sequence_values(states), terms=FORWARD)


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    policy.save_pretrained(tmp_path / "policy")
    before = {path.name: path.read_bytes() for path in (tmp_path / "policy").iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("textgym.models.actor_critic.save_file", full)
    with pytest.raises(OSError, match="check the free disk space"):
        policy.save_pretrained(tmp_path / "policy", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "policy").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert safetensors.load_file(tmp_path / "policy" / "critic.safetensors")


def test_unknown_names_are_explained() -> None:
    with pytest.raises(ValueError, match="cannot load a model called 'no/such-model': use 'tiny'"):
        ActorCritic.from_pretrained("/no/such-model"[1:])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        ActorCritic.from_pretrained(mock_lm(), temperature=0.0)
