"""Command lines that name a run: its settings stand before the flags beside it, and its names are not imported."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest

from textgym import cli
from textgym.agents import DPOConfig, GRPOConfig, NLPOConfig, PPOConfig, RLOOConfig, SFTConfig
from textgym.agents.runs.claims import RunClaim
from textgym.agents.runs.run_folder import changed_settings
from textgym.algorithms import CONFIGS
from textgym.commands.hints import further_commands, resume_hint
from textgym.errors import RunFolderError, UntrustedNameError
from textgym.flags import Train
from textgym.saved_flags import expand, flags_of, needs_trust, read_settings


def run_of(folder: Path, settings: Train | dict[str, Any]) -> Path:
    RunClaim(folder).release()
    plain = settings if isinstance(settings, dict) else dataclasses.asdict(settings)
    (folder / "config.json").write_text(json.dumps(plain, default=str))
    return folder


@pytest.mark.parametrize(
    ("agent", "config"),
    [
        (
            "ppo",
            PPOConfig(
                seed=4, bf16=True, whiten_advantages=False, optimizer_options={"momentum": 0.1}, learning_rate=3e-5
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
    folder = run_of(tmp_path / "run", settings)
    assert needs_trust(folder)
    for words in (["resume", str(folder)], ["train", "--config", str(folder / "config.json")]):
        with pytest.raises(UntrustedNameError, match="if you trust it, add --trust-names"):
            expand(words)
        assert "planted" in " ".join(expand([*words, "--trust-names"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trust-remote-code": True}, "'trust-remote-code' is no name of a setting: write it with underscores"),
        ({"config": {"env-kwargs": '{"reward": "planted:score"}'}}, "'env-kwargs' is no name of a setting"),
        ({"env=planted:Own-v0": 1}, "'env=planted:Own-v0' is no name of a setting"),
        ({"kl_bounds": [2, 6, "--env", "planted:Own-v0"]}, "'--env' is a flag, but a file has it as a value of --kl-b"),
        ({"optimizer_options": {"--env": "planted:Own-v0"}}, "'--env' is a flag, but"),
        ({"config": {"optimizer_options": {"eps": "--overwrite"}}}, "'--overwrite' is a flag, but"),
        ({"no_quiet": "--env=planted:Own-v0"}, "'--env=planted:Own-v0' is a flag, but"),
    ],
)
def test_a_file_cannot_hide_a_flag_in_a_name_or_a_value(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", {"kl_coef": -1, **settings})
    mine = tmp_path / "mine.yaml"
    mine.write_text(json.dumps(settings))
    for words in (["resume", str(folder)], ["train", "--config", str(mine)]):
        with pytest.raises(RunFolderError, match=message):
            expand(words)


def test_an_environment_in_a_list_is_not_trusted_either(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", {"env": ["planted:Own-v0"]})
    for command in ("resume", "evaluate"):
        with pytest.raises(UntrustedNameError, match="names the environment"):
            expand([command, str(folder), "--reference", "tiny"])


def test_options_that_had_no_effect_do_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    """Earlier versions accepted them; a file of the user's own is refused, and says which option it is."""
    settings = dataclasses.asdict(CONFIGS["a2c"](estimator="td")) | {"lam": 0.9}
    plain = dataclasses.asdict(Train(tmp_path / "run", agent="a2c")) | {"config": settings}
    folder = run_of(tmp_path / "run", plain)
    file = str(folder / "config.json")
    for words in (["resume", str(folder)], ["train", "--config", file, "--output-dir", "other"]):
        with pytest.warns(UserWarning, match="lam=0.9 cannot be used with estimator='td'.* is left out"):
            command = cli.parse(words)
        assert command.config == CONFIGS["a2c"](estimator="td")
    assert changed_settings(folder, command, ["output_dir", "critic"]) == []
    changed = dataclasses.replace(command, config=dataclasses.replace(command.config, estimator="gae", lam=0.5))
    assert "estimator was 'td' and is 'gae'" in changed_settings(folder, changed, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # other commands need no hyperparameters
        cli.parse(["evaluate", str(folder)])
    mine = tmp_path / "mine.yaml"
    mine.write_text("agent: a2c\nestimator: td\nlam: 0.9\noutput_dir: x\n")
    with pytest.raises(SystemExit, match="2"):
        cli.parse(["train", "--config", str(mine)])


def test_settings_of_one_call_stay_with_it(tmp_path: Path) -> None:
    """Trackers are of the run, and go on with it."""
    call = {"trust_remote_code": True, "overwrite": True, "quiet": True, "profile": True, "resume": True}
    folder = run_of(tmp_path / "run", {**call, "output_dir": "elsewhere", "seed": 1, "log_with": ["wandb", "aim"]})
    flags = ["--seed", "1", "--log-with", "wandb", "aim"]
    assert not needs_trust(folder)
    assert expand(["resume", str(folder)]) == ["train", *flags, "--output-dir", str(folder), "--resume"]
    assert expand(["train", "--config", str(folder / "config.json"), "--seed", "2"]) == ["train", *flags, "--seed", "2"]
    assert cli.parse(["resume", str(folder)]).log_with == ("wandb", "aim")


def test_settings_of_a_run_come_back_as_they_were(tmp_path: Path) -> None:
    settings = {
        "env_kwargs": '{"prompts": ["\N{GRINNING FACE}\u4e2d \\u00e9"]}',
        "model": "\N{GRINNING FACE}",
        "x": 1e-7,
    }
    folder = run_of(tmp_path / "run", settings)
    assert read_settings(folder / "config.json", trusted=False) == settings


def test_a_run_without_trackers_is_resumed_without(tmp_path: Path) -> None:
    command = cli.parse(["resume", str(run_of(tmp_path / "run", Train(tmp_path / "run")))])
    assert (command.log_with, command.total_episodes) == ((), 4096)


@pytest.mark.parametrize("name", ["overwrite", "trust_remote_code"])
def test_a_file_cannot_delete_runs_or_ask_for_remote_code(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"{name}: true\n")
    with pytest.raises(RunFolderError, match=f"asks for {name}, which a file cannot: take it out, and add --"):
        expand(["train", "--config", str(tmp_path / "mine.yaml")])


def test_a_file_of_the_users_own_has_all_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "output_dir: runs/mine\nlog_with: [wandb]\nquiet: true\nprofile: true\nentropy_coef: -1e-05\n"
        "env_kwargs: {max_new_tokens: 8, kl_coef: 1e-3, reward: tiny}\nkl_bounds: [2, 6]\n"
    )
    assert expand(["train", f"--config={file}"]) == expand(["train", "--config", str(file)])
    command = cli.parse(["train", f"--config={file}", "--num-envs", "8"])
    assert (command.output_dir, command.log_with, command.num_envs) == (Path("runs/mine"), ("wandb",), 8)
    assert (command.quiet, command.profile, command.kl_bounds) == (True, True, (2.0, 6.0))
    assert json.loads(command.env_kwargs) == {"max_new_tokens": 8, "kl_coef": 0.001, "reward": "tiny"}
    assert command.config.entropy_coef == -1e-5
    beside = cli.parse(["train", "--no-quiet", "--config", str(file), "--output-dir", "runs/other"])
    assert (beside.quiet, beside.output_dir) == (False, Path("runs/other"))


def test_the_agent_of_the_command_line_beats_that_of_the_file(tmp_path: Path) -> None:
    """What was chosen goes over where the other agent has it; defaults of the file's agent were not chosen."""
    settings = PPOConfig(seed=3, clip_range=0.1, num_epochs=3, critic_learning_rate=1e-3)
    folder = run_of(tmp_path / "run", Train(tmp_path / "run", num_envs=8, critic="separate", config=settings))
    words = ["train", "--config", str(folder / "config.json"), "--output-dir", "out", "--agent"]
    with pytest.warns(UserWarning, match="is for ppo; rloo ignores its critic, critic_learning_rate"):
        command = cli.parse([*words, "rloo"])
    assert (command.agent, command.num_envs, command.critic) == ("rloo", 8, "auto")
    assert command.config == RLOOConfig(seed=3, clip_range=0.1, num_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nlpo = cli.parse([*words, "nlpo"])
    assert (nlpo.critic, nlpo.config) == ("separate", NLPOConfig(**dataclasses.asdict(settings)))


def test_another_agent_has_all_that_a_users_own_file_says(tmp_path: Path) -> None:
    """There a value that is the default of the file's agent was chosen, since somebody wrote it down."""
    file = tmp_path / "mine.yaml"
    chosen = PPOConfig()
    file.write_text(
        f"agent: ppo\nnum_epochs: {chosen.num_epochs}\nlearning_rate: {chosen.learning_rate}\n"
        f"lam: {chosen.lam}\ncritic: auto\noutput_dir: out\n"
    )
    with pytest.warns(UserWarning, match="is for ppo; grpo ignores its lam$"):
        command = cli.parse(["train", "--config", str(file), "--agent", "grpo"])
    assert (command.agent, command.critic) == ("grpo", "auto")
    assert command.config.num_epochs == chosen.num_epochs != GRPOConfig().num_epochs
    assert command.config.learning_rate == chosen.learning_rate


@pytest.mark.slow
@pytest.mark.parametrize(("own", "agent"), list(itertools.permutations(CONFIGS, 2)))
def test_a_file_of_one_agent_serves_all_others(own: str, agent: str, tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", Train(tmp_path / "run", agent=own, config=CONFIGS[own](seed=5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all is by default, so nothing is lost
        command = cli.parse(["train", f"--agent={agent}", f"--config={folder / 'config.json'}", "--output-dir", "out"])
    assert command.config == CONFIGS[agent](seed=5)


def test_the_run_may_stand_behind_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(Path("runs/a"), Train(Path("runs/a")))
    for command in ("resume", "evaluate", "chat"):
        first = expand([command, "runs/a", "--seed", "8", "--deterministic"])
        assert first[-3:] == ["--seed", "8", "--deterministic"]
        for words in (["--seed", "8", "--deterministic", "runs/a"], ["--seed", "8", "runs/a", "--deterministic"]):
            assert expand([command, *words]) == first
    run_of(Path("64"), Train(Path("64")))
    with pytest.raises(RunFolderError, match="unclear which run is meant, 64 or runs/a: put its folder before"):
        expand(["resume", "--total-episodes", "64", "runs/a"])
    assert expand(["resume", "runs/a", "--total-episodes", "64"])[-2:] == ["--total-episodes", "64"]


@pytest.mark.parametrize(
    ("name", "settings", "longer"),
    [
        ('with a space, $HOME and `a quote"', {"env_kwargs": '{"reward": "my:score"}'}, ["total_episodes", 8192]),
        *(
            pytest.param("a", settings, longer, marks=pytest.mark.slow)
            for settings, longer in [
                ({}, ["total_episodes", 8192]),
                ({"agent": "sft", "data": "my:rows", "config": SFTConfig(epochs=1.5)}, ["epochs", 3.0]),
                ({"env": "own:Env-v0", "trust_remote_code": True}, ["total_episodes", 8192]),
                ({"agent": "dpo", "data": "rows.jsonl", "config": DPOConfig(max_steps=10)}, ["max_steps", 20]),
            ]
        ),
    ],
)
def test_commands_that_go_on_from_a_run_work(
    name: str, settings: dict[str, Any], longer: list[Any], tmp_path: Path
) -> None:
    command = Train(tmp_path / name, **settings)
    run_of(command.output_dir, command)
    view, evaluate, chat, resume = (cli.parse(shlex.split(text)[1:]) for text in further_commands(command))
    assert view.runs == (command.output_dir,)
    assert evaluate.policy == chat.policy == str(command.output_dir / "policy")
    assert (resume.output_dir, resume.resume) == (command.output_dir, True)
    assert {**vars(resume.config), **vars(resume)}[longer[0]] == longer[1]
    trusted = command.trust_remote_code
    assert [done.trust_remote_code for done in (evaluate, chat, resume)] == [trusted] * 3
    assert shlex.split(further_commands(command)[3])[:-2] == shlex.split(resume_hint(command))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resume"], "needs the folder of a run"),
        (["resume", "--seed", "3"], "needs the folder of a run"),
        (["resume", "nowhere"], "nowhere is no run folder: it has no run.json"),
        (["evaluate", "nowhere"], "nowhere is no run folder"),
        (["chat", "list.yaml"], "list.yaml is no run folder"),
        (["train", "--config"], "--config needs a file"),
        (["train", "--config", "--seed", "3"], "--config needs a file"),
        (["train", "--config=kwargs.yaml", "--config", "list.yaml"], "--config is given twice"),
        (["train", "--config", "nowhere.yaml"], "there is no nowhere.yaml"),
        (["train", "--config", "list.yaml"], "must hold settings by name"),
        (["train", "--config", "torn.json"], "cannot be read"),
        (["train", "--config", "nested.yaml"], "`config` must hold the agent's settings"),
        (["train", "--config", "numbers.yaml"], "`config` must hold the agent's settings"),
        (["train", "--config", "kwargs.yaml"], "env_kwargs is not JSON"),
        (["train", "--config", "list_kwargs.yaml"], "env_kwargs must hold arguments by name"),
        (["train", "--config", "json_list_kwargs.yaml"], "env_kwargs must hold arguments by name"),
        (["train", "--config", "date_kwargs.yaml"], "env_kwargs is not JSON"),
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
        "numbers.yaml": "config: {3: 4}",
        "kwargs.yaml": "env_kwargs: '{'",
        "list_kwargs.yaml": "env_kwargs: [1]",
        "json_list_kwargs.yaml": "env_kwargs: '[1]'",
        "date_kwargs.yaml": "env_kwargs: {since: 2026-01-01}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RunFolderError, match=message):
        expand(words)


def test_other_command_lines_stay_as_they_are() -> None:
    long = ["evaluate", "--policy", "x", "--env-kwargs", json.dumps({"prompts": ["a"] * 2000})]
    for words in (
        [],
        ["--help"],
        ["train", "--output-dir", "x"],
        ["evaluate", "--policy", "x"],
        ["list", "runs"],
        long,
    ):
        assert expand(list(words)) == words


def test_flags_of_every_kind() -> None:
    settings = {"a_b": 1.5, "c": False, "d": None, "e": [1, 2], "f": {"g": 1.5, "h": 2}}
    assert flags_of(settings) == ["--a-b", "1.5", "--no-c", "--d", "None", "--e", "1", "2", "--f", "g", "1.5", "h", "2"]


def test_a_run_of_a_model_without_a_name_says_what_to_do(tmp_path: Path) -> None:
    """Such runs are begun in Python, with models and data that are objects."""
    folder = run_of(tmp_path / "run", Train(tmp_path / "run", model=""))
    for name in ("evaluate", "chat"):
        with pytest.raises(RunFolderError, match=r"does not name the model that it began from.* add --reference"):
            expand([name, str(folder)])
        assert cli.parse([name, str(folder), "--reference", "smollm2"]).reference == "smollm2"
    with pytest.raises(RunFolderError, match=r"from a model without a name.* resume it there"):
        expand(["resume", str(folder)])
