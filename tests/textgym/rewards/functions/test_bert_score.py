"""BERTScore, against its definition on the hidden states of a small encoder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from textgym.rewards.functions import BertScore
from textgym.rewards.functions.bert_score import _scorer
from textgym.testing import byte_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    _scorer.cache_clear()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=258, max_position_embeddings=64, initializer_range=0.2, **SHAPE)
        BertModel(config).save_pretrained(tmp_path / "encoder")
    byte_tokenizer().save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


@pytest.mark.parametrize("layer", [1, 2])
def test_f1_is_that_of_the_best_matches_of_tokens(encoder: str, layer: int) -> None:
    pytest.importorskip("bert_score", reason="needs bert-score")
    model = BertModel.from_pretrained(encoder, output_hidden_states=True).eval()

    def states(text: str) -> Tensor:
        with torch.no_grad():
            hidden = model(torch.tensor([list(text.encode())])).hidden_states[layer][0]
        return torch.nn.functional.normalize(hidden, dim=-1)

    def f1(completion: str, reference: str) -> float:
        cosines = states(completion) @ states(reference).T
        precision, recall = cosines.max(1).values.mean(), cosines.max(0).values.mean()
        return float(2 * precision * recall / (precision + recall))

    score = BertScore(encoder, num_layers=layer)
    one, best, none = score(["a cat", "a dog sat", "x"], references=["two cats", ["dogs", "a dog"], None])
    assert one == pytest.approx(f1("a cat", "two cats"), abs=1e-5)
    assert best == pytest.approx(max(f1("a dog sat", "dogs"), f1("a dog sat", "a dog")), abs=1e-5)
    assert none is None
    assert BertScore(encoder)(["a cat"], references=["a cat"]) == pytest.approx([1.0], abs=1e-5)


def test_empty_texts_need_no_encoder() -> None:
    score = BertScore("no such encoder")
    assert score(["", " ", "a"], references=["", "a", [""]]) == [1.0, 0.0, 0.0]


def test_long_texts(encoder: str) -> None:
    pytest.importorskip("bert_score", reason="needs bert-score")
    [long] = BertScore(encoder)(["x" * 1000], references=["y"])
    assert long is not None


def test_a_missing_package_says_what_to_install(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(ImportError, match="pip install bert-score"):
        BertScore(encoder)(["a"], references=["b"])
