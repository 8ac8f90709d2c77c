"""The command line on a machine with GPUs, and without the one that was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textgym import cli
from textgym.commands import train as train_command
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.models.report import PreferenceReport

EPISODES = ["--total-episodes", "8", "--num-envs", "4", "--episodes-per-update", "4", "--minibatch-size", "4"]
SHORT = [*EPISODES, "--num-epochs", "1", "--env-kwargs", '{"max_new_tokens": 3, "prompts": ["The film is", "It was"]}']


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Where policy and environment were when samples were written."""
    seen: list[tuple[str, str]] = []
    real = train_command._write_samples

    def write(policy: Any, envs: Any, *rest: Any) -> Any:
        seen.append((str(policy.device), str(envs.unwrapped.task.device)))
        return real(policy, envs, *rest)

    monkeypatch.setattr(train_command, "_write_samples", write)
    return seen


def train(folder: Path, *flags: str) -> None:
    cli.main(["train", "--output-dir", str(folder), *SHORT, *flags])


def test_training_takes_the_gpu_and_says_so(
    tmp_path: Path, placed: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    assert placed == [("cuda:0", "cuda:0")]
    assert "cuda:0" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.filterwarnings("ignore:.* was saved under other circumstances")
def test_a_run_goes_on_on_either_device(first: str, then: str, tmp_path: Path, placed: list[tuple[str, str]]) -> None:
    train(tmp_path, "--checkpoint-every", "1", "--device", first, "--total-episodes", "8")
    cli.main(["train", "--output-dir", str(tmp_path), *SHORT, "--checkpoint-every", "1", "--resume", "--device", then])
    assert [policy.split(":")[0] for policy, _ in placed] == [first, then]
    assert all(policy == envs for policy, envs in placed)


def test_policies_are_evaluated_on_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: set[str] = set()
    real = ActorCritic.generate

    def generate(self: ActorCritic, *args: Any, **kwargs: Any) -> Any:
        seen.add(str(self.device))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ActorCritic, "generate", generate)
    flags = ["--prompts", "4", "--num-envs", "4", "--samples", "1", "--env-kwargs", '{"max_new_tokens": 3}']
    cli.main(["evaluate", "--policy", "tiny", "--device", "cuda", *flags])
    assert seen == {"cuda:0"}


def test_an_offline_agent_trains_on_the_gpu(tmp_path: Path, placed: list[tuple[str, str]]) -> None:
    row = {"prompt": "The film is", "completion": " good."}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    flags = ["--agent", "sft", "--data", str(tmp_path / "rows.jsonl"), "--batch-size", "4", *SHORT[2:4], *SHORT[-2:]]
    cli.main(["train", "--output-dir", str(tmp_path / "run"), *flags, "--device", "cuda"])
    assert placed == [("cuda:0", "cuda:0")]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_reward_models_train_where_they_are_told_to(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [{"prompt": f"{i}", "chosen": " good.", "rejected": " bad."} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    seen: list[str] = []
    real = PreferenceReport.of

    def report(reward: Any, *rest: Any) -> Any:
        seen.append(reward.device.type)
        return real(reward, *rest)

    monkeypatch.setattr(PreferenceReport, "of", report)
    flags = ["--preferences", str(tmp_path / "pairs.jsonl"), "--num-layers", "1", "--device", device]
    cli.main(["reward-model", "--output-dir", str(tmp_path / "reward"), *flags])
    assert seen == [device]


@pytest.mark.parametrize(("number", "device"), [(0, "cuda"), (1, "cuda:3")])
def test_a_gpu_that_is_not_there_is_one_line(
    number: int, device: str, tmp_path: Path, gpus: Callable[[int], None]
) -> None:
    gpus(number)
    if torch.cuda.device_count() != number:
        pytest.skip("a real machine keeps its GPUs")
    with pytest.raises(SystemExit) as end:
        train(tmp_path, "--device", device)
    message = str(end.value.code)
    assert f"there is no device '{device}'" in message
    assert "\n" not in message


def test_out_of_memory_says_what_to_lower_and_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ActorCritic.evaluate, []

    def evaluated(self: ActorCritic, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ActorCritic, "evaluate", evaluated)
    with pytest.raises(SystemExit) as end:
        train(tmp_path, "--checkpoint-every", "1")
    assert "micro_batch_size" in str(end.value.code) or "micro-batch-size" in str(end.value.code)
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000000", "step-000001"], "the last whole one stays"
