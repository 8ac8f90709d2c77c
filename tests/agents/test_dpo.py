"""DPO: it reaches the exact optimum, equals TRL's losses, reads TRL's formats, resumes, and knows its reference."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textgym.agents import DPO, DPOConfig
from textgym.agents.dpo import preference_loss
from textgym.errors import UnchangedWeightsError
from textgym.models.actor_critic import ActorCritic
from textgym.models.token_model import TokenModel
from textgym.testing import (
    ExactTask,
    Measured,
    assert_close,
    assert_learns,
    assert_trained_alike,
    byte_tokenizer,
    mock_lm,
    terms_of,
    tolerance,
)

ROUNDING = tolerance(terms_of(mock_lm()), scale=8.0)  # of the mock model's log-probs
FORWARD = terms_of(mock_lm())

TRL = json.loads((Path(__file__).parent / "trl" / "dpo_losses.json").read_text())
TOKENIZER = byte_tokenizer()
PAIRS = [{"prompt": f"{i}", "chosen": "yes" * (1 + i % 4), "rejected": "no" * (1 + i % 3)} for i in range(14)]


def make_agent(pairs: Any = None, *, lora: Any = None, reference: Any = None, **config: Any) -> DPO:
    length = {} if "max_steps" in config else {"epochs": 2}
    settings = {"batch_size": 4, "learning_rate": 3e-3, **length, **config}
    policy = ActorCritic.from_pretrained(mock_lm(), lora=lora)
    return DPO(policy, PAIRS if pairs is None else pairs, TOKENIZER, DPOConfig(**settings), reference)


def spelling_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `ExactTask(vocab_size=5)` with a letter in place of its padding, which no text can spell."""
    vocabulary = {token: index for index, token in enumerate(["a", "b", "c", "<eos>", "d"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab=vocabulary, merges=[])), eos_token="<eos>")


def history_of(agent: DPO) -> list[dict[str, float]]:
    history: list[dict[str, float]] = []
    agent.learn([lambda _, metrics: history.append(metrics)])
    return history


def weights_of(agent: DPO) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in agent.policy.state_dict().items()}


def equal_weights(one: DPO, other: DPO) -> bool:
    expected = weights_of(other)
    return all(torch.equal(weight, expected[name]) for name, weight in weights_of(one).items())


def margin_of(seed: int, **config: Any) -> float:
    """The mean margin of the last of six epochs, which has each pair once; 0 for a policy that does not move."""
    last = history_of(make_agent(epochs=6, seed=seed, **config))[-4:]
    return float(np.mean([row["rewards/margins"] for row in last]))


def test_learns() -> None:
    """A false failure has a chance of 1e-7."""
    margins = [margin_of(seed) for seed in range(2)]
    assert_learns(margins, at_least=1.0, measured=Measured(mean=4.58, standard_deviation=0.1, runs=6))


@pytest.mark.slow
def test_without_a_learning_rate_or_with_a_flipped_loss_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnchangedWeightsError, match="no weight has changed"):
        margin_of(0, learning_rate=0.0)
    loss = DPO.loss

    def flipped(self: DPO, *arguments: Any) -> Any:
        value, figures = loss(self, *arguments)
        return -value, figures

    monkeypatch.setattr(DPO, "loss", flipped)
    assert margin_of(0) < 0.0


def test_margins_are_differences_of_rewards() -> None:
    for row in history_of(make_agent()):
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=ROUNDING)


@pytest.mark.parametrize(("loss", "start"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", (1 / (2 * 0.1)) ** 2)])
def test_starts_at_the_reference(loss: Any, start: float) -> None:
    first = history_of(make_agent(loss=loss, max_steps=1))[0]
    assert first["loss"] == pytest.approx(start, abs=ROUNDING)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=ROUNDING)
    assert first["rewards/rejected"] == pytest.approx(0.0, abs=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_reaches_the_exact_optimum(beta: float) -> None:
    """Of pairs labelled by Bradley and Terry's model of a reward the minimum is pi_ref exp(r / beta) / Z.

    The reference ends every text by itself, since every text that a preference names is one that ended.
    """
    task = ExactTask(vocab_size=5, horizon=3)
    base, eos = task.vocab_size + 1, task.stop.ids[0]
    with torch.no_grad():
        task.start.model.logits.weight[base**2 : base**3, eos] += 30.0  # after the prompt and two letters
    task.log_reference = task.log_probs(TokenModel(task.start))
    ended = [index for index, text in enumerate(task.texts) if text[-1] == eos]
    tokenizer = spelling_tokenizer()
    words = {i: "".join(tokenizer.convert_ids_to_tokens(list(task.texts[i][:-1]))) for i in ended}
    pairs = [
        {
            "prompt": "a",
            "chosen": words[i],
            "rejected": words[j],
            "probability": 1 / (1 + math.exp(task.rewards[j] - task.rewards[i])),
        }
        for i, j in itertools.combinations(ended, 2)
    ]
    settings = {"learning_rate": 0.1, "batch_size": len(pairs), "max_steps": 200}
    # One of the texts is empty: it ends at once.
    config = DPOConfig(beta=beta, use_probability=True, allow_faulty_rows=1.0, **settings)
    agent = DPO(ActorCritic.from_pretrained(task.language_model()), pairs, tokenizer, config)
    assert [tuple(text.completion) for text in agent.texts] == [task.texts[i] for i in ended]
    optimum = task.optimum(beta)
    assert optimum.kl_from(task.log_reference) > 0.05
    assert optimum.kl_from(task.log_probs(agent.learn().policy)) < 0.02


# --- the losses ---


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda c: f"{c['theirs']}, {c['beta']}, {c['label_smoothing']}")
def test_losses_equal_trl(case: dict[str, Any]) -> None:
    assert TRL["trl"] == "1.16.0"
    lengths = torch.tensor(TRL["lengths"])
    mask = torch.arange(len(TRL["policy"][0])) < lengths[:, None]
    policy, reference = (torch.tensor(TRL[name]) * mask for name in ("policy", "reference"))
    agent = make_agent(loss=case["loss"], beta=case["beta"], label_smoothing=case["label_smoothing"])
    chosen, rejected = torch.arange(8).chunk(2)
    batch = {"reference": reference.sum(1), "response_lengths": lengths, "chosen": chosen, "rejected": rejected}
    loss, figures = agent.loss(policy, torch.zeros_like(policy), {**batch, "probability": torch.ones(4)})
    assert float(loss) == pytest.approx(case["value"], abs=tolerance(terms=16, scale=10.0))
    for name, value in case["rewards"].items():
        assert float(figures[name]) == pytest.approx(value, abs=tolerance(terms=16, scale=10.0)), name


def test_a_probability_is_between_the_two_labels() -> None:
    chosen, rejected, counts = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]), (torch.ones(2), torch.ones(2))
    config = DPOConfig(beta=0.5)
    right = preference_loss(chosen, rejected, counts, torch.ones(2), config)
    wrong = preference_loss(rejected, chosen, counts, torch.ones(2), config)
    soft = preference_loss(chosen, rejected, counts, torch.full((2,), 0.75), config)
    assert float(soft) == pytest.approx(float(0.75 * right + 0.25 * wrong), abs=tolerance(terms=16, scale=10.0))


# --- the reference ---


def test_reference_log_probs_are_those_of_each_distinct_text_alone() -> None:
    repeated = [*PAIRS, *({"prompt": "0", "chosen": "yes", "rejected": pair["rejected"]} for pair in PAIRS)]
    agent = make_agent(repeated)
    distinct = {(p["prompt"], p[side]) for p in repeated for side in ("chosen", "rejected")}
    assert len(agent.texts) == len(agent.reference_log_probs) == len(distinct)
    for text, log_prob in zip(agent.texts, agent.reference_log_probs, strict=True):
        logits = mock_lm()(torch.tensor([[*text.prompt, *text.completion]])).logits[0, len(text.prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(text.completion)[:, None]).sum()
        assert float(log_prob) == pytest.approx(float(expected.detach()), abs=ROUNDING)


def test_another_reference_and_one_scored_before() -> None:
    other = make_agent(reference=mock_lm(seed=5))
    assert not torch.allclose(other.reference_log_probs, make_agent().reference_log_probs, atol=0.1)
    again = make_agent(reference=other.reference_log_probs)
    assert_trained_alike(weights_of(again.learn()), weights_of(other.learn()), again.config.learning_rate)


def test_the_reference_does_not_move_with_the_policy() -> None:
    agent = make_agent()
    before = agent.reference_log_probs.clone()
    agent.learn()
    assert torch.equal(agent.reference_log_probs, before)
    models = [value for value in vars(agent).values() if isinstance(value, torch.nn.Module)]
    assert models == [agent.policy], "none but the policy stays in memory"


@pytest.mark.bit_for_bit
def test_under_lora_the_reference_is_without_the_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    agent = make_agent(lora=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert_close(agent.reference_log_probs, make_agent().reference_log_probs, terms=FORWARD)
    start = weights_of(agent)
    first = []
    agent.learn([lambda agent, metrics: first.append(metrics["loss"]) or agent.updates < 5])
    assert first[0] == pytest.approx(math.log(2), abs=ROUNDING)
    assert {name for name, w in weights_of(agent).items() if not torch.equal(w, start[name])} == {
        name for name in start if "lora_" in name
    }
    agent.save(tmp_path / "agent")
    assert equal_weights(DPO.load(tmp_path / "agent", PAIRS).learn(), agent.learn())


# --- batches, resuming ---


def test_micro_batches_do_what_the_batch_does() -> None:
    histories = [history_of(make_agent(batch_size=12, micro_batch_size=size)) for size in (None, 2, 3)]
    for history in histories[1:]:
        for expected, actual in zip(histories[0], history, strict=True):
            for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
                assert actual[name] == pytest.approx(expected[name], rel=1e-3, abs=ROUNDING), name


@pytest.mark.bit_for_bit
@pytest.mark.parametrize("stop", [3, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (4, 6))])
def test_resume_bit_for_bit(stop: int, tmp_path: Path) -> None:
    whole = make_agent(micro_batch_size=2).learn()
    part = make_agent(micro_batch_size=2).learn([lambda agent, _: agent.updates < stop])
    part.save(tmp_path / "agent")
    resumed = DPO.load(tmp_path / "agent", PAIRS)
    assert (resumed.updates, resumed.total_updates) == (stop, 8)
    assert torch.equal(resumed.reference_log_probs, whole.reference_log_probs)
    assert equal_weights(resumed.learn(), whole)
    with pytest.raises(ValueError, match="trained on other data"):
        DPO.load(tmp_path / "agent", PAIRS[::-1])


# --- formats ---


def texts_of(pair: dict[str, Any], tokenizer: Any = TOKENIZER, **config: Any) -> list[tuple[str, str]]:
    agent = DPO(ActorCritic.from_pretrained(mock_lm()), [pair], tokenizer, DPOConfig(**config))
    return [(tokenizer.decode(text.prompt), tokenizer.decode(text.completion)) for text in agent.texts]


def test_formats() -> None:
    expected = [("It is", " good.<eos>"), ("It is", " great.<eos>")]
    assert texts_of({"prompt": "It is", "chosen": " good.", "rejected": " great."}) == expected
    assert texts_of({"chosen": "It is good.", "rejected": "It is great."}) == expected
    assert texts_of({"chosen": "It is good.", "rejected": "It is"}) == [("It is", " good.<eos>"), ("It is", "<eos>")]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "A"), ("assistant", "B"))
    )
    talk = [("[user]?<eos>", "[assistant]A<eos>"), ("[user]?<eos>", "[assistant]B<eos>")]
    assert texts_of({"prompt": [user], "chosen": [good], "rejected": [bad]}, tokenizer) == talk
    assert texts_of({"chosen": [user, good], "rejected": [user, bad]}, tokenizer) == talk
    assert texts_of({"prompt": [user], "chosen": "A", "rejected": "B"}, tokenizer) == talk


def test_both_texts_of_a_pair_follow_the_same_part_of_a_long_prompt() -> None:
    pair = {"prompt": "0123456789", "chosen": "ab", "rejected": "abcd"}
    assert texts_of(pair, max_length=8, allow_faulty_rows=1.0) == [("789", "ab<eos>"), ("789", "abcd<eos>")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_agent([]), "there are no preferences in a list"),
        (lambda: make_agent([{"chosen": "a"}]), "it needs 'chosen' and 'rejected'"),
        (lambda: make_agent([{"chosen": "a b", "rejected": "c d"}]), "have no common beginning.*: pass it as 'prompt'"),
        (
            lambda: make_agent([{"chosen": "a", "rejected": [{"role": "user", "content": "a"}]}]),
            "is a string and the other a conversation",
        ),
        (lambda: make_agent(use_probability=True), "needs a 'probability' in every preference; 14 of 14 have none"),
        (lambda: make_agent(loss="logistic"), "loss must be 'sigmoid' or 'hinge' or 'ipo', got 'logistic'"),
        (lambda: make_agent(loss="ipo", label_smoothing=0.1), "label_smoothing=0.1 cannot be used with loss='ipo'"),
        (lambda: make_agent(beta=0.0), "beta must be above 0"),
        (lambda: make_agent(label_smoothing=1.5), "label_smoothing must be from 0 to 1"),
    ],
)
def test_errors_say_what_to_do(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_metrics_are_finite_and_named_as_trl_names_them() -> None:
    names = {f"rewards/{kind}" for kind in ("chosen", "rejected", "margins", "accuracies")}
    for row in history_of(make_agent()):
        assert names | {"loss", "grad_norm", "learning_rate", "logps/chosen", "logps/rejected", "epoch"} <= set(row)
        assert np.isfinite(list(row.values())).all()


def test_tokenizer_and_reference_are_compared_with_the_policy() -> None:
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    policy = ActorCritic.from_pretrained(mock_lm(num_layers=1))
    with pytest.raises(ValueError, match="no tokenizer is saved with the policy's weights"):
        DPO(policy, pairs)
    with pytest.raises(ValueError, match=r"the reference .* has 200 tokens, and the tokenizer .* has 258"):
        DPO(policy, pairs, byte_tokenizer(), reference=mock_lm(200, num_layers=1))
