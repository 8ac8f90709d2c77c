"""Policies with adapters of every kind: the reference is what they were, and what they export has their log-probs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers import __version__ as transformers_version

from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import split
from textgym.models.merging import merged
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.testing import TableConfig, TableLM, assert_close, mock_lm, mock_seq2seq_lm, terms_of

pytestmark = pytest.mark.numerics

peft = pytest.importorskip("peft")
PADS_WRONGLY = pytest.mark.skipif(
    transformers_version.startswith("5.17."), reason="transformers 5.17 pads UMT5 wrongly, so it is refused there"
)

FORWARD = terms_of(mock_lm())
IDS = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0))
SEQUENCES = Sequences(IDS, torch.tensor([2, 4, 3]), torch.tensor([5, 2, 6]))


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings})


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "on the output embedding": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "on the input embedding": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "on both embeddings": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "on tied embeddings": lambda: lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "output embedding trained": lambda: lora(modules_to_save=["lm_head"]),
    "input embedding trained": lambda: lora(modules_to_save=["embed_tokens"]),
    "tied embeddings trained": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "some tokens trained": lambda: lora(trainable_token_indices=[70, 71]),
    "biases trained": lambda: lora(bias="all", lora_bias=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "random pissa": lambda: lora(init_lora_weights="pissa_niter_2", target_modules=["q_proj", "lm_head"]),
    "olora": lambda: lora(init_lora_weights="olora"),
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], save_projection=False),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
}
every_adapter = pytest.mark.parametrize("kind", ADAPTERS)
TIED = {"tie_word_embeddings": True, "architecture": "qwen2"}  # whose projections have biases


def train(module: nn.Module, seed: int = 1) -> None:
    """Moves all that is trained, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)


def read_back(folder: Path) -> Tensor:
    """Log-probs of a folder's model, as transformers alone makes it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits.float()  # right padding changes nothing before it
    all_log_probs = logits.log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    rows = zip(all_log_probs, SEQUENCES.prompt_lengths.tolist(), SEQUENCES.response_lengths.tolist(), strict=True)
    return nn.utils.rnn.pad_sequence([row[p - 1 : p - 1 + n] for row, p, n in rows], batch_first=True)


def log_probs(model: TokenModel) -> Tensor:
    return model.sequence_log_probs(SEQUENCES)


@every_adapter
def test_the_reference_is_the_policy_with_the_adapter_that_it_has(kind: str) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(**TIED), lora=ADAPTERS[kind]())
    train(policy)
    start = log_probs(policy)
    reference = policy.reference()
    assert torch.equal(log_probs(reference), start)
    train(policy, seed=2)
    assert (log_probs(policy) - start).abs().max() > 0.01
    assert torch.equal(log_probs(reference), start)
    assert not any(weight.requires_grad for weight in reference.parameters())


@every_adapter
def test_a_folder_read_back_by_transformers_has_the_log_probs_of_the_policy(kind: str, tmp_path: Path) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(**TIED), lora=ADAPTERS[kind]())
    train(policy)
    live = log_probs(policy)
    policy.save_pretrained(tmp_path)
    assert_close(read_back(tmp_path), live, terms=FORWARD)
    assert torch.equal(log_probs(policy), live), "it was merged in a copy"
    engine = AutoModelForCausalLM.from_pretrained(tmp_path)
    train(engine)
    engine.load_state_dict(policy.weights())
    assert_close(log_probs(TokenModel(engine)), live, terms=FORWARD)


@pytest.mark.parametrize("model_type", ["t5", pytest.param("umt5", marks=PADS_WRONGLY), "bart"])
@pytest.mark.parametrize("target", ["lm_head", "q"])
def test_tied_encoder_decoder_models_read_back(model_type: str, target: str, tmp_path: Path) -> None:
    lm = mock_seq2seq_lm(architecture=model_type)
    target = {"t5": target, "umt5": target, "bart": {"lm_head": "lm_head", "q": "q_proj"}[target]}[model_type]
    policy = ActorCritic.from_pretrained(lm, lora=lora(target_modules=[target], init_lora_weights=False))
    expected = policy.lm(input_ids=IDS, decoder_input_ids=IDS).logits
    policy.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert_close(again(input_ids=IDS, decoder_input_ids=IDS).logits, expected, terms=FORWARD, scale=32.0)


def test_weights_that_were_tied_stay_tied_unless_an_adapter_moves_one_of_them() -> None:
    plain, moved = (
        merged(ActorCritic.from_pretrained(mock_lm(**TIED), lora=lora(target_modules=[name], **changed)).lora)
        for name, changed in (("q_proj", {"init_lora_weights": False}), ("lm_head", {"init_lora_weights": False}))
    )
    assert plain.config.tie_word_embeddings
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert not moved.config.tie_word_embeddings
    assert not torch.equal(moved.get_output_embeddings().weight, moved.get_input_embeddings().weight)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_read_back_as_they_are_whatever_the_config_said(tied: bool, adapter: bool, tmp_path: Path) -> None:
    lm = mock_lm(tie_word_embeddings=not tied)
    weight = lm.get_input_embeddings().weight
    lm.get_output_embeddings().weight = weight if tied else nn.Parameter(weight.detach().flip(0))
    policy = ActorCritic.from_pretrained(lm, lora=lora(init_lora_weights=False) if adapter else None)
    policy.save_pretrained(tmp_path)
    assert_close(read_back(tmp_path), log_probs(policy), terms=FORWARD)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings is tied
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied


def test_a_model_without_input_embedding_is_saved(tmp_path: Path) -> None:
    policy = ActorCritic.from_pretrained(TableLM(TableConfig(vocab_size=4)), critic="separate")
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_a_separate_critic_read_back_has_its_own_adapter(tmp_path: Path) -> None:
    config = lora(target_modules=["q_proj", "embed_tokens"])
    policy = ActorCritic.from_pretrained(mock_lm(**TIED), critic="separate", lora=config)
    train(policy)
    policy.save_pretrained(tmp_path)
    again = ActorCritic.from_pretrained(tmp_path, critic="separate")
    assert_close(again.sequence_values(SEQUENCES), policy.sequence_values(SEQUENCES), terms=FORWARD)
    assert_close(log_probs(again), log_probs(policy), terms=FORWARD)


def trained_peft_model(config: Any) -> Any:
    model = peft.get_peft_model(mock_lm(), config)
    train(model)
    return model


@pytest.mark.parametrize("kind", ["lora", "output embedding trained", "dora", "pissa"])
def test_an_adapter_loaded_for_inference_is_trained_on(kind: str, tmp_path: Path) -> None:
    model = trained_peft_model(ADAPTERS[kind]())
    start = log_probs(TokenModel(copy.deepcopy(model)))
    model.save_pretrained(tmp_path)
    policy = ActorCritic.from_pretrained(peft.PeftModel.from_pretrained(mock_lm(), tmp_path), critic="separate")
    assert_close(log_probs(policy), start, terms=FORWARD)
    assert torch.equal(log_probs(policy.reference()), log_probs(policy))
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert {name.removeprefix("base_model.model.") for name, w in model.named_parameters() if w.requires_grad} == {
        name.removeprefix("lm.") for name in trained if name.startswith("lm.")
    }
    assert any(name.startswith("critic.") for name in trained)


@pytest.mark.parametrize("kind", ["lora", "output embedding trained", "dora", "pissa"])
def test_a_model_after_add_adapter_is_trained_on_and_exported(kind: str, tmp_path: Path) -> None:
    lm = mock_lm()
    lm.add_adapter(ADAPTERS[kind]())
    train(lm)
    start = log_probs(TokenModel(copy.deepcopy(lm)))
    policy = ActorCritic.from_pretrained(lm)
    assert torch.equal(log_probs(policy), start)
    assert all("lora" in n or "modules_to_save" in n for n, w in policy.lm.named_parameters() if w.requires_grad)
    policy.save_pretrained(tmp_path)
    assert_close(read_back(tmp_path), start, terms=FORWARD)


@pytest.mark.parametrize("way", ["peft", "add_adapter"])
@pytest.mark.parametrize("kind", ["lora", "output embedding trained", "dora", "pissa"])
def test_the_folder_of_an_adapter_is_a_policy_and_a_reference(kind: str, way: str, tmp_path: Path) -> None:
    mock_lm().save_pretrained(tmp_path / "base")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if way == "peft":
        model = peft.get_peft_model(lm, ADAPTERS[kind]())
    else:
        lm.add_adapter(ADAPTERS[kind]())
        model = lm
    train(model)
    start = log_probs(TokenModel(lm))
    model.save_pretrained(tmp_path / "adapter")
    policy = ActorCritic.from_pretrained(tmp_path / "adapter")
    assert_close(log_probs(policy), start, terms=FORWARD)
    assert_close(log_probs(TokenModel.load(str(tmp_path / "adapter"))), start, terms=FORWARD)
    assert policy.lora is not None
    assert not policy.head.weight.requires_grad or kind == "output embedding trained"


def test_of_several_adapters_those_in_use_count(tmp_path: Path) -> None:
    model = peft.get_peft_model(mock_lm(), lora(init_lora_weights=False))
    model.add_adapter("second", lora(init_lora_weights=False, target_modules=["k_proj"]))
    model.base_model.set_adapter(["default", "second"])
    policy = ActorCritic.from_pretrained(model)
    reference = policy.reference()
    start = log_probs(policy)
    assert torch.equal(log_probs(reference), start)
    policy.save_pretrained(tmp_path)
    assert_close(read_back(tmp_path), start, terms=FORWARD)
    policy.lora.set_adapter("second")
    train(policy)
    assert torch.equal(log_probs(reference), start), "the reference keeps both"


def test_a_model_that_is_trained_is_copied_when_it_becomes_a_reference() -> None:
    policy = ActorCritic.from_pretrained(mock_lm(), lora=lora())
    start = log_probs(policy)
    references = [TokenModel.load(policy.lm), TokenModel.load(policy.lora)]
    train(policy)
    assert (log_probs(policy) - start).abs().max() > 0.01
    for reference in references:
        assert torch.equal(log_probs(reference), start)
    frozen = mock_lm().requires_grad_(False)
    assert TokenModel.load(frozen).lm is frozen


def test_a_model_that_peft_left_frozen_is_reported() -> None:
    plain = trained_peft_model(lora()).merge_and_unload()
    with pytest.warns(UserWarning, match="all weights of the model are frozen"):
        ActorCritic.from_pretrained(plain)
    assert ActorCritic.from_pretrained(plain.requires_grad_(True)).lora is None
    assert ActorCritic.from_pretrained(plain.requires_grad_(False), lora=lora()).lora is not None


def test_what_peft_does_outside_of_the_layers_is_refused() -> None:
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="PromptTuningConfig trains a prompt"):
        ActorCritic.from_pretrained(mock_lm(), lora=prompt)
    with pytest.raises(ConfigError, match="PrefixTuningConfig trains a prompt"):
        ActorCritic.from_pretrained(
            peft.get_peft_model(mock_lm(), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        )
    with pytest.raises(ConfigError, match="alora_invocation_tokens"):
        ActorCritic.from_pretrained(mock_lm(), lora=lora(alora_invocation_tokens=[5], task_type="CAUSAL_LM"))


def test_adapters_that_cannot_be_had_are_explained(tmp_path: Path) -> None:
    model = peft.get_peft_model(mock_lm(), lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not say of which model"):
        ActorCritic.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the model has one already"):
        ActorCritic.from_pretrained(model, lora=lora())
    model.base_model.disable_adapter_layers()
    with pytest.raises(ConfigError, match="is switched off"):
        split(model)


def test_a_frozen_copy_follows_the_policy_that_it_shares_weights_with() -> None:
    """Shared weights are converted with the policy's, so the copy's own adapter has to be, too."""
    policy = ActorCritic.from_pretrained(mock_lm(), lora=lora(init_lora_weights=False))
    observation = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    reference = policy.reference()
    expected = reference.next_logits(observation)

    copied, restored = copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))
    policy.to(torch.float64)
    assert {weight.dtype for weight in reference.parameters()} == {torch.float64}
    assert_close(reference.next_logits(observation).float(), expected, terms=FORWARD)

    copied.to(torch.bfloat16)  # shares nothing with the reference of what it was copied from
    restored.to(torch.bfloat16)
    assert {weight.dtype for weight in reference.parameters()} == {torch.float64}
