"""The parts of `make gpu` and our sides of benchmarks run at toy size on the pretend device, which finds device faults.

On a real GPU `make gpu` itself runs them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from textgym.models.loading import resolve

pytestmark = pytest.mark.skipif("tests.pretend_cuda" not in sys.modules, reason="make gpu runs the parts themselves")
GPU = torch.device("cuda", 0)


def test_bandwidth(benchmark: Any) -> None:
    models = benchmark("measuring.models")
    lm = models.make_model(models.TOY[0], 24, GPU, torch.bfloat16)
    assert benchmark("measuring.roofline").measure(lm, 3, 8, 12, 1, 1)["ms/step"] > 0


def test_one_large_update(benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    part, limits = benchmark("large_update"), benchmark("textgym.agents.machine.device_limits")
    monkeypatch.setattr(part, "peak_flops", lambda *rest: limits.Peak(1e9, "assumed"))
    part.measure(benchmark("measuring.models").TOY[0], GPU, 4, 4, 4)
    assert "share of the data sheet's peak FLOPs" in capsys.readouterr().out


def test_decoding(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    part = benchmark("decoding")
    config = part.Config(device="cuda", model="tiny", rows=3, prompt_tokens=8, new_tokens=12, repeats=1)
    part.beside_generate("tiny", config, judged=True)
    part.captured("tiny", config)
    assert capsys.readouterr().out.count('"figure"') == 5


@pytest.mark.filterwarnings("ignore")
def test_stock_ppo(benchmark: Any, tmp_path: Path) -> None:
    benchmark("stock_sb3").save_model(tmp_path, 64, 2, 128)
    sb3 = benchmark("sb3")
    config = sb3.Config(rows=2, epochs=1, minibatches=2, repeats=2, device="cuda", model=str(tmp_path))
    assert sb3.compare(config, 3)["own PPO"] > 0


def test_our_side_beside_trl(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[float] = []
    grpo = benchmark("grpo_vs_trl")
    learn, length = grpo.ours(grpo.Config(rows=8, group_size=4, new_tokens=3, updates=3))
    learn(lambda: updates.append(length()))
    assert updates == [3, 3, 3]

    ppo = benchmark("ppo_vs_trl")
    monkeypatch.setattr(ppo.Turns, "__init__", lambda self, updates: None)
    monkeypatch.setattr(ppo.Turns, "done", lambda self, tokens: updates.append(tokens))
    ppo.ours(ppo.Config(rows=4, new_tokens=2, epochs=1, repeats=1, model=str(resolve("tiny"))))
    assert updates[3:] == [2] * (ppo.WARM_UPS + 2)
    assert ppo.WARM_UPS == grpo.WARM_UPS == 2
