"""Runs every example with small settings."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from textgym.data.corpora import sources
from textgym.rewards.models import RewardModel

FOLDER = Path(__file__).parents[1] / "examples"
LIBRARIES = {"tianshou_ppo": "tianshou", "torchrl_ppo": "torchrl", "rllib_ppo": "ray", "sbx_ppo": "sbx"}
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(name: str) -> ModuleType:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def output_of(name: str, capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    module = load(name)
    capsys.readouterr()
    module.main(module.Args(**settings))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_header_names_the_command_and_every_setting_has_a_default(name: str) -> None:
    module = load(name)
    assert f"    python examples/{name}.py" in (module.__doc__ or "")
    assert module.Args() == module.Args()


def test_gym_make(capsys: pytest.CaptureFixture[str]) -> None:
    output = output_of("gym_make", capsys, episodes=2, num_envs=3)
    assert "textgym/Sentiment-v0: Discrete(2048), observations of 72 slots" in output
    assert output.count("  score ") == 2
    assert "episodes in 3 rows: mean score " in output


def test_custom_reward(capsys: pytest.CaptureFixture[str]) -> None:
    output = output_of("custom_reward", capsys, total_episodes=16, num_envs=4, max_new_tokens=4, samples=2)
    assert [line.split()[1] for line in output.splitlines() if line.startswith("episode")] == ["8", "16"]
    assert output.count("  before:") == output.count("  after: ") == 2


def test_custom_reward_counts_words() -> None:
    module = load("custom_reward")
    assert module.word_count([" one two", ""], [2, 5]) == [0.0, -5.0]
    assert module.repeats([[1, 2, 1], [3]]) == [[0.0, 0.0, -1.0], [0.0]]
    logged: list[Any] = []
    full_stop = module.full_stop(["done.", "not", ""], lambda *metric: logged.append(metric))
    assert asyncio.run(full_stop) == [1.0, 0.0, None]
    assert logged == [("empty", pytest.approx(1 / 3))]


@pytest.mark.slow
def test_reward_hacking(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("reward_hacking")
    monkeypatch.setattr(module, "snippet_prompts", lambda split: ["The film", "A story of"])
    settings = {"total_episodes": 48, "num_envs": 8, "eval_prompts": 2, "eval_every": 1, "output_dir": Path("out")}
    module.main(module.Args(kl_coefs=(0.0, 0.5), seeds=(0, 1), **settings))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines[2:5]] == ["| reference", "| beta = 0", "| beta = 0.5"]
    assert all(cell.count("±") == 1 for line in lines[2:5] for cell in line.split("|")[2:-1])
    curves = json.loads((working_folder / "out" / "curves.json").read_text())
    assert [row["episodes"] for row in curves["0.5"][1]] == [0, 16, 32, 48]
    assert curves["0.0"][0][0] == curves["0.5"][0][0], "both begin at the reference"
    assert curves["0.0"][0][-1] != curves["0.5"][0][-1]
    assert (working_folder / "out" / "curves.png").exists()


def test_ppo_sentiment(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"total_episodes": 16, "num_envs": 8, "max_new_tokens": 4, "eval_prompts": 12}
    output = output_of("ppo_sentiment", capsys, output_dir=working_folder / "policy", **settings)
    assert "before" in output
    for figure in ("score", "kl", "reference_ppl", "distinct_2", "length"):
        assert figure in output
    assert "judge" not in output
    assert AutoModelForCausalLM.from_pretrained(working_folder / "policy").config.vocab_size == 2048


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:sampling is filtered:UserWarning")  # MaskablePPO says what its KL is
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "sb3_ppo" else pytest.mark.slow)
        for name in EXAMPLES
        if name.startswith("sb3_") and name != "sb3_mlp"
    ],
)
def test_sb3(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Stock algorithms, each in a file of at most 40 lines."""
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 40
    output = output_of(name, capsys, total_timesteps=48, n_envs=2)
    assert re.search(r"before [+-]\d+\.\d\d, after [+-]\d+\.\d\d", output)
    assert output.count(" >") >= 2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sb3_mlp", {"algorithm": "PPO", "total_timesteps": 128, "num_envs": 4}),
        *(
            pytest.param(name, settings, marks=pytest.mark.slow)
            for name, settings in (
                ("cleanrl_loop", {"total_timesteps": 192, "num_envs": 4}),
                ("tianshou_ppo", {"total_timesteps": 128, "num_envs": 4}),
                ("torchrl_ppo", {"total_timesteps": 256, "num_envs": 4}),
                ("rllib_ppo", {"total_timesteps": 256, "num_envs": 4, "train_batch_size": 256}),
                ("rllib_ppo", {"num_env_runners": 2, "total_timesteps": 256, "num_envs": 2, "train_batch_size": 256}),
                ("sbx_ppo", {"total_timesteps": 128, "num_envs": 4}),
                ("sb3_mlp", {"algorithm": "A2C", "total_timesteps": 128, "num_envs": 4}),
                ("sb3_mlp", {"algorithm": "DQN", "total_timesteps": 1100, "num_envs": 32}),
            )
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_other_libraries(name: str, settings: dict[str, Any]) -> None:
    """Each trains and says what it scored before and after."""
    module = load(name)
    before, after = module.main(module.Args(**settings, eval_episodes=8))
    for played in (before, after):
        assert played.scores.shape == (8,)
        assert (played.returns < played.scores).all(), "the environment pays its half of the KL"


@pytest.mark.parametrize("name", ["cleanrl_loop", "sb3_mlp", *LIBRARIES])
def test_an_example_of_another_library_has_at_most_60_lines(name: str) -> None:
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 60
    assert not any("fmt: skip" in line for line in lines)


def test_train_reward_model(
    working_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On invented ratings, because tests download nothing."""
    rated = [(f"{word} film {i}", rating) for i in range(30) for word, rating in (("good", 3.0), ("bad", -3.0))]
    monkeypatch.setattr(sources, "movie_snippets", lambda: [sources.Snippet(*row) for row in rated])
    folder = working_folder / "reward"
    output = output_of("train_reward_model", capsys, num_snippets=40, num_heldout_pairs=20, output_dir=folder)
    assert "held-out pairwise accuracy: reward model " in output
    assert output.count("This film is ") == 3
    assert len(RewardModel.from_pretrained(folder)(["This film is"], [" good"])) == 1
