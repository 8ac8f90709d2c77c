"""The command line: its flags, the run folder it leaves, Ctrl-C, and errors of one line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from textgym import agents, algorithms, cli, flags
from textgym.agents import PPO, PPOConfig
from textgym.agents.runs import chat as chatting
from textgym.agents.runs import evaluate as evaluation
from textgym.agents.runs.checkpoints import Checkpoints
from textgym.agents.runs.claims import RunClaim
from textgym.agents.runs.demo import DemoConfig
from textgym.agents.runs.progress import LiveProgress
from textgym.commands import models
from textgym.commands.models import place_of
from textgym.commands.train import kl_arguments
from textgym.data.corpora.sources import Snippet
from textgym.models import loading
from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import ASSETS, load_tokenizer
from textgym.rewards.kl import AdaptiveKL, ThresholdKL
from textgym.rewards.models import RewardModel, RewardModelConfig
from textgym.testing import byte_tokenizer, mock_seq2seq_lm

REWARDS = """
def text_length(completions):
    return [float(len(text)) for text in completions]

def broken(completions):
    return [float("nan")] * len(completions)
"""
RUN_FILES = {
    *("run.json", "run.lock", "config.json", "metrics.jsonl", "tensorboard"),
    *("checkpoints", "curves.png", "records", "samples.md", "evaluation.json", "policy"),
}
SMALL = ["--total-episodes", "24", "--num-envs", "4", "--episodes-per-update", "8", "--minibatch-size", "8"]


def env_kwargs(**changes: Any) -> list[str]:
    return ["--env-kwargs", json.dumps({"reward": "my_rewards:text_length", "max_new_tokens": 3, **changes})]


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's own, with a file of reward functions beside the run folders."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return tmp_path


def parsed(arguments: str) -> Any:
    return flags.parse(arguments.split())


def error_of(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments])
    assert isinstance(caught.value.code, str), "one line for stderr, and exit code 1"
    assert "\n" not in caught.value.code
    return caught.value.code


# --- flags ---


def test_flags_of_train() -> None:
    command = parsed(
        "train --env textgym/Text-v0 --model smollm2 --total-episodes 10 --output-dir out --seed 3 --critic separate "
        "--kl-coef 0.1 --kl-target 6 --kl-estimator full --temperature 0.7 --bf16 --target-kl 0.02 "
        "--no-whiten-advantages"
    )
    assert isinstance(command, flags.Train)
    assert (command.env, command.model, command.total_episodes) == ("textgym/Text-v0", "smollm2", 10)
    assert (command.output_dir, command.critic, command.temperature) == (Path("out"), "separate", 0.7)
    assert (command.kl_coef, command.kl_target, command.kl_estimator) == (0.1, 6.0, "full")
    assert command.config == PPOConfig(seed=3, bf16=True, target_kl=0.02, whiten_advantages=False)


@pytest.mark.parametrize(
    ("line", "critic", "rate"),
    [
        ("--agent ppo --learning-rate 0.5", "separate", 1.5),
        ("--agent a2c --learning-rate 0.5 --critic-learning-rate 0.25", "separate", 0.25),
        ("--agent reinforce --baseline learned --learning-rate 0.5", "separate", 1.5),
        ("--agent reinforce", "shared", None),  # its baseline is the mean of the others
        ("--agent ppo --critic shared", "shared", None),
        ("--agent ppo --critic separate", "separate", None),
        ("--agent grpo", "shared", None),
        ("--agent dqn", "shared", None),
        ("--agent sft --data rows.jsonl", "shared", None),
    ],
)
def test_agents_that_learn_values_have_a_separate_critic_by_default(line: str, critic: str, rate: float | None) -> None:
    command = flags.with_critic(parsed(f"train --output-dir out {line}"))
    assert command.critic == critic
    assert getattr(command.config, "critic_learning_rate", None) == rate
    assert flags.with_critic(command) == command


def test_flags_of_the_others() -> None:
    reward = parsed("reward-model --output-dir out --model tiny --epochs 1 --seed 2")
    assert reward == flags.TrainReward(Path("out"), settings=RewardModelConfig(epochs=1.0, seed=2))
    evaluate = parsed("evaluate --policy out/policy --prompts 8 --seed 1")
    assert evaluate == flags.Evaluate("out/policy", prompts=8, seed=1)
    demo = parsed("demo --output-dir out --seed 4")
    assert isinstance(demo, DemoConfig)
    assert (demo.output_dir, demo.ppo.seed, demo.reward_model.seed) == (Path("out"), 4, 4)


@pytest.mark.parametrize("name", algorithms.CONFIGS)
def test_each_agent_has_its_own_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = algorithms.CONFIGS[name]
    command = parsed(f"train --agent {name} --output-dir out --learning-rate 0.5")
    assert command.agent == name
    assert command.config == config(learning_rate=0.5)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", f"--agent={name}", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in shown for field in dataclasses.fields(config))


def test_all_agents_can_be_named() -> None:
    names = get_args(get_type_hints(flags.Train)["agent"])
    assert set(names) == {*algorithms.AGENTS, *algorithms.OFFLINE}
    named = {name for name in agents.__all__ if f"{name}Config" in agents.__all__}
    assert set(algorithms.ALGORITHMS.values()) == named


def test_unknown_agents_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--agent", "sarsa", "--output-dir", "out"])
    assert "sarsa" in capsys.readouterr().err


def test_flags_that_steer_the_kl() -> None:
    command = parsed("train --output-dir out --kl-bounds 2 6 --kl-coef 0.3 --kl-clamp 5")
    arguments = kl_arguments(command)
    assert arguments["kl_coef"] == ThresholdKL(2.0, 6.0, coef=0.3)
    assert arguments["kl_clamp"] == 5.0
    assert kl_arguments(parsed("train --output-dir out --kl-target 6"))["kl_coef"] == AdaptiveKL(6.0, coef=0.1)
    with pytest.raises(ValueError, match="both steer beta"):
        kl_arguments(parsed("train --output-dir out --kl-bounds 2 6 --kl-target 6"))


def test_every_field_of_ppo_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(PPOConfig):
        assert f"--{field.name.replace('_', '-')}" in shown


# --- train and evaluate ---


def test_train_leaves_a_run_folder_and_evaluate_reads_it(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["train", "--output-dir", "run", *SMALL, *env_kwargs(), "--learning-rate", "1e-3"])
    run = working_folder / "run"
    assert {path.name for path in run.iterdir()} == RUN_FILES
    assert json.loads((run / "config.json").read_text())["config"]["learning_rate"] == 1e-3
    assert [json.loads(line)["episodes"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [8, 16, 24]
    assert len((run / "samples.md").read_text().splitlines()) == 2 + 64

    policy, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "policy", ASSETS / "tiny"))
    assert not torch.equal(policy.get_output_embeddings().weight, start.get_output_embeddings().weight.float())
    assert AutoTokenizer.from_pretrained(run / "policy").eos_token_id == policy.config.eos_token_id

    capsys.readouterr()
    cli.main(["evaluate", "--policy", "run/policy", "--prompts", "5", "--samples", "1", *env_kwargs()])
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    figures = {line[0]: line[1:] for line in lines if len(line) == 3}
    assert {"score", "kl", "judge", "reference_ppl", "distinct_2", "length"} <= set(figures)
    assert float(figures["kl"][0]) == pytest.approx(0.0, abs=1e-3), "the reference to itself"
    assert lines[-1][:5] == ["The", "first", "half", "hour", "of"]


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["ppo", pytest.param("sft", marks=pytest.mark.slow)])
def test_encoder_decoder_models_are_trained_and_evaluated(
    agent: str, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mock_seq2seq_lm().save_pretrained("t5")
    byte_tokenizer().save_pretrained("t5")
    rows = [{"prompt": f"{i} is", "completion": " one"} for i in range(12)]
    (working_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"ppo": SMALL, "sft": ["--data", "rows.jsonl", "--batch-size", "4", "--num-envs", "4"]}[agent]
    env = env_kwargs(prompts=["one", "two"])
    cli.main(["train", "--agent", agent, "--model", "t5", "--output-dir", "run", *own, *env])
    assert len((working_folder / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    policy, start = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in ("run/policy", "t5"))
    assert not torch.equal(policy.get_output_embeddings().weight, start.get_output_embeddings().weight)
    capsys.readouterr()
    cli.main(["evaluate", "--policy", "run/policy", "--reference", "t5", "--prompts", "2", "--samples", "1", *env])
    assert "score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("agent", "answers", "metric"),
    [
        ("sft", {"completion": " a joy."}, "entropy"),
        pytest.param(
            *("dpo", {"chosen": " a joy.", "rejected": " a bore."}, "rewards/margins"), marks=pytest.mark.slow
        ),
    ],
)
def test_offline_agents_leave_the_same_run_folder(
    agent: str, answers: dict[str, str], metric: str, working_folder: Path
) -> None:
    rows = [{"prompt": f"Film {i} is", **answers} for i in range(20)]
    (working_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--batch-size", "8", "--learning-rate", "1e-3", "--num-envs", "4"]
    cli.main(["train", "--agent", agent, "--data", "rows.jsonl", "--output-dir", "run", *flags, *env_kwargs()])
    run = working_folder / "run"
    assert {path.name for path in run.iterdir()} == RUN_FILES - {"records"}
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["updates"] for row in history] == [1, 2, 3]
    # Over 6 seeds the loss of SFT falls by 2.63 +- 0.03 and that of DPO by 0.6925 +- 0.0001.
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert metric in history[0]
    assert len((run / "samples.md").read_text().splitlines()) == 2 + 64
    policy, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "policy", ASSETS / "tiny"))
    assert not torch.equal(policy.get_output_embeddings().weight, start.get_output_embeddings().weight.float())


# --- devices ---


COMMANDS = {
    "train": ["train", "--output-dir", "run"],
    "evaluate": ["evaluate", "--policy", "tiny"],
    "reward-model": ["reward-model", "--output-dir", "run"],
    "demo": ["demo", "--output-dir", "run"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_device_that_is_not_there_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert error_of(*COMMANDS[name], "--device", "cuda").startswith("textgym: there is no device 'cuda': ")
    assert error_of(*COMMANDS[name], "--device", "gpu").startswith("textgym: unknown device 'gpu': ")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_a_gpu_where_there_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both GPUs are made up, so the first thing that is put on one of them fails; it is the chosen one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"made up, number {device.index}")
    chosen: list[torch.device] = []

    def set_device(device: torch.device) -> None:
        chosen.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    for further, index in (([], 1), (["--device", "cuda:0"], 0)):
        with pytest.raises(SystemExit):
            cli.main([*COMMANDS[name], *further])
        assert chosen.pop() == torch.device("cuda", index)
    assert "cuda:3" in error_of(*COMMANDS[name], "--device", "cuda:3")


def test_the_first_line_says_where_it_computes(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["evaluate", "--policy", "tiny", "--prompts", "1", "--num-envs", "1", "--device", "cpu", *env_kwargs()])
    assert capsys.readouterr().out.splitlines()[0] == "device: cpu"


def test_a_device_among_the_arguments_of_the_environment_is_refused_with_what_to_use() -> None:
    for command in (["train", "--output-dir", "run", *SMALL], ["evaluate", "--policy", "tiny"]):
        assert "give --device cuda" in error_of(*command, *env_kwargs(device="cuda"))


def test_a_launcher_has_given_each_process_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "device", lambda: torch.device("cpu"))
    assert place_of(parsed("train --output-dir out")) == torch.device("cpu")
    with pytest.raises(ValueError, match="the launcher gives this process cpu, and --device asks for cuda"):
        place_of(parsed("train --output-dir out --device cuda"))


def test_evaluate_and_chat_load_each_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, from which completions are sampled as well, is that of the environment."""
    ActorCritic.from_pretrained("tiny").save_pretrained("start", load_tokenizer("tiny"))
    loaded: list[str] = []
    load = loading._load

    def counted(auto_class: Any, name: Any, *arguments: Any, **settings: Any) -> Any:
        loaded.append(str(name))
        return load(auto_class, name, *arguments, **settings)

    monkeypatch.setattr(loading, "_load", counted)
    monkeypatch.setattr(sys, "stdin", ["The film"])
    models = ["--policy", "tiny", "--reference", "start", *env_kwargs()]
    for words in (["evaluate", "--prompts", "1", "--num-envs", "1"], ["chat"]):
        loaded.clear()
        cli.main([*words, *models])
        assert sorted(loaded) == ["start", "tiny"]


def test_evaluate_shows_brackets_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are text, not markup of the terminal's: `[/x]` would be an error, `[x]` would vanish."""
    generate = evaluation.generate

    def with_brackets(*arguments: Any, **settings: Any) -> Any:
        samples = generate(*arguments, **settings)
        samples.transcripts[0]["completion"] = " a [b] c [/b]"
        return samples

    monkeypatch.setattr(evaluation, "generate", with_brackets)
    cli.main(["evaluate", "--policy", "tiny", "--prompts", "1", "--num-envs", "1", *env_kwargs()])
    assert "a [b] c [/b]" in capsys.readouterr().out


def test_ctrl_c_keeps_metrics_policy_and_curves(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: LiveProgress, agent: Any, metrics: dict[str, float]) -> None:
        if agent.updates == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(LiveProgress, "__call__", interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--output-dir", "run", *SMALL, *env_kwargs()])
    assert caught.value.code == 130
    run = working_folder / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "curves.png").stat().st_size > 0
    assert AutoModelForCausalLM.from_pretrained(run / "policy").config.vocab_size == 2048
    assert not list(run.rglob(".*")), "nothing half-written"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_update_with_a_checkpoint(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    real = PPO.update

    def update(self: PPO, *arguments: Any) -> Any:
        if self.updates == 1:
            os.kill(os.getpid(), number)
        return real(self, *arguments)

    monkeypatch.setattr(PPO, "update", update)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--output-dir", "run", *SMALL, *env_kwargs()])
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert len((working_folder / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert Checkpoints("run/checkpoints").newest() == Path("run/checkpoints/step-000002")
    shown = " ".join(capsys.readouterr().out.split())
    assert "stopped after update 2: `textgym resume run --trust-names` goes on" in shown
    monkeypatch.undo()
    monkeypatch.chdir(working_folder)
    cli.main(["train", "--output-dir", "run", *SMALL, *env_kwargs(), "--resume"])
    assert len((working_folder / "run" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_number_that_is_not_finite_ends_the_run_and_the_last_good_checkpoint_stays(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PPO.loss

    def loss(self: PPO, *arguments: Any) -> Any:
        value, metrics = real(self, *arguments)
        return (value * float("nan") if self.updates == 1 else value), metrics

    monkeypatch.setattr(PPO, "loss", loss)
    message = error_of("train", "--output-dir", "run", *SMALL, "--checkpoint-every", "1", *env_kwargs())
    assert "loss" in message
    newest = Checkpoints("run/checkpoints").newest_whole()
    assert newest == Path("run/checkpoints/step-000001")
    weights = load_file(newest / "policy" / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_a_second_ctrl_c_ends_the_run_at_once(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(self: PPO, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr(PPO, "update", update)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--output-dir", "run", *SMALL, *env_kwargs()])
    assert caught.value.code == 130
    assert Checkpoints("run/checkpoints").newest() == Path("run/checkpoints/step-000000"), "written before any update"


@pytest.mark.slow
def test_files_and_runs_of_others_are_not_touched(working_folder: Path) -> None:
    train = ["train", *SMALL, *env_kwargs(), "--output-dir"]
    (working_folder / "thesis").mkdir()
    (working_folder / "thesis" / "samples.md").write_text("mine")
    for further in ([], ["--overwrite"], ["--resume"]):
        assert "thesis has files and no run.json" in error_of(*train, "thesis", *further)
    assert [path.name for path in (working_folder / "thesis").iterdir()] == ["samples.md"]
    cli.main([*train, "run"])
    (working_folder / "run" / "notes.txt").write_text("mine")
    (working_folder / "run" / "policy" / "notes.txt").write_text("mine")
    assert "run holds a run already: go on with it (--resume), delete it" in error_of(*train, "run")
    metrics = (working_folder / "run" / "metrics.jsonl").read_text()
    assert "colour" in error_of(*train, "run", "--overwrite", *env_kwargs(colour=1))
    assert (working_folder / "run" / "metrics.jsonl").read_text() == metrics, "a mistake in the command deletes nothing"
    cli.main([*train, "run", "--overwrite"])
    assert (working_folder / "run" / "metrics.jsonl").read_text() != metrics, "times differ"
    assert (working_folder / "run" / "notes.txt").read_text() == "mine"
    assert (working_folder / "run" / "policy" / "notes.txt").read_text() == "mine"


def test_a_reward_model_does_not_replace_files_of_others(working_folder: Path) -> None:
    (working_folder / "thesis").mkdir()
    (working_folder / "thesis" / "chapter.tex").write_text("mine")
    assert "thesis has files that textgym did not write" in error_of("reward-model", "--output-dir", "thesis")
    assert "did not write" in error_of("reward-model", "--output-dir", "thesis", "--overwrite")


def test_modules_beside_the_user_hide_no_installed_ones(working_folder: Path) -> None:
    (working_folder / "textwrap.py").write_text("raise RuntimeError")
    error_of("evaluate", "--policy", "no/such-model")
    assert sys.path[0] != str(working_folder)


def test_ctrl_c_before_the_first_update(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("textgym.agents.common.rollout_agent.collect", interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--output-dir", "run", *SMALL, *env_kwargs()])
    assert caught.value.code == 130
    assert (working_folder / "run" / "policy" / "model.safetensors").exists()


def test_reward_model_is_trained_and_saved(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippets = [Snippet(f"{word} film {i}", rating) for i in range(30) for word, rating in (("good", 3), ("bad", -3))]
    assert {snippet.split for snippet in snippets} == {"train", "policy", "test"}
    monkeypatch.setattr("textgym.commands.reward_model.movie_snippets", lambda: snippets)
    cli.main(["reward-model", "--output-dir", "reward", "--epochs", "3"])
    assert "held-out pairwise accuracy: reward model " in capsys.readouterr().out
    model = RewardModel.from_pretrained(working_folder / "reward")
    good, bad = model(["", ""], ["good film", "bad film"])
    assert good > bad  # over 6 seeds the least of all good scores is 1.97 +- 0.02 above the greatest of all bad ones
    report = json.loads((working_folder / "reward" / "report.json").read_text())
    assert report["accuracy"] == 1.0
    assert report["by_margin"][0]["mean"] == 6.0
    assert (working_folder / "reward" / "report.png").exists()


@pytest.mark.slow
def test_reward_model_is_trained_on_a_file_of_preferences(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": f"Film {i} is", "chosen": " a joy.", "rejected": " a bore."} for i in range(20)]
    (working_folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    cli.main(["reward-model", "--output-dir", "reward", "--preferences", "pairs.jsonl"])
    out = capsys.readouterr().out
    assert "held-out pairwise accuracy: reward model 1.000" in out
    assert "lexicon" not in out
    assert json.loads((working_folder / "reward" / "report.json").read_text())["by_confidence"][0]["count"] <= 2
    model = RewardModel.from_pretrained(working_folder / "reward")
    assert model(["Film 3 is"] * 2, [" a joy.", " a bore."])[0] > 0


def test_evaluate_reports_further_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["textgym.rewards.functions:DistinctN", "textgym.rewards.functions:completion_length"]
    cli.main(["evaluate", "--policy", "tiny", "--prompts", "2", "--num-envs", "2", "--metrics", *names, *env_kwargs()])
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    figures = {line[0]: line[1:] for line in lines if len(line) == 3}
    assert figures["completion_length"] == figures["length"]
    assert 0 < float(figures["DistinctN"][0]) <= 1


def test_evaluate_and_chat_sample_as_the_run_did(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The policy is its own reference here, so a KL of 0 says that both have one temperature."""
    run = working_folder / "run"
    RunClaim(run).release()
    (run / "config.json").write_text('{"model": "tiny", "temperature": 0.25}')
    ActorCritic.from_pretrained("tiny").save_pretrained(run / "policy", AutoTokenizer.from_pretrained(ASSETS / "tiny"))
    generate, temperatures = evaluation.generate, []

    def seen(policy: ActorCritic, *arguments: Any, **settings: Any) -> Any:
        temperatures.append(policy.temperature)
        return generate(policy, *arguments, **settings)

    monkeypatch.setattr(evaluation, "generate", seen)
    monkeypatch.setattr(chatting, "generate", seen)
    monkeypatch.setattr(sys, "stdin", ["A film\n"])
    small = ["--prompts", "2", "--num-envs", "2", "--samples", "0"]
    cli.main(["evaluate", "run", *small, *env_kwargs()])
    cli.main(["chat", "run", *env_kwargs()])
    assert temperatures == [0.25, 0.25, 0.25]
    shown = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in shown.splitlines()]
    assert [row for row in rows if row[:1] == ["kl"]] == [["kl", "0.000", "0.000"]]
    assert "KL 0.00 nats" in shown


def test_evaluate_prints_the_metrics_of_a_task_with_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["evaluate", "--env", "textgym/Copy-v0", "--policy", "tiny", "--prompts", "3", "--num-envs", "3"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "exact_match" in line]
    assert line.count("0.000 [0.000, 0.000]") == 2, "one for the reference, one for the policy"


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such-model"], "textgym: cannot load a model called 'no/such-model': use 'tiny', 'smollm2'"),
        (["--env", "textgym/Nope-v0"], "textgym: Environment `Nope` doesn't exist"),
        (
            ["--env", "textgym/Text-v0"],
            "missing 1 required positional argument: 'prompts'. Its further",
        ),
        (["--env-kwargs", "{"], "textgym: --env-kwargs is not JSON: "),
        (["--env-kwargs", "[1]"], "textgym: --env-kwargs must be a JSON object of arguments, got [1]"),
        (env_kwargs(colour=1), "got an unexpected keyword argument 'colour'"),
        (env_kwargs(num_envs=1), "got multiple values for argument 'num_envs'"),
        (env_kwargs(kl_mode="reference"), "make the environment without kl_mode, or with kl_mode='deferred'"),
        (env_kwargs(max_new_tokens=0), "textgym: max_new_tokens must be at least 1, got 0"),
        (env_kwargs(reward="my_rewards:nothing"), "'my_rewards' has no 'nothing'. It has: broken, text_length"),
        (env_kwargs(prompts="no.jsonl"), "there is no file 'no.jsonl' with prompts"),
        (
            ["--agent", "grpo", "--group-size", "3"],
            "=8 must consist of whole groups of group_size=3",
        ),
        (["--output-dir", "my_rewards.py"], "my_rewards.py"),
        (["--data", "rows.jsonl"], "--agent ppo learns from episodes and does not read --data"),
    ],
)
def test_errors_of_the_users_making_are_one_line(arguments: list[str], message: str, working_folder: Path) -> None:
    assert message in error_of("train", "--output-dir", "run", *SMALL, *env_kwargs(), *arguments)
    assert not (working_folder / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft"], "give --data FILE.jsonl, with 'prompt' and 'completion' a line"),
        (["dpo"], "give --data FILE.jsonl, with 'prompt', 'chosen' and 'rejected' a line"),
        (["dpo", "--data", "no.jsonl", "--kl-coef", "0.7"], "DPO's beta is --beta"),
        (["sft", "--data", "no.jsonl"], "there is no file 'no.jsonl' with examples"),
        (["dpo", "--data", "no.jsonl"], "there is no file 'no.jsonl' with preferences"),
    ],
)
def test_offline_agents_say_what_data_they_lack(arguments: list[str], message: str, working_folder: Path) -> None:
    assert message in error_of("train", "--output-dir", "run", "--num-envs", "4", *env_kwargs(), "--agent", *arguments)
    assert not (working_folder / "run").exists()


def test_a_reward_that_breaks_while_training(working_folder: Path) -> None:
    line = error_of("train", "--output-dir", "run", *SMALL, *env_kwargs(reward="my_rewards:broken"))
    assert line.startswith("textgym: reward function 'broken' returned nan, not a finite number, for row 0 (prompt '")
    assert (working_folder / "run" / "policy" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--output-dir", "run", "--temperature", "0"], "temperature must be above 0, got 0.0"),
        (["train", "--output-dir", "run", "--gamma", "2"], "gamma must be from 0 to 1, got 2.0"),
        (["evaluate", "--policy", "tiny", "--prompts", "0"], "prompts must be at least 1, got 0"),
    ],
)
def test_settings_out_of_their_range_are_errors_of_usage(
    arguments: list[str], message: str, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (working_folder / "run").exists()


@pytest.mark.slow
def test_total_episodes_64_plays_64(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An update has 128 by default; a run that is made longer plays the difference."""
    cli.main(["train", "--total-episodes", "64", "--output-dir", "run", *env_kwargs()])
    assert "64 episodes: 1 update(s) of 64 episodes" in capsys.readouterr().out
    cli.main(["resume", "run", "--total-episodes", "80", "--trust-names"])
    history = [json.loads(line) for line in (working_folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["episodes"] for row in history] == [64, 80]
    assert all(row["lr"] > 0 for row in history)
    assert all("eval/score" in row for row in history)


@pytest.mark.slow
def test_the_installed_command(working_folder: Path) -> None:
    """In a process of its own: where it computes, exit code 1, what it loads and one error on stderr, no traceback."""
    command = [str(Path(sys.executable).with_name("textgym")), "train", "--output-dir", "run", "--env-kwargs", "{"]
    result = subprocess.run(command, cwd=working_folder, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.fullmatch(r"device: .+\n", result.stdout)
    loading, line = result.stderr.splitlines()
    assert loading == "textgym: loading torch and transformers"
    assert line.startswith("textgym: --env-kwargs is not JSON")


@pytest.mark.slow
def test_a_run_is_resumed_longer_listed_evaluated_and_talked_to(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["train", "--output-dir", "run", *SMALL, *env_kwargs(), "--eval-every", "1"])
    shown = capsys.readouterr().out
    for title in (
        "policy:",
        "critic:",
        "reference:",
        "reward:",
        "prompts:",
        "responses:",
        "training:",
        "seed:",
        "folder:",
    ):
        assert f"\n{title}" in shown
    assert "difference" in shown
    assert "textgym resume run" in shown
    assert "loading a folder runs no code" in error_of("resume", "run", "--total-episodes", "40")
    cli.main(["resume", "run", "--total-episodes", "40", "--trust-names"])
    metrics = [json.loads(line) for line in (working_folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["episodes"] for row in metrics] == [8, 16, 24, 32, 40]
    assert all("eval/score" in row for row in metrics)
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", ["A film\n"])
    for words in (["list", "."], ["evaluate", "run", "--trust-names"], ["chat", "run", "--trust-names"]):
        cli.main(words)
    shown = capsys.readouterr().out
    assert "finished" in shown
    assert "[score +" in shown
