"""WarningSigns: each sign once, when the metrics show it, with its figures and the remedy."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

from textgym.agents import PPO, PPOConfig
from textgym.agents.runs.display.warning_signs import TrainingWarning, WarningSigns
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.kl import AdaptiveKL, ThresholdKL
from textgym.testing import byte_tokenizer, mock_lm

Metrics = dict[str, float]
HEALTHY: Metrics = {
    "objective/kl": 4.0,
    "objective/scores": 1.0,
    "objective/scores_std": 0.5,
    "objective/unscored": 0.0,
    "policy/clipfrac_avg": 0.1,
    "policy/entropy_avg": 3.0,
    "val/ended_by_stop": 0.5,
    "val/response_tokens": 20.0,
    "val/explained_variance_within_prompts": 0.1,
    "val/equal_scores": 0.2,
}


def make_agent(kl_coef: Any = 0.1, **settings: Any) -> PPO:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=2,
        prompts=["one", "two"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [1.0 for _ in completions],
        kl_coef=kl_coef,
        kl_mode="deferred",
        max_new_tokens=2,
        **settings,
    )
    return PPO(ActorCritic.from_pretrained(mock_lm()), envs, PPOConfig(episodes_per_update=2, minibatch_size=2))


@pytest.fixture(scope="module")
def agent() -> PPO:
    return make_agent()


def said(agent: PPO, rows: list[Metrics], history: list[Metrics] | None = None) -> list[str]:
    """The warnings of a run with these metrics, in which all others are healthy."""
    texts: list[str] = []
    signs = WarningSigns(agent, texts.append, [{**HEALTHY, **row} for row in history or []])
    for row in rows:
        signs(agent, {**HEALTHY, **row})
    return texts


def without(name: str) -> Metrics:
    return {key: value for key, value in HEALTHY.items() if key != name}


SIGNS: dict[str, tuple[list[Metrics], list[Metrics], str, str]] = {
    # name: metrics that are just good enough, metrics that are not, figures of the warning, remedy
    "critic": (
        [{"val/explained_variance_within_prompts": 0.0}] * 12,
        [{"val/explained_variance_within_prompts": -0.25}] * 12,
        "explains -0.25 of the variance within prompts",
        "critic_learning_rate",
    ),
    "clipping": (
        [{"policy/clipfrac_avg": 0.5}] * 6,
        [{"policy/clipfrac_avg": 0.75}] * 6,
        "75% of the ratios",
        "learning_rate",
    ),
    "entropy": (
        [{}] * 3 + [{"policy/entropy_avg": 0.95}] * 6,
        [{}] * 3 + [{"policy/entropy_avg": 0.5}] * 6,
        "from 3.00 to 0.50 nats",
        "kl_coef",
    ),
    "groups of equal scores": (
        [{"val/equal_scores": 0.5}] * 6,
        [{"val/equal_scores": 0.75}] * 6,
        "in 75% of the groups",
        "group_size",
    ),
    "cut": (
        [{"val/ended_by_stop": 0.25}] * 6,
        [{"val/ended_by_stop": 0.125}] * 6,
        "88% of the rows are cut",
        "max_new_tokens",
    ),
    "unscored": (
        [{"objective/unscored": 0.0625}] * 6,
        [{"objective/unscored": 0.25}] * 6,
        "25% of the rows have no score",
        "reward functions",
    ),
    "longer": (
        [{}] * 3 + [{"val/response_tokens": 25.0}] * 6,
        [{}] * 3 + [{"val/response_tokens": 27.0}] * 6,
        "from 20.0 to 27.0 tokens",
        "kl_coef",
    ),
    "shorter": (
        [{}] * 3 + [{"val/response_tokens": 15.0}] * 6,
        [{}] * 3 + [{"val/response_tokens": 13.0}] * 6,
        "from 20.0 to 13.0 tokens",
        "kl_coef",
    ),
}


def test_a_healthy_run_has_no_signs(agent: PPO) -> None:
    assert said(agent, [{}] * 30) == []


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_is_said_once_with_its_figures_and_the_remedy(agent: PPO, name: str) -> None:
    good, bad, figures, remedy = SIGNS[name]
    assert said(agent, good) == []
    [text] = said(agent, bad)
    assert figures in text
    assert remedy in text


@pytest.mark.parametrize("controller", [AdaptiveKL(target=4.0), ThresholdKL(2.0, 4.0)])
def test_a_kl_above_its_budget_is_a_sign(controller: Any) -> None:
    agent = make_agent(kl_coef=controller)
    assert said(agent, [{"objective/kl": 4.75}] * 6) == []
    [text] = said(agent, [{"objective/kl": 5.0}] * 6)
    assert "5.0 nats, above its budget of 4" in text


def test_a_fixed_coefficient_has_no_budget(agent: PPO) -> None:
    assert said(agent, [{"objective/kl": 400.0}] * 6) == []


def test_one_odd_rollout_is_no_sign(agent: PPO) -> None:
    odd = {"val/ended_by_stop": 0.0, "val/response_tokens": 27.0, "val/equal_scores": 1.0, "policy/entropy_avg": 0.1}
    assert said(agent, [{}] * 5 + [odd] + [{}] * 5) == []


def test_a_critic_has_ten_updates_to_learn(agent: PPO) -> None:
    bad = {"val/explained_variance_within_prompts": -0.5}
    assert said(agent, [bad] * 9) == []
    assert len(said(agent, [bad] * 10)) == 1


@pytest.mark.parametrize("reports", [1, 2])
def test_a_critic_is_judged_after_ten_updates_of_which_half_report_it_within_prompts(agent: PPO, reports: int) -> None:
    name = "val/explained_variance_within_prompts"
    texts: list[str] = []
    signs = WarningSigns(agent, texts.append)
    for update in range(1, 13):
        signs(agent, {**without(name), **({name: -0.5} if update % reports == 0 else {})})
        assert len(texts) == (update >= 10)
    assert "explains -0.50 of the variance within prompts" in texts[0]


@pytest.mark.parametrize("within", [{}, {"val/explained_variance_within_prompts": 0.1}])
def test_a_critic_that_explains_less_than_nothing_of_all_returns_is_a_sign_whatever_it_does_within_prompts(
    agent: PPO, within: Metrics
) -> None:
    """With more prompts than episodes no update reports what is explained within prompts."""
    texts: list[str] = []
    signs = WarningSigns(agent, texts.append)
    for update in range(1, 13):
        signs(agent, {**without("val/explained_variance_within_prompts"), **within, "val/explained_variance": -1.0})
        assert len(texts) == (update >= 10)
    assert "explains -1.00 of the variance of all returns, a mean over 10 updates" in texts[0]


def test_a_few_updates_that_repeat_a_prompt_do_not_judge_a_critic(agent: PPO) -> None:
    name = "val/explained_variance_within_prompts"
    rows = [{**without(name), "val/explained_variance": 0.2, **({name: -9.0} if i < 4 else {})} for i in range(12)]
    texts: list[str] = []
    signs = WarningSigns(agent, texts.append)
    for row in rows:
        signs(agent, row)
    assert texts == []


def test_responses_of_a_fixed_length_are_not_cut() -> None:
    agent = make_agent(min_new_tokens=2)
    assert said(agent, [{"val/ended_by_stop": 0.0}] * 6) == []


def test_equal_scores_of_all_rows_are_a_sign_where_no_groups_are_compared(agent: PPO) -> None:
    texts: list[str] = []
    signs = WarningSigns(agent, texts.append)
    for _ in range(6):
        signs(agent, {**without("val/equal_scores"), "objective/scores_std": 0.0})
    [text] = texts
    assert "all rows have the same score, 1" in text


def test_a_resumed_run_compares_with_its_start_and_repeats_no_warning(agent: PPO) -> None:
    short = {"val/response_tokens": 12.0}
    assert len(said(agent, [short] * 6, history=[{}] * 6)) == 1
    assert said(agent, [short] * 6, history=[{}] * 3 + [short] * 6) == []


def test_metrics_that_an_agent_does_not_report_are_no_sign(agent: PPO) -> None:
    texts: list[str] = []
    signs = WarningSigns(agent, texts.append)
    for _ in range(12):
        signs(agent, {"objective/kl": 1.0, "episodes": 2.0})
    assert texts == []


def test_learning_warns_of_a_reward_that_is_the_same_for_all_rows() -> None:
    agent = make_agent()
    with pytest.warns(TrainingWarning, match="all rows have the same score, 1"):
        agent.learn(10, [WarningSigns(agent)])
