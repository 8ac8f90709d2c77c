"""Where the weights of loaded models are: in memory that torch has allocated, aligned, and only once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

from textgym import ActorCritic, RewardModel
from textgym.agents import PPO, PPOConfig
from textgym.models.loading import load_causal_lm, load_classifier
from textgym.models.token_model import TokenModel
from textgym.testing import byte_tokenizer, mock_lm, mock_seq2seq_lm

ALIGNMENT = 64
"""Bytes: what torch aligns memory on a CPU to."""
STATUS = Path("/proc/self/status")


def assert_own_memory(*models: nn.Module) -> None:
    for model in models:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        assert tensors
        assert [name for name, tensor in tensors.items() if tensor.data_ptr() % ALIGNMENT] == []
        assert [name for name, tensor in tensors.items() if not tensor.untyped_storage().resizable()] == []


@pytest.fixture(params=["llama", "gpt2", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    lm = mock_seq2seq_lm() if request.param == "t5" else mock_lm(architecture=request.param)
    lm.save_pretrained(tmp_path / "lm")
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_the_check_notices_weights_that_are_mapped_from_a_file(tmp_path: Path) -> None:
    """What the tests below would miss otherwise; transformers maps the weights of a model that it loads."""
    save_file({"weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(load_file(tmp_path / "model.safetensors")["weight"])
    with pytest.raises(AssertionError):
        assert_own_memory(layer)


def test_loaded_language_models_lie_in_torchs_own_memory(folder: Path) -> None:
    loaded = load_causal_lm(folder)
    assert_own_memory(loaded, TokenModel.load(str(folder)), load_causal_lm(folder, dtype=torch.bfloat16))
    raw = type(loaded).from_pretrained(folder)
    assert all(torch.equal(weight, raw.get_parameter(name)) for name, weight in loaded.named_parameters())


def test_a_model_that_the_caller_loaded_is_moved_where_it_is_and_stays_tied(tmp_path: Path) -> None:
    mock_lm(tie_word_embeddings=True).save_pretrained(tmp_path)
    raw = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = list(raw.parameters())
    assert load_causal_lm(raw) is raw
    assert all(now is before for now, before in zip(raw.parameters(), weights, strict=True))
    assert raw.lm_head.weight is raw.model.embed_tokens.weight
    assert_own_memory(raw)


def test_memory_of_torchs_own_is_left_alone() -> None:
    lm = mock_lm()
    places = [weight.data_ptr() for weight in lm.parameters()]
    load_causal_lm(lm)
    assert [weight.data_ptr() for weight in lm.parameters()] == places


@pytest.mark.parametrize(
    ("critic", "lora"),
    [
        ("separate", False),
        *(
            pytest.param(critic, lora, marks=pytest.mark.slow)
            for critic in ("shared", "separate", "reward model")
            for lora in (False, True)
            if (critic, lora) != ("separate", False)
        ),
    ],
)
def test_all_models_of_a_loaded_agent_lie_in_torchs_own_memory(critic: str, lora: bool, tmp_path: Path) -> None:
    mock_lm().save_pretrained(tmp_path / "lm")
    if critic == "reward model":
        critic = str(tmp_path / "critic")
        config = mock_lm().config
        config.num_labels = 1
        AutoModelForSequenceClassification.from_config(config).save_pretrained(critic)
    adapter = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj"]) if lora else None
    envs = gym.make_vec(
        "textgym/Text-v0", 2, prompts=["a"], tokenizer=byte_tokenizer(), reward=lambda completions: [0.0] * 2
    )

    def check(agent: PPO) -> None:
        assert_own_memory(agent.policy, agent.penalty.reference)
        assert agent.policy.critic is None or any(True for _ in agent.policy.critic.parameters())

    agent = PPO(ActorCritic.from_pretrained(tmp_path / "lm", critic, lora=adapter), envs, PPOConfig())
    check(agent)
    agent.save(tmp_path / "agent")
    check(PPO.load(tmp_path / "agent", envs=envs))


def test_reward_models_and_classifiers_lie_in_torchs_own_memory(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2, n_positions=64, num_labels=1, pad_token_id=257)
    model = AutoModelForSequenceClassification.from_config(config)
    model.score.bias = nn.Parameter(torch.ones(1))
    RewardModel(model, byte_tokenizer()).save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path)
    assert loaded.model.score.bias.item() == 1.0
    assert_own_memory(loaded.model, load_classifier(tmp_path), load_classifier(tmp_path, num_layers=1))


class PeakMemory(TorchDispatchMode):
    """The largest anonymous memory of this process after any operation of torch; pages of files do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = anonymous_memory()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, anonymous_memory())
        return result


def anonymous_memory() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.skipif(not STATUS.exists(), reason="memory is measured as on Linux")
def test_loading_needs_the_memory_of_one_model(tmp_path: Path) -> None:
    """And of its largest tensor once more, beside 8 MB for everything else."""
    lm = mock_lm(vocab_size=17_000, hidden_size=512, num_layers=1)  # above 32 MB memory is the system's, never reused
    size = sum(weight.nbytes for weight in lm.parameters())
    lm.save_pretrained(tmp_path / "large")
    mock_lm().save_pretrained(tmp_path / "small")
    load_causal_lm(tmp_path / "small")  # what is imported and kept on first use

    before = anonymous_memory()  # `lm` stays, so that nothing lies in memory that it gave back
    with PeakMemory() as memory:
        loaded = load_causal_lm(tmp_path / "large")
    largest = max(weight.nbytes for weight in loaded.parameters())
    needed = memory.peak - before
    assert size > 50e6
    assert needed < size + largest + 8e6, f"{needed:,} bytes for weights of {size:,}"
    assert torch.equal(loaded.get_input_embeddings().weight, lm.get_input_embeddings().weight)
