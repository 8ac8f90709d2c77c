"""Command lines that name a run: its settings stand before the flags beside it, and its names are not imported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from textgym import cli
from textgym.agents import GRPOConfig, PPOConfig
from textgym.errors import RunFolderError, UntrustedNameError
from textgym.flags import Train
from textgym.saved_flags import expand, flags_of


def run_of(folder: Path, command: Train) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(command), default=str))
    return folder


@pytest.mark.parametrize(
    ("agent", "config"),
    [
        (
            "ppo",
            PPOConfig(
                seed=4, bf16=True, whiten_advantages=False, optimizer_options={"weight_decay": 0.1}, learning_rate=3e-5
            ),
        ),
        ("grpo", GRPOConfig(group_size=4, episodes_per_update=64)),
    ],
)
def test_a_run_is_begun_again_from_its_settings(tmp_path: Path, agent: str, config: Any) -> None:
    command = Train(
        output_dir=tmp_path / "run",
        agent=agent,
        env="textgym/Copy-v0",
        total_episodes=512,
        kl_bounds=(1.0, 3.0),
        env_kwargs='{"length": 4}',
        config=config,
    )
    folder = run_of(tmp_path / "run", command)
    again = cli.parse(["train", "--config", str(folder / "config.json"), "--output-dir", "other", "--num-envs", "8"])
    expected = {**dataclasses.asdict(command), "output_dir": Path("other"), "num_envs": 8}
    assert dataclasses.asdict(again) == expected
    assert type(again.config) is type(config)
    resumed = cli.parse(["resume", str(folder), "--total-episodes", "1024"])
    assert (resumed.resume, resumed.output_dir, resumed.total_episodes) == (True, folder, 1024)
    assert resumed.config == config


def test_a_file_in_yaml_serves_as_well(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("agent: rloo\nseed: 7\nnum_envs: 16\n")
    command = cli.parse(["train", "--config", str(tmp_path / "run.yaml"), "--output-dir", "out"])
    assert (command.agent, command.config.seed, command.num_envs) == ("rloo", 7, 16)


def test_evaluate_and_chat_know_policy_environment_and_reference(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", Train(tmp_path / "run", env="textgym/Copy-v0", model="smollm2", temperature=0.5))
    for name in ("evaluate", "chat"):
        assert cli.parse([name, str(folder)]).temperature == 0.5
        command = cli.parse([name, str(folder), "--seed", "5", "--temperature", "2"])
        assert command.temperature == 2.0
        assert (command.policy, command.env) == (str(folder / "policy"), "textgym/Copy-v0")
        assert (command.reference, command.seed) == ("smollm2", 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"env": "planted:Own-v0"},
        {"env_kwargs": '{"reward": "planted:score"}'},
        {"env_kwargs": '{"reward": ["tiny", {"a": "planted:score"}]}'},
        {"env_kwargs": '{"prompts": "planted:rows"}'},
        {"data": "planted:rows"},
    ],
)
def test_names_in_a_file_are_imported_only_if_trusted(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    for words in (["resume", str(folder)], ["train", "--config", str(folder / "config.json")]):
        with pytest.raises(UntrustedNameError, match="if you trust it, add --trust-names"):
            expand(words)
        assert "planted" in " ".join(expand([*words, "--trust-names"]))


def test_a_file_cannot_ask_for_remote_code(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"trust_remote_code": true, "seed": 1}')
    assert expand(["resume", str(tmp_path)])[1:3] == ["--seed", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resume"], "needs the folder of a run"),
        (["resume", "nowhere"], "nowhere holds no run"),
        (["evaluate", "nowhere"], "nowhere holds no run"),
        (["train", "--config", "nowhere.yaml"], "there is no nowhere.yaml"),
        (["train", "--config", "list.yaml"], "must hold settings by name"),
        (["train", "--config", "torn.json"], "cannot be read"),
        (["train", "--config", "nested.yaml"], "`config` must hold the agent's settings"),
        (["train", "--config", "kwargs.yaml"], "env_kwargs is not JSON"),
    ],
)
def test_what_cannot_be_read_is_said(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "list.yaml": "- 1",
        "torn.json": '{"seed": [',
        "nested.yaml": "config: 3",
        "kwargs.yaml": "env_kwargs: '{'",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RunFolderError, match=message):
        expand(words)


def test_other_command_lines_stay_as_they_are() -> None:
    for words in ([], ["--help"], ["train", "--output-dir", "x"], ["evaluate", "--policy", "x"], ["list", "runs"]):
        assert expand(list(words)) == words


def test_flags_of_every_kind() -> None:
    settings = {"a_b": 1.5, "c": False, "d": None, "e": [1, 2], "f": {"g": 1.5, "h": 2}}
    assert flags_of(settings) == ["--a-b", "1.5", "--no-c", "--d", "None", "--e", "1", "2", "--f", "g", "1.5", "h", "2"]
