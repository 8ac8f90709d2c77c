"""Callbacks of `learn`: their hooks, lists of them, the best checkpoint and early stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from textgym import ActorCritic
from textgym.agents import DQN, PPO, SFT, DQNConfig, PPOConfig, SFTConfig
from textgym.agents.callbacks import Callback
from textgym.agents.watching.best import EarlyStop, KeepBest
from textgym.errors import ConfigError
from textgym.testing import byte_tokenizer, mock_lm

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


class Diary(Callback):
    """Notes what it is called with."""

    def __init__(self, stop_after: int = 100) -> None:
        self.lines: list[str] = []
        self.stop_after = stop_after

    def on_training_start(self, agent: Any) -> None:
        self.lines.append(f"start {agent.updates}")

    def on_rollout_end(self, agent: Any, rollout: Any, kl: Any) -> None:
        assert kl.shape == rollout.response_mask.shape
        self.lines.append(f"rollout {agent.updates}")

    def on_update_end(self, agent: Any, metrics: dict[str, float]) -> bool:
        self.lines.append(f"update {agent.updates}")
        return agent.updates < self.stop_after

    def on_training_end(self, agent: Any) -> None:
        self.lines.append(f"end {agent.updates}")


class Scores(Callback):
    """Adds given held-out figures to the metrics, as `HeldOut` does."""

    def __init__(self, *scores: float | None, kl: float = 0.0) -> None:
        self.scores, self.kl = list(scores), kl

    def on_update_end(self, agent: Any, metrics: dict[str, float]) -> None:
        score = self.scores[agent.updates - 1]
        if score is not None:
            metrics |= {"eval/score": score, "eval/kl": self.kl * agent.updates}


def make(kind: Any = PPO, config: Any = None) -> Any:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=2,
        prompts=["ab", "c"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [float(len(text)) for text in completions],
        max_new_tokens=2,
        kl_coef=0.5,
    )
    config = config if config is not None else PPOConfig(episodes_per_update=2, minibatch_size=2)
    return kind(ActorCritic.from_pretrained(mock_lm()), envs, config)


def test_hooks_are_called_around_training_rollouts_and_updates() -> None:
    diary = Diary()
    make().learn(4, callback=diary)
    each = ["rollout 0", "update 1", "rollout 1", "update 2"]
    assert diary.lines == ["start 0", *each, "end 2"]


def test_hooks_of_agents_with_a_replay_buffer_and_of_those_that_learn_from_data() -> None:
    replay, offline = Diary(), Diary()
    make(DQN, DQNConfig(episodes_per_update=2, batch_size=2, learning_starts=2, gradient_steps=1)).learn(2, replay)
    assert replay.lines == ["start 0", "rollout 0", "update 1", "end 1"]
    SFT(ActorCritic.from_pretrained(mock_lm()), ROWS, byte_tokenizer(), SFTConfig(batch_size=1)).learn(offline)
    assert offline.lines == ["start 0", "update 1", "update 2", "end 2"]


def test_a_callback_that_returns_false_ends_the_training_after_all_others_were_called() -> None:
    first, second, seen = Diary(stop_after=1), Diary(), list[int]()
    agent = make().learn(8, callback=[first, second, lambda agent, metrics: seen.append(agent.updates)])
    assert agent.updates == 1
    assert first.lines == second.lines == ["start 0", "rollout 0", "update 1", "end 1"]
    assert seen == [1]


def test_a_callback_that_returns_false_ends_agents_that_learn_from_data_too() -> None:
    diary = Diary(stop_after=1)
    SFT(ActorCritic.from_pretrained(mock_lm()), ROWS, byte_tokenizer(), SFTConfig(batch_size=1)).learn(diary)
    assert diary.lines == ["start 0", "update 1", "end 1"]


def test_a_class_in_place_of_a_callback_is_refused() -> None:
    with pytest.raises(ConfigError, match="a callback of learn is"):
        make().learn(2, callback=[Diary])


def test_the_best_checkpoint_is_that_of_score_minus_kl(tmp_path: Path) -> None:
    """Scores less 0.5 times the KL are 0.5, 1.0, not measured, 0.5; the highest score is that of the last update."""
    agent = make().learn(8, [Scores(1.0, 2.0, None, 2.5, kl=1.0), KeepBest(tmp_path / "best")])
    best = json.loads((tmp_path / "best" / "best.json").read_text())
    assert best == {"metric": "eval/score - beta eval/kl", "value": 1.0, "update": 2}
    assert PPO.load(tmp_path / "best" / "agent", agent.envs).updates == 2


@pytest.mark.slow
def test_the_best_checkpoint_by_a_named_metric_survives_a_resumed_run(tmp_path: Path) -> None:
    agent = make().learn(4, [Scores(3.0, 1.0), KeepBest(tmp_path, "eval/score")])
    agent.learn(8, [Scores(3.0, 1.0, 2.0, 2.0), KeepBest(tmp_path, "eval/score")])
    assert json.loads((tmp_path / "best.json").read_text())["update"] == 1
    agent.learn(10, [Scores(*[0.0] * 4, 4.0), KeepBest(tmp_path, "eval/score")])
    assert json.loads((tmp_path / "best.json").read_text())["update"] == 5


def test_a_run_that_goes_on_knows_its_best_value(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text(json.dumps({"metric": "eval/score", "value": 3.0, "update": 1}))
    agent = make()
    agent.updates = 2
    best = KeepBest(tmp_path, "eval/score")
    best.on_training_start(agent)
    assert best.is_better({"eval/score": 2.0}) is False
    assert best.is_better({"eval/score": 4.0}) is True


def test_a_low_value_can_be_the_best(tmp_path: Path) -> None:
    make().learn(6, [Scores(3.0, 1.0, 2.0), KeepBest(tmp_path, "eval/score", mode="min")])
    assert json.loads((tmp_path / "best.json").read_text())["value"] == 1.0


def test_a_run_stops_when_it_no_longer_gets_better() -> None:
    scores = [1.0, 1.5, None, 1.55, 1.4, 9.0]
    assert make().learn(12, [Scores(*scores), EarlyStop(patience=2, min_delta=0.1)]).updates == 5
    assert make().learn(12, [Scores(*scores), EarlyStop(patience=3, min_delta=0.1)]).updates == 6


def test_a_metric_that_nothing_measures_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="EarlyStop saw no update with the metric 'eval/scores'"):
        make().learn(2, EarlyStop(metric="eval/scores"))


def test_a_callable_object_that_prepares_itself_is_told_of_the_start_and_a_function_is_not() -> None:
    lines: list[str] = []

    class Prepared:
        def on_training_start(self, agent: Any) -> None:
            lines.append(f"start {agent.updates}")

        def __call__(self, agent: Any, metrics: dict[str, float]) -> None:
            lines.append(f"update {agent.updates}")

    make().learn(4, [Prepared(), lambda agent, metrics: lines.append("function")])
    assert lines[:3] == ["start 0", "update 1", "function"]
    assert lines.count("start 0") == 1
