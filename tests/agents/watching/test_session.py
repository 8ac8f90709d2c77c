"""`learn(progress=True, folder="runs/x")`: a run from Python shows and keeps what the command does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from textgym import ActorCritic, cli
from textgym.agents import DPO, DQN, GRPO, PPO, SFT, DPOConfig, DQNConfig, GRPOConfig, PPOConfig, SFTConfig
from textgym.agents.callbacks import Callback
from textgym.agents.machine.named_envs import heldout_envs, num_rows
from textgym.agents.runs.checkpoints import Checkpoints
from textgym.agents.runs.display.warning_signs import TrainingWarning
from textgym.agents.runs.history import Run
from textgym.agents.runs.progress import LiveProgress
from textgym.agents.runs.run_folder import RunFolder
from textgym.agents.watching import session
from textgym.agents.watching.run import WatchedRun
from textgym.algorithms import ALGORITHMS
from textgym.errors import ConfigError
from textgym.flags import Train
from textgym.rewards.kl import AdaptiveKL, ThresholdKL
from textgym.testing import assert_trained_alike, byte_tokenizer, mock_lm
from textgym.viewer.records import read_record, records_of, update_of
from textgym.viewer.runs import read_metrics

PROMPTS = ["ab", "c", "de", "f", "g", "hi", "j", "kl", "m", "n"]
FILES = {
    *("run.json", "run.lock", "config.json", "metrics.jsonl", "tensorboard"),
    *("checkpoints", "curves.png", "records", "samples.md", "evaluation.json", "heldout_start.json", "policy"),
}
SMALL = PPOConfig(episodes_per_update=8, minibatch_size=8)


def make_envs(prompts: list[str] = PROMPTS, kl_coef: Any = 0.1) -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=2,
        prompts=prompts,
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [float(len(text)) for text in completions],
        max_new_tokens=2,
        kl_coef=kl_coef,
    )


def make(kl_coef: Any = 0.1) -> PPO:
    config = PPOConfig(episodes_per_update=2, minibatch_size=2)
    return PPO(ActorCritic.from_pretrained(mock_lm()), make_envs(kl_coef=kl_coef), config)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.mark.slow
def test_the_judge_of_a_task_scores_the_recorded_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(prompts: list[str], completions: list[str]) -> list[float]:
        return [0.25] * len(prompts)

    monkeypatch.setattr(session, "judge_of", {"textgym/Text-v0": judge}.get)
    make().learn(2, folder=tmp_path / "run")
    [path] = records_of(tmp_path / "run")
    record = read_record(path)
    assert record["rows"]["judge"] == [0.25, 0.25]
    assert record["judges"] == ["judge"]


def test_a_run_folder_from_python_has_all_that_the_command_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make().learn(4, progress=True, folder=tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    shown = capsys.readouterr().out
    for text in ("agent:       PPO", "update 1 ", "update 2 ", "held-out score", "difference", "run folder:"):
        assert text in shown
    assert shown.startswith("device: cpu")
    assert f"go on: textgym view {tmp_path / 'run'} | in Python: PPO.load(" in " ".join(shown.split())
    assert "eval/score" in metrics_of(tmp_path / "run")[-1]
    run = Run.read(tmp_path / "run")
    assert run.state == "finished"
    assert run.settings.keys() <= {field.name for field in fields(Train)}
    assert run.settings["agent"] in ALGORITHMS
    assert run.settings["output_dir"] == str(tmp_path / "run")


def test_the_second_of_several_processes_shows_nothing_and_leaves_the_run_folder_to_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "rank", lambda: 1)
    make().learn(2, progress=True, folder=tmp_path / "run")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.filterwarnings("ignore:.* has the metrics of 0 of 1 updates")
def test_a_run_that_goes_on_replaces_the_policy_of_its_folder(tmp_path: Path) -> None:
    agent = make()
    for updates in (0, 1):
        folder = RunFolder(tmp_path / "run", {}, updates)
        WatchedRun(agent, LiveProgress(quiet=True), folder=folder)._close()
        saved = load_file(tmp_path / "run" / "policy" / "model.safetensors")
        assert saved["model.embed_tokens.weight"].equal(agent.policy.lm.get_input_embeddings().weight)
        torch.nn.init.zeros_(agent.policy.lm.get_input_embeddings().weight)


@pytest.mark.slow
def test_a_checkpoint_is_written_after_the_metrics_and_the_record_of_its_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between them, and goes on from the checkpoint, would never write them."""
    kept: list[tuple[int, int, int]] = []

    def save(self: Checkpoints, agent: PPO) -> None:
        if agent.updates:
            kept.append((agent.updates, len(metrics_of(tmp_path)), update_of(records_of(tmp_path)[-1])))

    monkeypatch.setattr(session, "EVERY", 1)
    monkeypatch.setattr(Checkpoints, "save", save)
    make().learn(4, folder=tmp_path)
    assert kept == [(1, 1, 1), (2, 2, 2)]


class Added(Callback):
    """Adds numbers of several kinds, and whether the evaluation came first."""

    def on_update_end(self, agent: Any, metrics: dict[str, Any]) -> None:
        metrics["my/tensor"] = torch.tensor(agent.updates + 0.5)
        metrics["my/numpy"] = np.float32(agent.updates)
        metrics["my/sees_evaluation"] = "eval/score" in metrics


def test_metrics_that_a_callback_adds_are_kept_and_tracked_like_all_others(tmp_path: Path) -> None:
    make().learn(4, Added(), folder=tmp_path / "run", log_with="tensorboard")
    rows = metrics_of(tmp_path / "run")
    assert [row["my/tensor"] for row in rows] == [1.5, 2.5]
    assert [row["my/numpy"] for row in rows] == [1.0, 2.0]
    assert rows[-1]["my/sees_evaluation"] == 1.0
    for place in ("tensorboard", "trackers/tensorboard"):
        events = EventAccumulator(str(tmp_path / "run" / place)).Reload()
        assert [event.value for event in events.Scalars("my/tensor")] == [1.5, 2.5]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")["columns"]["my/tensor"] == [1.5, 2.5]


@pytest.mark.slow
def test_a_metric_that_is_no_number_is_named(tmp_path: Path) -> None:
    def add(agent: Any, metrics: dict[str, Any]) -> None:
        metrics["my/text"] = "good"

    with pytest.raises(ConfigError, match="the metric 'my/text' to 'good': a metric is a number"):
        make().learn(4, add, folder=tmp_path / "run")


@pytest.mark.slow
def test_a_run_folder_alone_shows_nothing_and_progress_alone_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make().learn(2, folder="run")
    assert capsys.readouterr().out == ""
    make().learn(2, progress=True)
    assert "update 1 " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.bit_for_bit
def test_watching_changes_neither_the_training_nor_the_callers_environment(tmp_path: Path) -> None:
    plain, watched = make(), make()
    plain.learn(6)
    watched.learn(6, folder=tmp_path / "run", progress=True)
    ours, theirs = watched.policy.state_dict(), plain.policy.state_dict()
    assert all(ours[name].equal(weight) for name, weight in theirs.items())
    assert len(watched.base_env.prompts) == len(PROMPTS)


@pytest.mark.filterwarnings("ignore:100% of the rows are cut")
def test_a_run_is_continued_in_its_folder_from_its_last_update(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make().learn(6, folder=folder)
    newest = Checkpoints(folder / "checkpoints").newest()
    agent = PPO.load(newest, make_envs(), reward=None)
    assert agent.updates == 3
    before = json.loads((folder / "evaluation.json").read_text())["before"]
    agent.learn(10, folder=folder)
    assert [row["episodes"] for row in metrics_of(folder)] == [2, 4, 6, 8, 10]
    after = json.loads((folder / "evaluation.json").read_text())
    assert after["before"] == before, "the table at the end compares with the start of the run"
    assert after["after"]["kl"] != before["kl"]
    assert Run.read(folder).settings["model"] == "", "and not the checkpoint that it went on from"


@pytest.mark.slow
def test_agents_that_learn_from_data_and_from_a_buffer_leave_run_folders(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "a", "completion": "b"}]
    SFT(ActorCritic.from_pretrained(mock_lm()), rows, tokenizer, SFTConfig()).learn(folder=tmp_path / "sft")
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    DPO(ActorCritic.from_pretrained(mock_lm()), pairs, tokenizer, DPOConfig()).learn(folder=tmp_path / "dpo")
    settings = DQNConfig(episodes_per_update=2, batch_size=2, learning_starts=2, gradient_steps=1)
    DQN(ActorCritic.from_pretrained(mock_lm()), make_envs(), settings).learn(2, folder=tmp_path / "dqn")
    for name in ("sft", "dpo", "dqn"):
        run = Run.read(tmp_path / name)
        assert (run.settings["agent"], run.state, len(run.history)) == (name, "finished", 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* was saved with other inputs")
def test_a_resumed_run_with_other_held_out_prompts_has_no_table_of_both(tmp_path: Path) -> None:
    make().learn(2, folder=tmp_path)
    first = (tmp_path / "evaluation.json").read_bytes()
    other = make_envs(["other", *PROMPTS[1:]])
    agent = PPO.load(Checkpoints(tmp_path / "checkpoints").newest(), other, reward=None)
    with pytest.warns(UserWarning, match="began with other held-out prompts"):
        agent.learn(4, folder=tmp_path)
    assert (tmp_path / "evaluation.json").read_bytes() == first


class Bad(Callback):
    """Makes each update look as if its steps were too large."""

    def on_update_end(self, agent: Any, metrics: dict[str, Any]) -> None:
        metrics["policy/clipfrac_avg"] = 0.75


@pytest.mark.slow
def test_warnings_of_a_run_that_shows_nothing_are_pythons_and_stay_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(TrainingWarning, match="75% of the ratios were clipped"):
        make().learn(4, Bad(), folder=tmp_path)
    assert capsys.readouterr().out == ""
    [kept] = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert kept["update"] == 1
    assert "75% of the ratios were clipped" in kept["warning"]
    folder = RunFolder(tmp_path, {}, updates=2)
    folder.keep_warning(9, "of an update that is played again")
    folder.close()
    RunFolder(tmp_path, {}, updates=2).close()
    assert [json.loads(line)["update"] for line in (tmp_path / "warnings.jsonl").read_text().splitlines()] == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("controller", "settings", "budget"),
    [
        (AdaptiveKL(target=4.0), {"kl_target": 4.0}, 4.0),
        (ThresholdKL(2.0, 6.0), {"kl_bounds": [2.0, 6.0]}, 6.0),
        (0.1, {}, None),
    ],
)
def test_the_kl_budget_of_a_run_from_python_is_in_its_settings_and_its_curves(
    controller: Any, settings: dict[str, Any], budget: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    make(kl_coef=controller).learn(2, folder=tmp_path)
    found = Run.read(tmp_path).settings
    assert {name: found[name] for name in ("kl_target", "kl_bounds") if name in found} == settings
    axes = {axis.get_title(): axis for axis in drawn[0].axes}
    assert "held-out score" in axes
    lines = axes["KL to the reference (nats a sequence)"].get_lines()
    assert [list(line.get_ydata()) for line in lines[1:]] == ([] if budget is None else [[budget, budget]])


def test_a_run_from_data_names_its_data_and_its_model_if_they_have_names(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    model, tokenizer = ActorCritic.from_pretrained(mock_lm()), byte_tokenizer()
    settings = session.settings_of_run(SFT(model, str(tmp_path / "rows.jsonl"), tokenizer), None)
    assert (settings["data"], settings["model"]) == (str(tmp_path / "rows.jsonl"), "")
    agent = SFT(model, rows, tokenizer)
    agent.policy.lm.name_or_path = "tiny"  # as of a model that was loaded by its name
    settings = session.settings_of_run(agent, None)
    assert "data" not in settings
    assert settings["model"] == "tiny"


def test_an_agent_that_is_loaded_keeps_the_name_of_its_start_and_the_arguments_of_its_environment(
    tmp_path: Path,
) -> None:
    """Also one that was saved before its first update; its policy has the path of the checkpoint as its name."""
    reward, prompts = "textgym.rewards.functions:completion_length", list("abcdefghijkl")
    envs = {"prompts": prompts, "reward": reward, "tokenizer": "tiny", "reference": "tiny", "kl_coef": 0.25}
    made = gym.make_vec("textgym/Text-v0", 8, kl_mode="deferred", max_new_tokens=2, **envs)
    heldout_envs(made, 1)  # as of an agent that is made of names
    PPO("tiny", made, SMALL).save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent")
    assert loaded.named is not None
    settings = session.settings_of_run(loaded, tmp_path / "new")
    assert (settings["model"], settings["env"]) == ("tiny", "textgym/Text-v0")
    assert json.loads(settings["env_kwargs"]).items() >= envs.items()

    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    SFT("tiny", tmp_path / "rows.jsonl").save(tmp_path / "sft")
    again = SFT.load(tmp_path / "sft", tmp_path / "rows.jsonl")
    again.save(tmp_path / "second")
    for agent in (again, SFT.load(tmp_path / "second", tmp_path / "rows.jsonl")):
        assert session.settings_of_run(agent, tmp_path / "new")["model"] == "tiny"


def test_an_environment_that_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match="'textgym/Sentimen-v0' is no environment"):
        PPO("tiny", "textgym/Sentimen-v0")


@pytest.mark.parametrize(("episodes", "group", "rows"), [(128, None, 64), (8, None, 8), (96, 6, 48), (130, None, 26)])
def test_rows_divide_the_episodes_into_whole_groups(episodes: int, group: int | None, rows: int) -> None:
    if group is None:
        assert num_rows(PPOConfig(episodes_per_update=episodes)) == rows
    else:
        assert num_rows(GRPOConfig(episodes_per_update=episodes, group_size=group)) == rows


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Computes as the command does, also where `OMP_NUM_THREADS` is 2."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.bit_for_bit
@pytest.mark.usefixtures("one_thread")
def test_names_in_python_and_the_command_make_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    PPO("tiny", "textgym/Sentiment-v0", SMALL).learn(16, progress=True, folder="python")
    shown = " ".join(capsys.readouterr().out.split())
    flags = ["--num-envs", "8", "--episodes-per-update", "8", "--minibatch-size", "8", "--quiet"]
    cli.main(["train", "--output-dir", "command", "--total-episodes", "16", *flags])
    assert metrics_of(Path("python")) == metrics_of(Path("command"))
    ours, theirs = (load_file(f"{name}/policy/model.safetensors") for name in ("python", "command"))
    assert all(ours[name].equal(weight) for name, weight in theirs.items())

    assert "go on: textgym view python | textgym evaluate python | textgym chat python | textgym resume python" in shown

    cli.main(["resume", "python", "--total-episodes", "24"])
    assert [row["episodes"] for row in metrics_of(Path("python"))] == [8, 16, 24]
    cli.main(["view", "python"])
    assert Path("python/viewer/index.html").exists()


@pytest.mark.slow
def test_a_run_of_names_is_continued_in_python_with_the_same_prompts_held_out(tmp_path: Path) -> None:
    agent = PPO("tiny", "textgym/Sentiment-v0", SMALL).learn(8, folder=tmp_path)
    assert agent.named is not None
    before = json.loads((tmp_path / "evaluation.json").read_text())["before"]
    loaded = PPO.load(Checkpoints(tmp_path / "checkpoints").newest())
    assert loaded.named is not None
    for ours, theirs in ((loaded.envs, agent.envs), (loaded.named.heldout, agent.named.heldout)):
        assert ours.unwrapped.prompts == theirs.unwrapped.prompts
    loaded.learn(16, folder=tmp_path)
    after = json.loads((tmp_path / "evaluation.json").read_text())
    assert after["before"] == before
    assert after["after"]["kl"] != before["kl"]
    settings = Run.read(tmp_path).settings
    assert (settings["model"], settings["env"]) == ("tiny", "textgym/Sentiment-v0")
    agent.learn(16)
    weights = (dict(one.policy.named_parameters()) for one in (loaded, agent))
    assert_trained_alike(*weights, SMALL.learning_rate)


@pytest.mark.slow
def test_groups_of_named_environments(tmp_path: Path) -> None:
    agent = GRPO("tiny", "textgym/Sentiment-v0", GRPOConfig(episodes_per_update=16, group_size=4))
    agent.learn(16, folder=tmp_path / "run")
    assert Run.read(tmp_path / "run").settings["num_envs"] == 16


@pytest.mark.slow
def test_the_command_keeps_the_best_and_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"num-envs": 4, "episodes-per-update": 4, "minibatch-size": 4, "total-episodes": 400, "eval-every": 1}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    train = ["train", "--output-dir", "run", *words, "--env-kwargs", json.dumps({"max_new_tokens": 3}), "--quiet"]
    cli.main([*train, "--keep-best", "--patience", "2"])
    rows = metrics_of(Path("run"))
    values = [row["eval/score"] - 0.05 * row["eval/kl"] for row in rows]
    best = json.loads(Path("run/best/best.json").read_text())
    assert best["value"] == pytest.approx(max(values))
    assert best["update"] == values.index(max(values)) + 1 == len(rows) - 2 < 98
    assert Path("run/best/agent/agent.json").exists()

    cli.main([*train, "--total-episodes", "4", "--overwrite"])
    assert not list(Path("run/best").rglob("*.json"))
    with pytest.raises(SystemExit, match="--patience needs evaluations"):
        cli.main([*train, "--patience", "2", "--eval-every", "0"])
