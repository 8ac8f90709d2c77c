"""SFT: completions are learned and prompts are not, however the batch is cut, packed, resumed or written down."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

from textgym.agents import SFT, SFTConfig
from textgym.agents.machine.memory_by_role import SavedForBackward
from textgym.agents.runs.evaluation import generate
from textgym.errors import NonFiniteError, UnchangedWeightsError
from textgym.models.actor_critic import ActorCritic
from textgym.models.sequences import Sequences
from textgym.testing import (
    Measured,
    assert_close,
    assert_learns,
    assert_trained_alike,
    byte_tokenizer,
    mock_lm,
    terms_of,
    tolerance,
)

FORWARD = terms_of(mock_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
ROWS = [{"prompt": f"{i} " * (1 + i % 3), "completion": "ab" * (i % 5) + "."} for i in range(14)]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_agent(rows: Any = None, *, tokenizer: Any = TOKENIZER, lm: Any = None, lora: Any = None, **config: Any) -> SFT:
    length = {} if "max_steps" in config else {"epochs": 2}
    settings = {"batch_size": 4, "learning_rate": 1e-2, **length, **config}
    policy = ActorCritic.from_pretrained(mock_lm() if lm is None else lm, lora=lora)
    return SFT(policy, ROWS if rows is None else rows, tokenizer, SFTConfig(**settings))


def history_of(agent: SFT) -> list[dict[str, float]]:
    history: list[dict[str, float]] = []
    agent.learn([lambda _, metrics: history.append(metrics)])
    return history


def gradient_of(agent: SFT) -> Tensor:
    """Of the loss on all examples, in one batch."""
    agent.policy.zero_grad()
    everything = range(len(agent))
    scores = agent.policy.score_sequences(agent.sequences(everything))
    agent.loss(*scores, agent.collate(everything))[0].backward()
    return torch.cat([p.grad.flatten() for p in agent.policy.lm.parameters() if p.grad is not None])


def weights_of(agent: SFT) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in agent.policy.state_dict().items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_memory_alone(architecture: str) -> None:
    kept, weights = [], []
    for on in (False, True):
        agent = make_agent(lm=mock_lm(architecture=architecture, num_layers=4), gradient_checkpointing=on)
        saved = SavedForBackward(agent.policy.parameters())
        with saved:
            gradient_of(agent)
        kept.append(saved.peak)
        weights.append(weights_of(agent.learn()))
    assert kept[1] < 0.7 * kept[0]
    assert_trained_alike(weights[1], weights[0], agent.config.learning_rate)


def gain_of(seed: int, **config: Any) -> float:
    """The share of its loss on all examples that an agent gets rid of; exactly 0 for a policy that does not move."""
    agent = make_agent(seed=seed, **config)
    everything = agent.sequences(range(len(agent)))
    before = float(agent.policy.sequence_log_probs(everything).sum())
    agent.learn()
    return 1 - float(agent.policy.sequence_log_probs(everything).sum()) / before


@pytest.mark.parametrize("bf16", [False, True])
def test_learns(bf16: bool) -> None:
    """A false failure has a chance of 1e-7; both arithmetics gain the same."""
    gains = [gain_of(seed, epochs=8, bf16=bf16) for seed in range(2)]
    assert_learns(gains, at_least=0.5, measured=Measured(mean=0.959, standard_deviation=0.01, runs=6))


@pytest.mark.slow
def test_without_a_learning_rate_or_with_a_flipped_loss_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnchangedWeightsError, match="no weight has changed"):
        gain_of(0, epochs=8, learning_rate=0.0)
    loss = SFT.loss

    def flipped(self: SFT, *arguments: Any) -> Any:
        value, figures = loss(self, *arguments)
        return -value, figures

    monkeypatch.setattr(SFT, "loss", flipped)
    assert gain_of(0, epochs=8) < 0.0


def test_the_loss_of_each_process_makes_up_for_the_mean_over_processes() -> None:
    """Gradients are averaged over processes, and each has a share of the loss."""
    losses = []
    for processes in (1, 4):
        agent = make_agent(max_steps=1).learn()
        trainer, batch = agent.trainer, {**agent.collate(range(2)), "counts": torch.tensor(1)}
        trainer.accelerator = SimpleNamespace(num_processes=processes)
        losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(10)).item())
    assert losses[1] == pytest.approx(4 * losses[0], rel=1e-5)


@pytest.mark.slow
def test_counts_updates_and_epochs() -> None:
    history = history_of(make_agent(epochs=15))
    assert [row["updates"] for row in history] == list(range(1, 61))
    assert history[-1]["epoch"] == 15
    assert {"loss", "entropy", "grad_norm", "learning_rate"} <= set(history[0])


@pytest.mark.slow
def test_clones_what_an_agent_did() -> None:
    """Transcripts of an environment, columns and all, are examples.

    Nothing is sampled. Each learned token is the greedy one if its probability is above a half, and from 8 initial
    weights the least of them is 0.9966 +- 0.0006 at the end.
    """
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=[{"prompt": "one", "text": "a column"}, {"prompt": "two", "text": "another"}],
        tokenizer=TOKENIZER,
        reward=lambda completions: [0.0] * len(completions),
        kl_mode="deferred",
        max_new_tokens=5,
    )
    rows = [{"prompt": "one", "completion": "abcd"}, {"prompt": "two", "completion": "wxyz"}]
    teacher = make_agent(rows, epochs=60, batch_size=2).learn().policy
    written = generate(teacher, envs, range(2), seed=0, deterministic=True).transcripts
    assert [row["completion"] for row in written] == ["abcd", "wxyz"]
    assert written[0]["text"] == "a column"
    student = make_agent(written, lm=mock_lm(seed=1), epochs=60, batch_size=2).learn().policy
    assert generate(student, envs, range(2), seed=0, deterministic=True).completions == ["abcd", "wxyz"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_only_completions_are_learned_packed_as_row_by_row(architecture: str) -> None:
    """The gradient is that of the mean of -log pi over completion tokens, each row run alone by the plain model."""
    agent = make_agent(lm=mock_lm(architecture=architecture))
    log_probs: list[Tensor] = []
    for text in agent.texts:
        logits = agent.policy.lm(torch.tensor([[*text.prompt, *text.completion]])).logits[0]
        states = logits[len(text.prompt) - 1 : -1].log_softmax(-1)
        log_probs.append(states.gather(1, torch.tensor(text.completion)[:, None])[:, 0])
    loss = -torch.cat(log_probs).mean()
    gradients = torch.autograd.grad(loss, list(agent.policy.lm.parameters()))
    assert_close(gradient_of(agent), torch.cat([g.flatten() for g in gradients]), terms=FORWARD, scale=1.0)
    packed = agent.sequences(range(len(agent))).states().packed
    assert len(packed.input_ids) < len(agent.texts), "some share a row"


def test_the_gradient_knows_every_token_of_a_completion() -> None:
    gradients = [gradient_of(make_agent([{"prompt": "xyz", "completion": text}])) for text in ("abc", "abc", "acc")]
    assert_close(gradients[0], gradients[1], terms=FORWARD, scale=1.0)
    assert (gradients[0] - gradients[2]).norm() > 0.1


@pytest.mark.parametrize("pads", [1, 5])
def test_padding_changes_nothing(pads: int) -> None:
    agent = make_agent()
    batch = agent.collate(range(4))
    padded = {**batch, "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, pads), value=EOS)}
    losses = []
    for one in (batch, padded):
        sequences = Sequences(one["input_ids"], one["prompt_lengths"], one["response_lengths"])
        losses.append(float(agent.loss(*agent.policy.score_sequences(sequences), one)[0].detach()))
    assert losses[1] == pytest.approx(losses[0], abs=ROUNDING)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 6])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(micro_batch_size: int) -> None:
    """Completions have 2 to 10 tokens, and the last update of the epoch has 2 examples of 12."""
    taken = []
    for size in (None, micro_batch_size):
        agent = make_agent(batch_size=12, micro_batch_size=size, epochs=1, learning_rate=0.0, max_grad_norm=1e9)
        gradients: list[Tensor] = []
        history: list[dict[str, float]] = []
        with watched(gradients), pytest.raises(UnchangedWeightsError):  # the same weights for both updates
            agent.learn([lambda _, metrics, history=history: history.append(metrics)])
        taken.append((gradients, [(row["loss"], row["entropy"]) for row in history]))
    assert len(taken[0][0]) == len(taken[1][0]) == 2
    for whole, parts in zip(taken[0][0], taken[1][0], strict=True):
        assert whole.norm() > 1e-2
        assert_close(parts, whole, terms=FORWARD, scale=1.0)
    assert_close(taken[1][1], taken[0][1], terms=FORWARD, scale=8.0)


@contextlib.contextmanager
def watched(gradients: list[Tensor]) -> Iterator[None]:
    """Collects the gradient of every update."""

    def keep(optimizer: Any, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients.append(torch.cat([weight.grad.flatten().clone() for weight in weights]))

    hook = register_optimizer_step_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.bit_for_bit
@pytest.mark.parametrize("stop", [1, 4, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (5, 9))])
def test_resume_bit_for_bit(stop: int, tmp_path: Path) -> None:
    """8 updates in 2 epochs: stopped in the first, at its end, in the second, and not at all."""
    whole = make_agent(micro_batch_size=2).learn()
    part = make_agent(micro_batch_size=2).learn([lambda agent, _: agent.updates < stop])
    part.save(tmp_path / "agent")
    resumed = SFT.load(tmp_path / "agent", ROWS)
    assert resumed.updates == min(stop, 8)
    resumed.learn()
    part.learn()  # goes on without having been saved, too
    assert whole.updates == resumed.updates == part.updates == 8
    for name, expected in whole.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], expected), name
        assert torch.equal(part.policy.state_dict()[name], expected), name


@pytest.mark.bit_for_bit
def test_saving_within_a_callback_and_before_going_on(tmp_path: Path) -> None:
    whole = make_agent().learn([lambda agent, _: agent.save(tmp_path / "mid") if agent.updates == 3 else None])
    SFT.load(tmp_path / "mid", ROWS).save(tmp_path / "mid", overwrite=True)
    resumed = SFT.load(tmp_path / "mid", ROWS).learn()
    expected = weights_of(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed).items())


def test_saves_a_plain_transformers_folder_and_nothing_that_is_unpickled(tmp_path: Path) -> None:
    agent = make_agent(epochs=1).learn()
    agent.save(tmp_path / "agent")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "agent" / "policy")
    assert torch.equal(lm.get_output_embeddings().weight, agent.policy.head.weight)
    for path in (tmp_path / "agent").rglob("*.pt"):
        torch.load(path, weights_only=True)
    assert not list((tmp_path / "agent").rglob("*.bin"))
    with pytest.raises(ValueError, match="trained on other data: pass what it was made with"):
        SFT.load(tmp_path / "agent", ROWS[1:])


@pytest.mark.bit_for_bit
def test_lora_trains_and_resumes_the_adapter_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    agent = make_agent(lora=config)
    agent.policy.value_head.weight.data.fill_(0.5)
    start = weights_of(agent)
    agent.learn([lambda agent, _: agent.updates < 5])
    moved = {name for name, weight in weights_of(agent).items() if not torch.equal(weight, start[name])}
    assert moved == {name for name in start if "lora_" in name}
    agent.save(tmp_path / "agent")
    resumed = SFT.load(tmp_path / "agent", ROWS).learn()
    expected = weights_of(agent.learn())
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed).items())
    merged = ActorCritic.from_pretrained(tmp_path / "agent" / "policy")
    assert torch.equal(merged.value_head.weight, agent.policy.value_head.weight)


def test_a_critic_is_left_alone_and_generators_too() -> None:
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    agent = SFT(policy, ROWS, TOKENIZER, SFTConfig(learning_rate=1e-2))
    before = weights_of(agent)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    agent.learn()
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    moved = {name for name, weight in weights_of(agent).items() if not torch.equal(weight, before[name])}
    assert moved
    assert not [name for name in moved if name.startswith(("critic", "value_head"))]
    assert not policy.lm.training
    assert [p for p in policy.parameters() if p.grad is not None] == []


def test_learning_rate_rises_falls_and_is_never_nothing() -> None:
    rates = [row["learning_rate"] for row in history_of(make_agent(epochs=2.5, warmup=0.2, learning_rate=1.0))]
    assert rates == pytest.approx([1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    flat = history_of(make_agent(max_steps=3, warmup=0.0, anneal_learning_rate=False, learning_rate=0.5))
    assert [row["learning_rate"] for row in flat] == [0.5] * 3


def test_bf16_starts_at_the_loss_of_float32() -> None:
    history = history_of(make_agent(bf16=True, epochs=1))
    assert history[0]["loss"] == pytest.approx(history_of(make_agent(epochs=1))[0]["loss"], rel=0.02)


# --- formats ---


def texts_of(rows: Any, tokenizer: Any = TOKENIZER, **config: Any) -> list[tuple[str, str]]:
    return [
        (TOKENIZER.decode(text.prompt), TOKENIZER.decode(text.completion))
        for text in make_agent(rows, tokenizer=tokenizer, **config).texts
    ]


def chat_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_formats() -> None:
    user, said = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}
    again = {"role": "user", "content": "sure?"}
    assert texts_of([{"prompt": "2+2=", "completion": "4"}]) == [("2+2=", "4<eos>")]
    assert texts_of([{"prompt": "2+2=", "completion": "4<eos>"}]) == [("2+2=", "4<eos>")]
    assert texts_of([{"text": "abc"}]) == [("a", "bc<eos>")]
    assert texts_of([{"prompt": "2+2=", "completion": "4"}], append_eos=False) == [("2+2=", "4")]
    assert texts_of([{"prompt": "2+2=", "completion": "4<eos>"}], append_eos=False) == [("2+2=", "4<eos>")]
    asked, answered = "<user>2+2<eos>\n<assistant>", "4<eos>"
    chat = chat_tokenizer()
    for row in (
        {"messages": [user, said]},
        {"prompt": [user], "completion": [said]},
        {"prompt": "2+2", "completion": [said]},
        {"prompt": [user], "completion": "4"},
    ):
        assert texts_of([row], tokenizer=chat) == [(asked, answered)]
    (long,) = texts_of([{"messages": [user, said, again, said]}], tokenizer=chat)
    assert long == ("<user>2+2<eos>\n<assistant>4<eos>\n<user>sure?<eos>\n<assistant>", "4<eos>")


def test_rendered_strings_keep_their_control_tokens() -> None:
    row = {"prompt": "a<eos>b", "completion": "c"}
    spelled = make_agent([row]).texts[0]
    rendered = make_agent([row], add_special_tokens=False).texts[0]
    assert spelled.prompt == [97, *b"<eos>", 98]
    assert rendered.prompt == [97, EOS, 98]


def test_reads_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert texts_of(path) == texts_of(ROWS)


def test_long_texts() -> None:
    row = {"prompt": "0123456789", "completion": "abcd"}
    assert texts_of([row], max_length=8, allow_faulty_rows=1.0) == [("789", "abcd<eos>")]
    assert texts_of([row], max_length=4, allow_faulty_rows=1.0) == [("9", "abc")]
    (text,) = make_agent([{"prompt": "x" * 500, "completion": "abcd"}], allow_faulty_rows=1.0).texts
    assert len(text.prompt) + len(text.completion) == 128, "as many as the model has places"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_agent([]), "there are no examples in a list: give at least one"),
        (lambda: make_agent([{"prompt": "a"}]), "row 0 of the examples has the keys .'prompt'.: it needs 'prompt' and"),
        (lambda: make_agent(["text"]), "row 0 of the examples is 'text': an example is a dict"),
        (lambda: make_agent([{"prompt": "a", "completion": 3}]), "'completion' of row 0 .* is 3: it must be a text"),
        (lambda: make_agent([{"text": ["a"]}]), "'text' of row 0 .* it must be a string"),
        (lambda: make_agent([{"text": ""}]), "has no token to learn"),
        (lambda: make_agent([{"messages": [{"role": "user", "content": "a"}]}]), "of which is the assistant's"),
        (lambda: make_agent([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}]), "no chat template"),
        (lambda: make_agent("rows.csv"), "cannot read examples from 'rows.csv'"),
        (lambda: make_agent("rows.jsonl"), "there is no file 'rows.jsonl' with examples"),
        (lambda: SFTConfig(batch_size=8, micro_batch_size=3), "batch_size=8 must be a multiple of micro_batch_size=3"),
    ],
)
def test_errors_say_what_to_do(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ messages|length }} messages: {{ messages[-1].content }}"
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}
    with pytest.raises(ValueError, match="so the completion cannot be separated"):
        make_agent([row], tokenizer=tokenizer)


def test_the_tokenizer_is_the_policys_own_and_never_a_guess(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    lm = mock_lm(num_layers=1)
    with pytest.raises(ValueError, match="no tokenizer is saved with the policy's weights"):
        SFT(ActorCritic.from_pretrained(lm), rows)
    with pytest.raises(ValueError, match=r"the policy .* has 258 tokens, and the tokenizer .* has 2048"):
        SFT(ActorCritic.from_pretrained(lm), rows, "tiny")

    lm.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    [text] = SFT(ActorCritic.from_pretrained(tmp_path), rows).texts
    assert text.prompt == [97]
    assert text.completion == [98, EOS]


def test_a_step_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ActorCritic.from_pretrained(mock_lm())
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    agent = SFT(policy, [{"prompt": "a", "completion": "b"}] * 2, byte_tokenizer(), SFTConfig(max_steps=1))
    plainly = agent.loss

    def spoilt(*arguments: Any) -> Any:
        loss, metrics = plainly(*arguments)
        return loss * torch.nan, metrics

    monkeypatch.setattr(agent, "loss", spoilt)
    with pytest.raises(NonFiniteError, match="the gradient norm of step 1 is nan"):
        agent.learn()
    assert all(torch.equal(value, before[key]) for key, value in policy.state_dict().items())
