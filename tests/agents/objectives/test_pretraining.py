"""PPO-ptx: pretraining texts in the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym.agents import NLPO, PPO, PPOConfig
from textgym.models.actor_critic import ActorCritic
from textgym.testing import Measured, assert_close, assert_learns, byte_tokenizer, mock_lm, terms_of

TEXTS = ["the first text", "another one, which is longer", "x y"]
pytestmark = pytest.mark.filterwarnings("ignore:sampling is filtered:UserWarning")


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return str(path)


def make_agent(kind: Any = PPO, critic: str = "separate", **changes: Any) -> Any:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=8,
        prompts=["one", "x"],
        tokenizer=byte_tokenizer(),
        reward=vowels,
        max_new_tokens=4,
    )
    settings = {"episodes_per_update": 8, "minibatch_size": None, "num_epochs": 1, "max_grad_norm": 1e9, **changes}
    return kind(ActorCritic.from_pretrained(mock_lm(), critic=critic), envs, kind.config_class(**settings))


def gradient_of(agent: Any) -> dict[str, torch.Tensor]:
    """The gradient of the policy's weights in the first update."""
    agent.learn(8)
    return {name: x.grad.clone() for name, x in agent.policy.lm.named_parameters() if x.grad is not None}


def test_the_gradient_has_the_weighted_likelihood_of_the_texts(texts: str) -> None:
    settings = {"learning_rate": 0.0, "ptx_batch_size": 5}
    plain = gradient_of(make_agent(learning_rate=0.0))
    agent = make_agent(ptx_data=texts, ptx_coef=0.7, **settings)
    sampled: list[Any] = []
    sample = agent.pretraining.sample
    agent.pretraining.sample = lambda *given: sampled.append(sample(*given)) or sampled[-1]
    both = gradient_of(agent)

    (batch,) = sampled
    agent.policy.zero_grad()
    losses = []
    for ids, start, end in zip(batch.input_ids, batch.prompt_lengths, batch.lengths, strict=True):
        log_probs = agent.policy.lm(ids[None, :end]).logits[0].log_softmax(-1)
        losses.append(-log_probs[start - 1 : end - 1].gather(1, ids[start:end, None])[:, 0])
    torch.cat(losses).mean().backward()
    for name, weight in agent.policy.lm.named_parameters():
        if name in both:
            expected = plain[name] + 0.7 * weight.grad
            assert_close(both[name], expected, terms=terms_of(mock_lm()), scale=max(1.0, float(expected.abs().max())))


def test_texts_are_read_with_the_policys_tokenizer_and_end_with_eos(texts: str) -> None:
    tokenizer = byte_tokenizer()
    agent = make_agent(ptx_data=texts)
    whole = {(*text.prompt, *text.completion) for text in agent.pretraining.texts}
    assert whole == {(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in TEXTS}
    short = make_agent(ptx_data=texts, ptx_max_length=6)
    assert max(len(text.prompt) + len(text.completion) for text in short.pretraining.texts) == 6


def fall_of_the_loss(kind: Any, texts: str, seed: int, learning_rate: float = 1e-2) -> float:
    """By which share the loss of the texts falls in 12 updates."""
    losses: list[float] = []
    settings = {"ptx_data": texts, "ptx_coef": 10.0, "learning_rate": learning_rate, "anneal_learning_rate": False}
    make_agent(kind, seed=seed, **settings).learn(8 * 12, [lambda _, row: losses.append(row["loss/ptx_avg"])])
    return 1 - losses[-1] / losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PPO, NLPO])
def test_the_policy_keeps_the_likelihood_of_the_texts(kind: Any, texts: str) -> None:
    """NLPO has the same mean and deviation. A false failure has a chance of 2e-5."""
    falls = [fall_of_the_loss(kind, texts, seed) for seed in range(2)]
    assert_learns(falls, at_least=0.5, measured=Measured(mean=0.900, standard_deviation=0.012, runs=4))


@pytest.mark.slow
def test_without_a_learning_rate_the_likelihood_of_the_texts_stays(texts: str) -> None:
    assert fall_of_the_loss(PPO, texts, 0, learning_rate=0.0) == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_texts(texts: str, tmp_path: Path) -> None:
    agent = make_agent(ptx_data=texts).learn(8)
    agent.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", envs=make_agent().envs)
    assert loaded.pretraining is not None
    assert loaded.pretraining.texts == agent.pretraining.texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ptx_coef": 0.5}, r"ptx_coef=0.5 cannot be used with ptx_data=None: .* give a .jsonl file"),
        ({"ptx_data": "os:getcwd"}, r"ptx_data must be the path of a .jsonl file or None"),
        ({"ptx_data": "texts.jsonl", "ptx_coef": 0.0}, r"ptx_coef must be above 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)
