"""Held-out prompts: which ones, that training does not notice, and what the tables say."""

from __future__ import annotations

import re
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import textgym.agents.runs.heldout as module
from textgym.agents import PPO, PPOConfig
from textgym.agents.machine.named_envs import heldout_envs, hold_out
from textgym.agents.runs.evaluation import generate
from textgym.agents.runs.heldout import HeldOut, comparison, judge_of
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.functions import lexicon_sentiment
from textgym.testing import assert_trained_alike, byte_tokenizer, mock_lm


def lengths(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def make_envs(prompts: list[str], **settings: Any) -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=prompts,
        tokenizer=byte_tokenizer(),
        kl_mode="deferred",
        max_new_tokens=4,
        max_prompt_tokens=16,
        **{"reward": lengths, **settings},
    )


PROMPTS = [f"prompt {number}" for number in range(40)]


def rows(prompts: list[Any]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "place": place} for place, prompt in enumerate(prompts)]


def test_a_tenth_is_held_out_and_alike_prompts_stay_together() -> None:
    given = rows([*PROMPTS, *(prompt.upper() + "!" for prompt in PROMPTS)])
    train, heldout = hold_out(given, 64)
    kept = {row["prompt"].lower().strip("!") for row in heldout}
    assert len(kept) == 4
    assert kept.isdisjoint(row["prompt"].lower().strip("!") for row in train)
    assert sorted(row["place"] for row in (*train, *heldout)) == list(range(80))
    assert [row["place"] for row in train] == sorted(row["place"] for row in train)


def test_the_same_prompts_are_held_out_whatever_their_order() -> None:
    first = hold_out(rows(PROMPTS), 3)[1]
    second = hold_out(rows(PROMPTS[::-1]), 3)[1]
    assert len(first) == 3
    assert {row["prompt"] for row in first} == {row["prompt"] for row in second}


@pytest.mark.parametrize("prompts", [["a", "b"], ["a"] * 100, [[{"role": "user", "content": "\ud800"}]]])
def test_too_few_prompts_are_all_trained_on(prompts: list[Any]) -> None:
    train, heldout = hold_out(rows(prompts), 64)
    assert (len(train), heldout) == (len(prompts), [])


def test_the_other_environment_has_the_prompts_that_are_kept_and_the_same_objects() -> None:
    envs = make_envs(PROMPTS, reward=[lengths, lengths], reward_weights=[1.0, 0.5], reference=mock_lm())
    other = heldout_envs(envs, 3)
    here, there = ({row["prompt"] for row in e.unwrapped.prompts} for e in (envs, other))
    assert (len(here), len(there), here | there) == (37, 3, set(PROMPTS))
    assert other.unwrapped.scorer.weights == [1.0, 0.5]
    assert other.unwrapped.reference is envs.unwrapped.reference
    few = make_envs(PROMPTS[:5])
    assert len(heldout_envs(few, 3).unwrapped.prompts) == len(few.unwrapped.prompts) == 5


def trained(every: int | None) -> tuple[PPO, list[dict[str, float]]]:
    agent = PPO(
        ActorCritic.from_pretrained(mock_lm()),
        make_envs(PROMPTS[:8]),
        PPOConfig(episodes_per_update=4, minibatch_size=4, learning_rate=1e-3),
    )
    seen: list[dict[str, float]] = []
    evaluation = [] if every is None else [HeldOut(make_envs(PROMPTS[8:]), agent.penalty.reference, every)]
    agent.learn(12, [*evaluation, lambda agent, metrics: seen.append(dict(metrics))])
    return agent, seen


def test_training_does_not_notice_the_evaluation() -> None:
    (watched, seen), (alone, _) = trained(2), trained(None)
    assert_trained_alike(watched.policy.state_dict(), alone.policy.state_dict(), watched.config.learning_rate)
    assert [("eval/score" in metrics) for metrics in seen] == [False, True, True], "every second, and the last"
    assert {"eval/kl", "eval/length", "eval/distinct_2", "eval/ended_by_stop"} <= seen[-1].keys()


def test_the_answers_of_the_last_update_are_not_written_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a callback has changed the policy since, or it is another one."""
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return generate(*args)

    monkeypatch.setattr(module, "generate", counted)
    policy, other = (ActorCritic.from_pretrained(mock_lm(seed=seed)) for seed in (0, 1))
    agent = PPO(policy, make_envs(PROMPTS[:8]), PPOConfig(episodes_per_update=4, minibatch_size=4))
    evaluation = HeldOut(make_envs(PROMPTS[8:]), agent.penalty.reference, every=1, samples=8)
    agent.learn(8, evaluation)
    assert len(calls) == 2
    assert evaluation.last is not None
    measured = evaluation.last[1]
    first = evaluation.answers(other)
    last = evaluation.answers(policy)
    assert len(calls) == 3
    assert last == measured != first

    with torch.no_grad():
        next(policy.lm.parameters()).mul_(2.0)
    assert evaluation.answers(policy) != last
    policy.temperature = 0.5
    evaluation.answers(policy)
    assert len(calls) == 5


def test_answers_of_an_earlier_update_are_not_those_of_a_later_one() -> None:
    agent, _ = trained(None)
    evaluation = HeldOut(make_envs(PROMPTS[8:]), agent.penalty.reference, every=2, samples=8)
    agent.total_episodes = 100
    agent.updates = 2
    evaluation(agent, {})
    assert evaluation.last is not None
    agent.updates = 3
    evaluation(agent, {})
    assert evaluation.last is None


def numbers_in(text: float | str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+][\d.]+", str(text))]


def test_a_policy_that_did_not_change_differs_by_nothing_and_one_that_did_by_something() -> None:
    envs = make_envs(PROMPTS)
    policy = ActorCritic.from_pretrained(mock_lm())
    other = ActorCritic.from_pretrained(mock_lm(seed=1), temperature=0.2)  # it repeats itself
    before = generate(policy, envs, range(16), seed=0)
    same = comparison(before, generate(policy, envs, range(16), seed=0), policy)
    assert same["difference"]["score"] == same["difference"]["distinct_2"] == "+0.000 [+0.000, +0.000]"
    assert same["before"] == same["after"]
    changed = comparison(before, generate(other, envs, range(16), seed=0), policy, judge=lambda p, c: lengths(c))
    assert changed["after"]["kl"] != changed["before"]["kl"]
    value, low, high = numbers_in(changed["difference"]["distinct_2"])
    assert value == pytest.approx(changed["after"]["distinct_2"] - changed["before"]["distinct_2"], abs=1e-3)
    assert low < value < high
    assert changed["after"]["judge"] == pytest.approx(changed["after"]["score"])


def test_rows_without_a_score_are_left_out_of_the_scores_alone() -> None:
    def some(completions: list[str], place: list[int]) -> list[float | None]:
        return [None if number % 2 else float(number) for number in place]

    envs = make_envs(rows(PROMPTS), reward=some)  # type: ignore[arg-type]
    policy = ActorCritic.from_pretrained(mock_lm())
    samples = generate(policy, envs, range(8), seed=0)
    table = comparison(samples, samples, policy)
    assert table["before"]["score"] == np.mean([0, 2, 4, 6])
    assert table["before"]["length"] == pytest.approx(samples.rollout.sequences.response_lengths.float().mean().item())


def test_a_judge_whose_package_is_missing_is_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge_of("textgym/Text-v0") is None
    assert judge_of("textgym/Sentiment-v0") is lexicon_sentiment
    assert capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    assert judge_of("textgym/Sentiment-v0") is None
    assert "'textgym[metrics]'" in capsys.readouterr().out
