"""Runs that repeat themselves bit for bit, and what checkpoints know of the circumstances that this rests on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

import textgym
from textgym import __main__ as command
from textgym import cli
from textgym.agents import PPO, SFT, PPOConfig, SFTConfig
from textgym.data.manifests import MANIFEST, write_manifest
from textgym.models.actor_critic import ActorCritic
from textgym.models.machine import determinism
from textgym.models.machine.seeding import deterministic
from textgym.testing import byte_tokenizer, mock_lm

VARIABLES = ("OMP_NUM_THREADS", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG")
ROWS = [{"prompt": f"{i} is", "completion": " one"} for i in range(8)]
KILLER = """
import os, signal

calls = 0

def reward(completions):
    global calls
    calls += 1
    if calls == 5 and os.path.exists("kill"):
        os.remove("kill")
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(set(text))) for text in completions]
"""


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Puts back what `deterministic` changes in this process."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn


# --- the environment ---


@pytest.mark.parametrize(("flags", "branch"), [(["sse2", "avx", "avx2"], "AVX2,STRICT"), (["sse2"], "COMPATIBLE")])
def test_the_branch_of_mkl_is_one_that_the_processor_has(
    flags: list[str], branch: str, clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(determinism, "_processor_flags", lambda: flags)
    assert textgym.deterministic_environment(threads=2) == {
        "OMP_NUM_THREADS": "2",
        "MKL_CBWR": branch,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def test_what_the_user_has_set_stays(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    environment = textgym.deterministic_environment()
    assert (environment["MKL_CBWR"], environment["OMP_NUM_THREADS"]) == ("COMPATIBLE", "2")


@pytest.mark.parametrize("branch", ["AUTO", "AVX2", "SSE4_2", ""])
def test_a_branch_of_mkl_that_rounds_by_alignment_is_replaced_or_refused(
    branch: str, clean_environment: None, torch_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = textgym.deterministic_environment()
    for name, value in {**needed, "MKL_CBWR": branch}.items():
        monkeypatch.setenv(name, value)
    assert textgym.deterministic_environment() == needed
    assert determinism.missing_variables() == {"MKL_CBWR": needed["MKL_CBWR"]}
    with pytest.raises(ValueError, match=r"start with MKL_CBWR="):
        deterministic()
    monkeypatch.setenv("MKL_CBWR", "AVX512,STRICT")
    assert determinism.missing_variables() == {}


def test_the_command_sets_the_environment_before_torch_is_imported(
    clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import sys; import textgym.__main__; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"

    seen: list[dict[str, str]] = []
    monkeypatch.setattr(cli, "run", lambda command: seen.append({name: os.environ.get(name, "") for name in VARIABLES}))
    for further in ([], ["--deterministic"]):
        monkeypatch.setattr(sys, "argv", ["textgym", "train", "--output-dir", "run", *further])
        command.main()
    assert seen[0] == dict.fromkeys(VARIABLES, "")
    assert seen[1] == textgym.deterministic_environment()


def test_without_the_environment_a_bit_for_bit_run_is_refused_with_what_to_set(
    clean_environment: None, torch_settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"before.*MKL_CBWR=") as refusal:
        deterministic()
    assert "\n" not in str(refusal.value)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(SystemExit, match="OMP_NUM_THREADS=1"):
        cli.main(["train", "--output-dir", "run", "--deterministic"])


def test_torch_is_told_of_threads_kernels_and_precision(
    clean_environment: None, torch_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision("high")
    for name, value in textgym.deterministic_environment(threads=2).items():
        monkeypatch.setenv(name, value)
    deterministic()
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


# --- kill -9 ---


@pytest.mark.slow
def test_a_killed_run_that_is_resumed_has_the_bytes_of_an_undisturbed_one(
    clean_environment: None, tmp_path: Path
) -> None:
    """By the command itself, which sets what it needs before it imports torch."""
    mock_lm().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "killer.py").write_text(KILLER)
    env = {"prompts": ["one", "two", "three"], "reward": "killer:reward", "max_new_tokens": 4}
    settings = ["--env", "textgym/Text-v0", "--env-kwargs", json.dumps(env), "--model", "model", "--num-envs", "8"]
    settings += ["--total-episodes", "64", "--episodes-per-update", "8", "--minibatch-size", "4"]
    settings += ["--learning-rate", "0.01", "--checkpoint-every", "2", "--deterministic", "--device", "cpu"]

    def train(run: str, *further: str) -> int:
        command = [sys.executable, "-m", "textgym", "train", *settings, "--output-dir", run, *further]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

    assert train("whole") == 0
    (tmp_path / "kill").touch()
    assert train("part") == -signal.SIGKILL
    assert train("part", "--resume") == 0
    for name in ("model.safetensors", "critic.safetensors"):
        whole, part = ((tmp_path / run / "policy" / name).read_bytes() for run in ("whole", "part"))
        assert whole == part, name


# --- what checkpoints know ---


def make_agent(kind: str) -> Any:
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    if kind == "sft":
        return SFT(policy, ROWS, byte_tokenizer(), SFTConfig(batch_size=4))
    return PPO(policy, make_envs(), PPOConfig(episodes_per_update=4, minibatch_size=4))


def make_envs() -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=["one", "two"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [float(len(text)) for text in completions],
        reference=mock_lm(),
        kl_mode="deferred",
        max_new_tokens=3,
    )


def load(kind: str, folder: Path) -> Any:
    return SFT.load(folder, ROWS) if kind == "sft" else PPO.load(folder, make_envs())


def seal(folder: Path) -> None:
    """Let the manifest fit files that were changed."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest["kind"], manifest["made_by"], manifest["config"])


@pytest.mark.parametrize("kind", ["ppo", "sft"])
def test_a_resumed_run_says_once_what_has_changed_since(kind: str, tmp_path: Path) -> None:
    make_agent(kind).save(tmp_path / "agent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(kind, tmp_path / "agent")

    path = tmp_path / "agent" / "agent.json"
    meta = json.loads(path.read_text())
    assert {"torch", "transformers", "textgym", "processor", "threads", "device", "dtype"} < meta["machine"].keys()
    meta["machine"] |= {"torch": "1.0", "processor": "abacus", "MKL_CBWR": "SSE4_2", "deterministic": True}
    path.write_text(json.dumps(meta))
    seal(tmp_path / "agent")
    with pytest.warns(UserWarning, match="only up to rounding") as said:
        load(kind, tmp_path / "agent")
    (warning,) = [str(warning.message) for warning in said]
    for name, was in (("torch", "1.0"), ("processor", "abacus"), ("MKL_CBWR", "SSE4_2"), ("deterministic", "True")):
        assert f"{name} was {was} and is " in warning
    assert "threads was" not in warning


# --- where an agent is loaded ---


@pytest.mark.parametrize("kind", ["ppo", "sft"])
def test_an_agent_saved_on_a_gpu_is_loaded_without_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator's state has 16 bytes, as CUDA's has."""
    make_agent(kind).save(tmp_path / "agent")
    path = tmp_path / "agent" / "agent.json"
    meta = json.loads(path.read_text())
    meta["policy"]["device"] = "cuda:1"
    meta["machine"]["device"] = "cuda:1 (a GPU)"
    path.write_text(json.dumps(meta))
    if kind == "ppo":
        state = torch.load(tmp_path / "agent" / "state.pt", weights_only=True)
        state["generators"][0]["sampler"] = {"kind": "cuda", "state": torch.arange(16, dtype=torch.uint8)}
        torch.save(state, tmp_path / "agent" / "state.pt")
    seal(tmp_path / "agent")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    expected = "other random numbers" if kind == "ppo" else "saved on 'cuda:1' and is loaded on 'cpu'"
    with pytest.warns(UserWarning, match=expected):
        first = load(kind, tmp_path / "agent")
    assert first.policy.device == torch.device("cpu")
    with pytest.raises(ValueError, match="no device 'cuda:1'"):
        type(first).load(tmp_path / "agent", ROWS if kind == "sft" else make_envs(), device="cuda:1")
    if kind == "ppo":
        with pytest.warns(UserWarning, match="other random numbers"):
            second = load(kind, tmp_path / "agent")
        assert torch.equal(first.sampler.get_state(), second.sampler.get_state())
