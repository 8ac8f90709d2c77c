"""Encoder-decoder models against full recomputation: cached, padded, at acting and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from textgym.models.actor_critic import ActorCritic
from textgym.models.architectures.encoder_decoder import EncoderDecoderRows, EncoderDecoderStates, decoder_start_ids
from textgym.models.decoding.encoder_decoder_cache import CachedEncoderDecoder
from textgym.models.distributions import log_probs
from textgym.models.distributions.log_probs import StopRule
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.testing import assert_close, mock_lm, mock_seq2seq_lm, terms_of

FORWARD = terms_of(mock_seq2seq_lm())

V = 97
T5_SHAPE = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": T5_SHAPE,
    "t5 v1.1": {**T5_SHAPE, "architecture": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": T5_SHAPE,
    "umt5": T5_SHAPE,
    "bart": {},
    "mbart": {},
    "pegasus": {},
    "marian": {},
    "blenderbot": {},
    "plbart": {},
    "longt5": {**T5_SHAPE, "encoder_attention_type": "transient-global", "local_radius": 3, "global_block_size": 4},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "t5"]


def random_lm(name: str, **config: Any) -> Any:
    settings = {"architecture": name, **FAMILIES[name], **config}
    lm = mock_seq2seq_lm(V, **settings)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*lm.parameters(), getattr(lm, "final_logits_bias", torch.zeros(0))):
        tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator))  # so that errors show
    return lm


@torch.no_grad()
def full_logits(lm: Any, prompt: Tensor, decoder_ids: Tensor) -> Tensor:
    """One row alone, unpadded, without a cache, and with the model's own masks and positions."""
    return lm(input_ids=prompt[None], decoder_input_ids=decoder_ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize("name", ["t5", *SLOW])
def test_cached_decoding_equals_full_recomputation(name: str) -> None:
    lm = random_lm(name)
    head = TokenModel(lm).head
    rows, width, longest, steps = 4, 12, 14, 40
    rng = torch.Generator().manual_seed(1)
    decoder = CachedEncoderDecoder(lm, rows, width, longest)
    prompts, ids = (torch.randint(V, (rows, size), generator=rng) for size in (width, longest))
    sizes, lengths = torch.tensor([1, 12, 5, 9]), torch.tensor([1, 1, 2, 4])
    restarts = 0
    for _ in range(steps):
        logits = head(decoder.advance(prompts, sizes, ids, lengths))
        for row in range(rows):
            expected = full_logits(lm, prompts[row, : sizes[row]], ids[row, : lengths[row]])[-1]
            assert_close(logits[row], expected, terms=FORWARD)
        lengths = lengths + torch.randint(0, 2, (rows,), generator=rng)  # some rows wait
        restart = (torch.rand(rows, generator=rng) < 0.1) | (lengths > longest)
        lengths = torch.where(restart, torch.randint(1, 5, (rows,), generator=rng), lengths)
        ids[restart] = torch.randint(V, (int(restart.sum()), longest), generator=rng)
        new = restart & (torch.rand(rows, generator=rng) < 0.7)  # some restart with the same prompt
        sizes = torch.where(new, torch.randint(1, width + 1, (rows,), generator=rng), sizes)
        prompts[new] = torch.randint(V, (int(new.sum()), width), generator=rng)
        restarts += int(restart.sum())
    assert restarts > 10


def test_any_observation_is_legal() -> None:
    """Prompts and responses that shrink, jump and change are taken as new."""
    lm = random_lm("bart")
    head, decoder = TokenModel(lm).head, CachedEncoderDecoder(lm, 2, 6, 7)
    rng = torch.Generator().manual_seed(0)
    for _ in range(12):
        prompts, ids = (torch.randint(3, (2, size), generator=rng) for size in (6, 7))
        sizes, lengths = (torch.randint(1, size + 1, (2,), generator=rng) for size in (6, 7))
        logits = head(decoder.advance(prompts, sizes, ids, lengths))
        for row in range(2):
            expected = full_logits(lm, prompts[row, : sizes[row]], ids[row, : lengths[row]])[-1]
            assert_close(logits[row], expected, terms=FORWARD)


def test_the_encoder_runs_once_an_episode_and_a_step_costs_one_token_a_row() -> None:
    lm = random_lm("t5")
    encoded, decoded = [], []
    for stack, counts in ((lm.encoder, encoded), (lm.decoder, decoded)):
        stack.register_forward_pre_hook(
            lambda module, args, kwargs, counts=counts: counts.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
    decoder = CachedEncoderDecoder(lm, 3, 8, 10)
    prompts, ids, sizes = torch.randint(V, (3, 8)), torch.randint(V, (3, 10)), torch.tensor([4, 8, 6])
    for lengths in ([1, 1, 1], [2, 2, 2], [3, 2, 3], [3, 2, 3], [4, 3, 3]):
        decoder.advance(prompts, sizes, ids, torch.tensor(lengths))
    assert encoded == [(3, 8)]
    assert decoded == [(3, 1), (3, 1), (2, 1), (1, 1), (1, 1)]  # the last step has rows of two lengths
    prompts[1] = (prompts[1] + 1) % V  # a new episode in the second row
    decoder.advance(prompts, sizes, ids, torch.tensor([5, 1, 4]))
    assert encoded == [(3, 8), (1, 8)]


def test_a_weight_update_empties_the_cache() -> None:
    lm = random_lm("t5")
    model = TokenModel(lm)
    decoder = CachedEncoderDecoder(lm, 1, 4, 6)
    prompts, ids, sizes = torch.randint(V, (1, 4)), torch.randint(V, (1, 6)), torch.tensor([4])
    decoder.advance(prompts, sizes, ids, torch.tensor([2]))
    with torch.no_grad():
        lm.shared.weight.mul_(1.1)
    logits = model.head(decoder.advance(prompts, sizes, ids, torch.tensor([3])))
    assert_close(logits[0], full_logits(lm, prompts[0], ids[0, :3])[-1], terms=FORWARD)


def sequences_of(
    prompts: list[int], responses: list[int], start: tuple[int, ...] = (V - 1,), stop: StopRule | None = None
) -> Sequences:
    ids = torch.randint(V, (len(prompts), 20), generator=torch.Generator().manual_seed(5))
    return Sequences(ids, torch.tensor(prompts), torch.tensor(responses), stop or StopRule(), decoder_start=start)


def play(policy: ActorCritic, sequences: Sequences) -> tuple[Sequences, Tensor, Tensor]:
    """Samples all response tokens step by step; returns the sequences written, their log-probs and values."""
    mask = sequences.response_mask
    log_probs, values = [], []
    for t in range(mask.shape[1]):
        written = sequences.response_lengths.clamp(max=t)
        step = policy.act(sequences.observation(written))
        rows = mask[:, t].nonzero()[:, 0]
        sequences.input_ids[rows, sequences.prompt_lengths[rows] + t] = step.action[rows]
        log_probs.append(step.log_prob * mask[:, t])
        values.append(step.value * mask[:, t])
    return sequences, torch.stack(log_probs, 1), torch.stack(values, 1)


def policy_of(name: str, critic: str = "shared", **arguments: Any) -> ActorCritic:
    policy = ActorCritic.from_pretrained(random_lm(name), critic, **arguments)
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(3))
    policy.seed(0)
    return policy


@pytest.mark.parametrize(
    ("name", "critic"), [("t5", "shared"), ("t5", "separate"), ("bart", "shared"), ("mbart", "separate")]
)
def test_ratio_is_one_before_the_first_update(name: str, critic: str) -> None:
    policy = policy_of(name, critic, temperature=0.7)
    sequences, log_probs, values = play(policy, sequences_of([3, 1, 7, 4], [5, 8, 1, 3]))
    for rows in (torch.tensor([2, 0]), torch.arange(4)):
        new = policy.evaluate(sequences[rows])
        width = new.log_prob.shape[1]
        assert_close(new.log_prob, log_probs[rows, :width], terms=FORWARD)
        assert_close(new.value, values[rows, :width], terms=FORWARD)
    assert_close(policy.sequence_values(sequences), values, terms=FORWARD)
    assert_close(policy.reference().sequence_log_probs(sequences), log_probs, terms=FORWARD)
    before_last = sequences.observation(sequences.response_lengths - 1)
    expected = values.gather(1, sequences.response_lengths[:, None] - 1)[:, 0]
    assert_close(policy.value(before_last), expected, terms=FORWARD)


@pytest.mark.parametrize("every_option", [False, True])
@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_log_probs_and_gradients_are_those_of_a_plain_forward(
    name: str, every_option: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With layers that run again in the backward pass, and logits in chunks, too."""
    policy = policy_of(name)
    if every_option:
        monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", 3 * V)
        policy.checkpoint_layers()
    start = (V - 1, 5)
    sequences = sequences_of([3, 1, 7], [4, 8, 1], start)
    evaluation = policy.evaluate(sequences)
    (evaluation.log_prob.sum() + evaluation.value.sum()).backward()
    gradients = {key: x.grad.clone() for key, x in policy.lm.named_parameters() if x.grad is not None}
    policy.zero_grad()
    plain = torch.zeros(())
    for row in range(3):
        prompt, length = int(sequences.prompt_lengths[row]), int(sequences.response_lengths[row])
        response = sequences.input_ids[row, prompt : prompt + length]
        output = policy.lm(
            input_ids=sequences.input_ids[row : row + 1, :prompt],
            decoder_input_ids=torch.cat((torch.tensor(start), response[:-1]))[None],
            output_hidden_states=True,
        )
        chosen = output.logits[0, -length:].log_softmax(-1).gather(1, response[:, None])[:, 0]
        assert_close(evaluation.log_prob[row, :length], chosen, terms=FORWARD)
        plain = plain + chosen.sum() + policy.value_head(output.decoder_hidden_states[-1][0, -length:]).sum()
    plain.backward()
    assert len(gradients) > 20
    for key, weight in policy.lm.named_parameters():
        if weight.grad is not None:
            scale = max(1.0, float(weight.grad.norm()))
            assert_close(gradients[key] / scale, weight.grad / scale, terms=FORWARD, scale=1.0)


def test_more_rows_than_one_pass_takes_come_back_in_their_order() -> None:
    lm = random_lm("t5")
    generator = torch.Generator().manual_seed(2)
    ids, sizes = torch.randint(V, (70, 5), generator=generator), torch.randint(1, 6, (70,), generator=generator)
    rows = EncoderDecoderRows(ids, sizes, ids.flip(1), sizes.flip(0))
    hidden = EncoderDecoderStates.whole(rows).hidden(lm)
    head = TokenModel(lm).head
    for row in (0, 31, 32, 69):
        expected = full_logits(lm, ids[row, : sizes[row]], rows.decoder_input_ids[row, : rows.decoder_lengths[row]])
        assert_close(head(hidden[row]), expected[-1], terms=FORWARD)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_saved_policy_is_a_plain_transformers_folder(name: str, critic: str, tmp_path: Path) -> None:
    policy = policy_of(name, critic)
    sequences = sequences_of([3, 2], [4, 2])
    before = policy.evaluate(sequences)
    policy.save_pretrained(tmp_path / "policy")
    plain = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "policy")
    prompt, ids = sequences.input_ids[0, :3], torch.tensor([V - 1, 4, 9])
    assert_close(full_logits(plain, prompt, ids), full_logits(policy.lm, prompt, ids), terms=FORWARD)
    after = ActorCritic.from_pretrained(tmp_path / "policy", critic).evaluate(sequences)
    for one, other in zip(before, after, strict=True):
        assert_close(one, other, terms=FORWARD)


def test_lora_trains_the_adapter_alone_and_the_reference_stays_at_the_start() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    policy = ActorCritic.from_pretrained(random_lm("t5"), lora=lora)
    sequences = sequences_of([3, 2], [4, 2])
    start = policy.evaluate(sequences).log_prob.detach()
    reference = policy.reference()
    for key, weight in policy.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight)
    assert (policy.evaluate(sequences).log_prob - start).abs().max() > 0.1
    assert_close(reference.sequence_log_probs(sequences), start, terms=FORWARD)


def test_dropout_and_layer_drop_are_off_even_in_training_mode() -> None:
    lm = random_lm("bart", dropout=0.5, attention_dropout=0.5, encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    policy = ActorCritic.from_pretrained(lm).train()
    sequences, log_probs, _ = play(policy, sequences_of([3, 2], [4, 2]))
    assert_close(policy.evaluate(sequences).log_prob, log_probs, terms=FORWARD)


def test_the_start_tokens_are_read_from_the_config() -> None:
    assert decoder_start_ids(mock_lm()) == ()
    assert TokenModel(random_lm("t5")).decoder_start_ids == (V - 1,)
    translator = random_lm("mbart")
    translator.generation_config.forced_bos_token_id = 7  # the language to translate to
    assert decoder_start_ids(translator) == (V - 1, 7)
    silent = random_lm("t5")
    silent.config.decoder_start_token_id = silent.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="does not say which token its decoder begins with"):
        decoder_start_ids(silent)


def test_a_model_of_the_other_kind_is_refused_with_a_sentence() -> None:
    sequences = sequences_of([3, 2], [4, 2])
    causal, seq2seq = TokenModel(mock_lm(V)), TokenModel(random_lm("t5"))
    plain = {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with pytest.raises(ValueError, match="has no encoder"):
        causal.sequence_log_probs(sequences)
    with pytest.raises(ValueError, match="has no encoder"):
        causal.next_logits(sequences.observation(sequences.response_lengths))
    with pytest.raises(ValueError, match=r"decoder_start_ids=policy\.decoder_start_ids"):
        seq2seq.next_logits(plain)
    with pytest.raises(ValueError, match=r"decoder_start_ids=policy\.decoder_start_ids"):
        seq2seq.sequence_log_probs(sequences_of([3, 2], [4, 2], start=()))


def test_errors_say_what_is_wrong() -> None:
    decoder = CachedEncoderDecoder(random_lm("t5"), 2, 4, 6)
    ids, ones = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, dtype=torch.long)
    with pytest.raises(ValueError, match="expected input_ids of shape"):
        decoder.advance(ids[:, :3], ones, ids, ones)
    with pytest.raises(ValueError, match="a prompt is empty"):
        decoder.advance(ids, torch.tensor([1, 0]), torch.zeros(2, 6, dtype=torch.long), ones)
