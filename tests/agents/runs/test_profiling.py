"""The profile of a run: phases that add up, operations that agree with a count by hand, and a run left as it was."""

from __future__ import annotations

import gzip
import io
import json
import timeit
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from textgym import cli
from textgym.agents import DQN, PPO, DQNConfig, PPOConfig
from textgym.agents.machine.memory_by_role import SavedForBackward, bytes_by_role
from textgym.agents.runs.profiling import PHASES, TIMED, UPDATES, PhaseFigures, Profile, Profiler
from textgym.models.actor_critic import ActorCritic
from textgym.models.machine import profiled_phases as phases
from textgym.models.machine.profiled_phases import phase
from textgym.testing import assert_trained_alike, byte_tokenizer, mock_lm

ROWS, PROMPT, TOKENS = 4, 3, 5
HIDDEN, LAYERS, VOCABULARY = 32, 2, 258


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def make_envs(**changes: Any) -> Any:
    settings: dict[str, Any] = {"reference": mock_lm(), "min_new_tokens": TOKENS, "max_new_tokens": TOKENS, **changes}
    prompts = ["one", "two", "six", "ten"]  # of PROMPT tokens
    arguments = {"prompts": prompts, "tokenizer": byte_tokenizer(), "reward": length, "kl_mode": "deferred"}
    return gym.make_vec("textgym/Text-v0", num_envs=ROWS, **arguments, **settings)


def make_agent(critic: str = "separate", **settings: Any) -> PPO:
    config = PPOConfig(episodes_per_update=ROWS, minibatch_size=ROWS, num_epochs=1, **settings)
    return PPO(ActorCritic.from_pretrained(mock_lm(), critic=critic), make_envs(), config)


def profiled(agent: Any, folder: Path, updates: int = UPDATES) -> Profiler:
    total = updates * agent.config.episodes_per_update
    profiler = Profiler(folder, agent, total)
    agent.learn(total, [profiler])
    return profiler


def layer_weights() -> int:
    """Multiplications of one token with the matrices of all layers."""
    return LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 2 * HIDDEN)


class Operations(TorchDispatchMode):
    """A clock that no other process disturbs: each of torch's operations takes a second, and so does a look."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.now += 1
        return func(*args, **(kwargs or {}))

    def look(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operations]:
    with Operations() as clock:
        monkeypatch.setattr("textgym.agents.runs.profiling.time", SimpleNamespace(perf_counter=clock.look))
        yield clock


@pytest.mark.slow
def test_phases_sum_to_the_whole_time(tmp_path: Path, clock: Operations) -> None:
    agent = make_agent()
    profiler = Profiler(tmp_path, agent, UPDATES * ROWS)
    moments: list[float] = []
    agent.learn(UPDATES * ROWS, [lambda *_: moments.append(clock.look()), profiler])
    assert profiler.profile is not None
    figures = profiler.profile.phases
    assert list(figures) == [*PHASES, "other"]
    assert profiler.profile.seconds == pytest.approx((moments[TIMED] - moments[0]) / TIMED)
    assert sum(x.share for x in figures.values()) == pytest.approx(1.0)
    assert all(x.seconds > 0 for x in figures.values())
    assert figures["other"].share < 0.2
    assert profiler.profile.tokens == ROWS * TOKENS


def test_operations_agree_with_a_count_by_hand(tmp_path: Path) -> None:
    profiler = profiled(make_agent(), tmp_path)
    figures = profiler.profile.phases
    read = ROWS * (PROMPT + TOKENS - 1)  # tokens that go through the layers; nothing is predicted from the last one
    layers = 2 * read * layer_weights()
    head = 2 * ROWS * TOKENS * VOCABULARY * HIDDEN
    rotary = 2 * read * HIDDEN // 4  # transformers 5.17 multiplies matrices for the angles of half of each of two heads
    # Keys and values times queries: the prompt all with all, then each token with itself and those before it.
    seen = ROWS * (PROMPT * PROMPT + sum(range(PROMPT + 1, PROMPT + TOKENS)))
    assert figures["decode"].flops - (layers + head + LAYERS * 4 * seen * HIDDEN) in (0, rotary)
    attention = LAYERS * 4 * ROWS * (PROMPT + TOKENS - 1) ** 2 * HIDDEN  # in one pass all with all
    assert figures["reference"].flops - (layers + head + attention) in (0, rotary)
    assert figures["critic"].flops - (layers + attention + 2 * ROWS * TOKENS * HIDDEN) in (0, rotary)
    trunks, values = 2 * (layers + attention), 2 * ROWS * TOKENS * HIDDEN
    assert 3 * (trunks + head) * 0.9 < figures["update"].flops < 3.5 * (trunks + head + values)
    assert figures["environment"].flops == figures["reward"].flops == 0
    profiler.timer.seconds = {"decode": 1.0, "other": 1.0}  # the others took no time that a clock could see
    untimed = profiler._summary().phases["update"]
    assert (untimed.tokens_per_second, untimed.utilisation) == (0.0, 0.0)


def test_memory_by_role_is_that_of_the_tensors(tmp_path: Path) -> None:
    agent = make_agent()
    memory = profiled(agent, tmp_path).profile.memory
    size = 4 * sum(weight.numel() for weight in agent.policy.lm.parameters())
    trunk = 4 * sum(w.numel() for m in (agent.policy.critic, agent.policy.value_head) for w in m.parameters())
    slots = agent.envs.single_observation_space["input_ids"].shape[0]
    assert memory["key-value caches"] == 4 * LAYERS * 2 * ROWS * slots * HIDDEN
    buffers = {role: memory[role] - weights for role, weights in (("policy", size), ("critic", trunk))}
    assert all(0 <= left < 1000 for left in buffers.values())  # frequencies of rotary positions
    assert memory["reference"] == memory["policy"]
    assert memory["gradients"] == size + trunk
    assert memory["optimiser"] == pytest.approx(2 * (size + trunk), rel=0.01)
    assert memory["activations"] > 4 * ROWS * TOKENS * VOCABULARY
    assert memory["reward model"] == memory["other models"] == 0


def test_shared_weights_count_once() -> None:
    agent = make_agent(critic="shared")
    agent.penalty.reference = agent.policy.reference()
    agent.penalty.reference.lm = agent.policy.lm
    roles = bytes_by_role(agent)
    scale = sum(buffer.nbytes for buffer in agent.policy.value_head.buffers())
    assert roles["reference"] == 0
    assert roles["critic"] == 4 * (HIDDEN + 1) + scale


def test_activations_are_what_waits_for_the_backward_pass() -> None:
    weight, x = torch.ones(10, 10, requires_grad=True), torch.ones(7, 10)
    count = SavedForBackward([weight])
    with count:
        y = (x @ weight).exp()  # keeps x, weight and its own result
        assert count.bytes == 4 * (70 + 70)
        y.sum().backward()
        assert count.bytes == 0
        (x @ weight).sum().backward()
    assert count.peak == 4 * (70 + 70)
    again = SavedForBackward([weight])
    with again:
        (x @ weight).square().sum().backward()
    twice = SavedForBackward([weight])
    with twice:
        y = x @ weight
        (y * y).sum().backward()  # two nodes' worth of one tensor
    assert twice.peak == again.peak == 4 * (70 + 70)


@pytest.mark.slow
def test_files_are_written(tmp_path: Path) -> None:
    profiled(make_agent(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json", "profile.md", "trace.json.gz"]
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name for name in named if name in PHASES} == set(PHASES)
    assert any(event["name"] == "aten::mm" for event in events)
    figures = json.loads((tmp_path / "profile.json").read_text())
    text = (tmp_path / "profile.md").read_text()
    assert all(f"| {name} |" in text for name in (*figures["phases"], *figures["memory"], "all"))
    assert "products of 1024 x 1024 matrices" in text


def test_narrow_terminals_cut_no_figure() -> None:
    large = PhaseFigures(1234.567, 0.999, 1234567.0, 987654.321e9, 0.876, 765432 * 2**20)
    phases = dict.fromkeys((*PHASES, "other"), large)
    profile = Profile("cpu", 3, 64, {"float32": 5e10}, "a test", phases, {"key-value caches": 2**40})
    console = Console(width=80, file=io.StringIO())
    console.print(*profile.tables())
    shown = console.file.getvalue().split()
    for text in (*PHASES, "other", "1234.567", "99.9%", "1,234,567", "987654.321", "87.6%", "765,432", "1,048,576.00"):
        assert text in shown
    assert "…" not in shown


@pytest.mark.slow
def test_the_trace_does_not_grow_with_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textgym.agents.runs.profiling.TRACED_CALLS", 2)
    profiled(make_agent(), tmp_path)
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        named = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert named.count("decode") == 2
    assert named.count("update") == 1


@pytest.mark.slow
def test_a_profiled_run_learns_the_same(tmp_path: Path) -> None:
    plain = make_agent().learn(UPDATES * ROWS)
    agent = profiled(make_agent(), tmp_path).agent
    learning_rate = agent.config.learning_rate
    assert_trained_alike(agent.policy.state_dict(), plain.policy.state_dict(), learning_rate)


@pytest.mark.slow
def test_off_policy_agents_have_phases_too(tmp_path: Path) -> None:
    config = DQNConfig(episodes_per_update=ROWS, learning_starts=ROWS, batch_size=ROWS)
    agent = DQN(ActorCritic.from_pretrained(mock_lm()), make_envs(kl_coef=0.1), config)
    figures = profiled(agent, tmp_path).profile.phases
    assert figures["reference"].flops > 0, "it takes part in the decoding, and prices it"
    assert figures["update"].flops > figures["decode"].flops > 0


def test_without_a_profiler_marks_cost_next_to_nothing() -> None:
    def mark() -> None:
        with phase("decode"):
            pass

    assert phases._listener is None
    fastest = min(timeit.repeat(mark, number=100, repeat=50)) / 100  # the least, since the machine may be busy
    assert fastest < 5e-5, "a token of the smallest model takes milliseconds"
    make_agent().learn(ROWS)
    assert phases._listener is None


def test_a_run_too_short_to_profile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes 6 updates and this run makes 2: play at least 24 episodes"):
        Profiler(tmp_path, make_agent(), 8)


@pytest.mark.slow
def test_the_command_prints_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mock_lm().save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    env = {"prompts": ["one"], "reward": "textgym.rewards.functions:completion_length", "max_new_tokens": 3}
    run = ["train", "--env", "textgym/Text-v0", "--model", "model", "--env-kwargs", json.dumps(env), "--profile"]
    run += ["--num-envs", "4", "--episodes-per-update", "4", "--output-dir", "run"]
    cli.main([*run, "--total-episodes", "24"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*PHASES, "other", "key-value caches"))
    assert (tmp_path / "run" / "trace.json.gz").exists()
    with pytest.raises(SystemExit, match="this run makes 5"):
        cli.main([*run, "--total-episodes", "20", "--output-dir", "short"])
    with pytest.raises(SystemExit, match="--profile looks at the phases of agents that play episodes, not at 'sft'"):
        cli.main(["train", "--agent", "sft", "--data", "rows.jsonl", "--profile", "--output-dir", "short"])
    assert not (tmp_path / "short").exists()
