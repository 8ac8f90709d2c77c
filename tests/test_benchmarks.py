"""Benchmarks beside peers run, at toy sizes and without the peers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_a_side_works_when_it_is_asked(benchmark: Any, tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text(
        f"import sys; sys.path.append({str(FOLDER)!r})\n"
        "from peers import Clock\n"
        "clock = Clock(); clock.start()\n"
        "for i in range(int(sys.argv[1])): print('noise'); clock.lap(done=i)\n"
    )
    peers = benchmark("peers")
    with peers.Side(script, 9) as ours, peers.Side(script, 9) as theirs:
        timed, mine, others = peers.in_turns(ours.work, theirs.work, repeats=3)
    assert [said["done"] for said in mine] == [said["done"] for said in others] == [0, 1, 2]
    assert timed["least"] <= timed["wall time ratio"] <= timed["most"]


def test_a_script_that_fails_says_why(benchmark: Any, tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match="no such model"):
        benchmark("peers").run_script(script)


def test_flops_of_a_product(benchmark: Any) -> None:
    import torch

    assert benchmark("peers").count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5


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
    embedding = 4 * 500 * 64 / 2**20
    trained = 2 if side == "separate" else 1
    assert figures["state"] == pytest.approx((2 + 4 * trained) * per_model + embedding, rel=0.01)
    assert figures["working"] == figures["peak"] - figures["state"]


def test_scaling(benchmark: Any) -> None:
    module = benchmark("scaling")
    short, long = module.measure([(16, 2, 300), (48, 2, 300)], module.Config(new_tokens=4, repeats=1))
    assert 0 < short["environment"] < 1
    assert long["MFLOPs/token: layers"] == pytest.approx(short["MFLOPs/token: layers"], rel=1e-3)
    assert long["MFLOPs/token: attention"] == pytest.approx(3 * short["MFLOPs/token: attention"], rel=0.1)
