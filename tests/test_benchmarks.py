"""Benchmarks beside peers run, at toy sizes and without the peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from textgym.agents.runs import demo
from textgym.data.corpora.sources import Snippet

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_a_side_works_when_it_is_asked(benchmark: Any, tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text(
        f"import sys; sys.path.append({str(FOLDER)!r})\n"
        "from measuring.peers import Clock\n"
        "clock = Clock(); clock.start()\n"
        "for i in range(int(sys.argv[1])): print('noise'); clock.lap(done=i)\n"
    )
    peers = benchmark("measuring.peers")
    with peers.Side(script, 9) as ours, peers.Side(script, 9) as theirs:
        timed, mine, others = peers.in_turns(ours.work, theirs.work, repeats=3)
    assert [said["done"] for said in mine] == [said["done"] for said in others] == [0, 1, 2]
    assert timed["least"] <= timed["wall time ratio"] <= timed["most"]


def test_a_script_that_fails_says_why(benchmark: Any, tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match="no such model"):
        benchmark("measuring.peers").run_script(script)


def test_flops_of_a_product(benchmark: Any) -> None:
    import torch

    assert benchmark("measuring.peers").count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5


@pytest.mark.parametrize("stop", [(), (300, 301)])
def test_our_side_of_grpo(benchmark: Any, stop: tuple[int, ...]) -> None:
    module = benchmark("grpo_vs_trl")
    config = module.Config(rows=8, group_size=4, new_tokens=3, updates=2, side="ours", stop=stop)
    updates: list[None] = []
    learn, length = module.ours(config)
    learn(lambda: updates.append(None))
    assert len(updates) == 2
    assert length() <= 3 if stop else length() == 3


@pytest.mark.parametrize("side", ["shared", "separate"])
def test_our_side_of_memory(benchmark: Any, tmp_path: Path, side: Any) -> None:
    module = benchmark("memory")
    config = module.Config(hidden_size=64, layers=1, rows=4, prompt_tokens=3, new_tokens=3, side=side, model=tmp_path)
    module.make_model(config, 500, str(tmp_path))
    figures = module.ours(config)
    per_model = 4 * (500 * 64 + 4 * 64 * 64 + 3 * 64 * 192 + 3 * 64) / 2**20  # MB: embedding, attention, MLP, norms
    trained = 2 if side == "separate" else 1
    assert figures["state"] == pytest.approx((2 + 4 * trained) * per_model, rel=0.01)
    assert figures["working"] == figures["peak"] - figures["state"]


def test_rollouts_write_and_step_what_generate_does(benchmark: Any) -> None:
    module = benchmark("rollout")
    written, stepped = module.compare(module.Config(device="cpu", rows=3, prompt_tokens=5, new_tokens=4, repeats=1))
    assert [written["ours"], stepped["ours"]] == ["write", "step"]
    assert written["FLOPs ratio"] == pytest.approx(1, rel=0.01)
    assert stepped["FLOPs ratio"] == pytest.approx(1, rel=0.01)
    assert 0 < written["environment"] < 1
    assert 0 < stepped["environment"] < 1


@pytest.mark.slow
def test_bfloat16_moves_log_probs_as_far_as_its_config_says(benchmark: Any) -> None:
    module = benchmark("bf16")
    for row in module.compare(module.Config(rows=16, new_tokens=16)):
        assert 1e-4 < row["mean"] < 0.03
        assert row["99% below"] < 0.15
        assert abs(row["mean ratio"] - 1) < 0.01
        assert 0 < row["gradient"] < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_that_a_step_reads_are_those_counted_by_hand(benchmark: Any, tied: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    lm = LlamaForCausalLM(shape).to(torch.bfloat16)
    read = benchmark("measuring.roofline").bytes_per_step(lm, rows=5, context=7)
    query_and_out, key_and_value, mlp, norms = 2 * 32 * 32, 2 * 32 * 16, 3 * 32 * 80, 2 * 32
    head, last_norm, looked_up = 100 * 32, 32, 5 * 32
    assert read["weights"] == 2 * (3 * (query_and_out + key_and_value + mlp + norms) + last_norm + head + looked_up)
    assert read["cache"] == 2 * (3 * 2 * 5 * 7 * 16)  # layers, keys and values, rows, tokens, 2 heads of 8


def test_roofline_counts_the_whole_of_a_step(benchmark: Any) -> None:
    module = benchmark("rollout")
    toy = {"rows": 2, "prompt_tokens": 3, "new_tokens": 4, "hidden_size": 64, "layers": 1, "vocab_size": 50}
    row = module.roofline(module.Config(device="cpu", roofline=True, repeats=1, megabytes=1, **toy))
    assert row["GB/s"] == pytest.approx((row["weights, MB"] + row["cache, MB"]) / row["ms/step"])
    assert row["share"] == pytest.approx(row["GB/s"] / row["device's GB/s"])


def test_a_stopwatch_counts_what_is_outermost_and_what_lies_within(benchmark: Any) -> None:
    from textgym.models.machine.profiled_phases import phase

    ticks = iter(range(100))

    def play() -> None:
        with phase("environment"), phase("reward"):
            pass
        with phase("decode"):
            for _ in range(3):
                with phase("decode"):
                    pass

    watch = benchmark("measuring.episode_timing").Stopwatch(lambda: next(ticks)).time(play)
    assert watch.seconds == {"environment": 3, "environment/reward": 1, "decode": 7, "decode/decode": 3}
    assert (watch.environment, watch.decode) == (3, 3)


def test_an_iteration_with_lora_trains_the_adapter_alone(benchmark: Any) -> None:
    pytest.importorskip("peft")
    module = benchmark("lora")
    config = module.Config(model="tiny", episodes=4, new_tokens=3, rank=2, iterations=2, threads=1)
    row = module.iterate(config)
    assert row["trained, M"] * 1e6 == 4 * 2 * 2 * (192 + 192) + 193  # layers, q and v, rank; the value head
    assert row["seconds, the slowest"] > 0
    assert row["peak GB"] > 0


def test_scaling(benchmark: Any) -> None:
    module = benchmark("scaling")
    short, long = module.measure([(16, 2, 300), (48, 2, 300)], module.Config(new_tokens=4, repeats=1))
    assert 0 < short["environment"] < 1
    assert 0 < short["step: environment"] < 1
    assert 0 < short["attention"] < 1
    assert short["the rest"] == pytest.approx((1 - short["attention"]) * short["us/token"])
    assert long["MFLOPs/token: layers"] == pytest.approx(short["MFLOPs/token: layers"], rel=1e-3)
    assert short["MFLOPs/token: attention"] == pytest.approx(4 * 2 * 2 * 192 * 15 / 1e6)  # layers, QK and PV, 15 tokens
    assert long["MFLOPs/token: attention"] == pytest.approx(4 * 2 * 2 * 192 * 47 / 1e6)


def test_a_falling_kl_coefficient_is_a_straight_line_and_then_stays(benchmark: Any) -> None:
    coefficient = benchmark("optimality").FallingKL(4.0, last=1.0, left=6)
    found = []
    for episodes in (2, 1, 4):
        coefficient.update(kl=0.5, num_episodes=episodes)
        found.append(coefficient.coef)
    assert found == [3.0, 2.5, 1.0]  # by half for each episode, until 1


@pytest.mark.slow
def test_a_watched_run_has_all_of_its_parts(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module = benchmark("watching")
    module.main(module.Args(episodes=128))
    printed = capsys.readouterr().out
    assert "pair 1: off " in printed
    for part in ("answers of the start", "HeldOut", "closing table", "checkpoints", "page"):
        assert f"  {part}: " in printed


@pytest.mark.slow
def test_a_method_of_the_ladder_is_trained_and_measured(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On invented ratings, because tests download nothing."""
    module = benchmark("ladder")
    rated = [(f"{word} film {i}", rating) for i in range(60) for word, rating in (("good", 3.0), ("bad", -3.0))]
    monkeypatch.setattr(module, "movie_snippets", lambda: [Snippet(*row) for row in rated])
    for place in (module, demo):
        monkeypatch.setattr(place, "snippet_prompts", lambda split: ["This film is", "A story of"])
    args = module.Args(total_episodes=64, output_dir=tmp_path)
    monkeypatch.setattr(module.Args, "demo", lambda self, seed: module.DemoConfig(seed=seed, eval_prompts=2))
    module.prepare(args, 0)
    module.climb(args, "REINFORCE", 0)
    figures = json.loads((tmp_path / "seed-0" / "REINFORCE.json").read_text())
    assert len(figures["history"]) == 1
    assert len(figures["samples"]) == 2
