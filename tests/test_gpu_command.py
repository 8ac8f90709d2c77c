"""`make gpu`: parts that fail, hang or lack something leave a line, what was measured stays; the rehearsal on a CPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FIGURE = {"name": "speed", "value": 3.0, "unit": "times", "note": "", "goal": "at least 2", "met": True}
TELL = f"import json; print(json.dumps({{'figure': {FIGURE!r}}}), flush=True)"
SCRIPTS = {
    "good": TELL,
    "hangs": f"{TELL}; import subprocess, time; subprocess.Popen(['sleep', '300']); time.sleep(300)",
    "fails": f"{TELL}; raise ValueError('no luck')",
    "skips": "print('noise'); print('{\"skipped\": \"the library is missing\"}')",
    "lacking": TELL,
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("gpu")


@pytest.fixture
def stubs(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command with parts of our own, whose scripts need no library."""
    folder = tmp_path / "benchmarks" / "gpu"
    folder.mkdir(parents=True)
    for name, script in SCRIPTS.items():
        (folder / f"{name}.py").write_text(script)
    parts = {name: command.Part(name.title(), 30, 1) for name in SCRIPTS}
    parts["hangs"] = command.Part("Hangs", 3, 1)
    parts["lacking"] = command.Part("Lacking", 30, 1, ("a_library_of_nobody",))
    monkeypatch.setattr(command, "PARTS", parts)
    monkeypatch.setattr(command, "BASE", ())
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "environment", lambda root: dict(os.environ))
    return command


def test_a_part_that_hangs_or_fails_keeps_its_figures_and_the_next_part_goes_on(stubs: Any, tmp_path: Path) -> None:
    run = stubs.Run("cuda", "abc", tmp_path / "page.md")
    results: dict[str, Any] = {"parts": {}}
    stubs.run_parts(list(SCRIPTS), run, 1000.0, results)

    saved = json.loads(run.results.read_text())["parts"]
    assert {name: part["state"] for name, part in saved.items()} == {
        "good": "done",
        "hangs": "stopped",
        "fails": "failed",
        "skips": "skipped",
        "lacking": "skipped",
    }
    assert all(saved[name]["figures"] == [FIGURE] for name in ("good", "hangs", "fails"))
    assert "no luck" in saved["fails"]["why"]
    assert saved["skips"]["why"] == "the library is missing"
    assert saved["lacking"]["why"] == "missing: a_library_of_nobody"
    page = run.page.read_text()
    assert "| Good | speed | 3 | at least 2 | met |" in page
    assert "`make gpu PART=good`" in page
    assert "- Hangs: stopped: over its time of 3 s" in page


def test_one_part_again_is_merged_and_what_has_no_time_is_left_out(stubs: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    results: dict[str, Any] = {"parts": {}}
    stubs.run_parts(["good", "fails"], stubs.Run("cuda", "abc", page), 1000.0, results)
    again = stubs.load(page.with_suffix(".json"))
    again["commit"] = "def"
    stubs.run_parts(["skips"], stubs.Run("cuda", "def", page), 1000.0, again)
    stubs.run_parts(["good", "hangs"], stubs.Run("cuda", "def", page), 0.5, again)
    parts = json.loads(page.with_suffix(".json").read_text())["parts"]
    assert parts["good"]["state"] == "done", "what was measured before stays"
    assert parts["hangs"]["state"] == "left out"
    assert "make gpu PART=hangs" in parts["hangs"]["why"]
    assert "at commit abc" in page.read_text()


def test_a_kill_leaves_what_was_measured(tmp_path: Path) -> None:
    """The process that runs all parts is killed while a part hangs after its first figure."""
    folder = tmp_path / "benchmarks" / "gpu"
    folder.mkdir(parents=True)
    (folder / "hangs.py").write_text(f"{TELL}; import time; time.sleep(20)")
    code = (
        f"import sys, os; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import gpu, pathlib\n"
        f"gpu.ROOT = pathlib.Path({str(tmp_path)!r}); gpu.BASE = (); gpu.environment = lambda root: dict(os.environ)\n"
        "gpu.PARTS = {'hangs': gpu.Part('Hangs', 60, 1)}\n"
        "gpu.run_parts(['hangs'], gpu.Run('cuda', 'abc', gpu.ROOT / 'page.md'), 100.0, {'parts': {}})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    results = tmp_path / "page.json"
    for _ in range(600):
        if results.exists():
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert json.loads(results.read_text())["parts"]["hangs"]["figures"] == [FIGURE]
    assert "speed" in (tmp_path / "page.md").read_text()


def test_an_unknown_part_is_refused_by_name() -> None:
    run = script("--part", "decodng")
    assert run.returncode == 2
    assert "unknown part decodng: choose from machine, equalities" in run.stderr


@pytest.mark.slow
def test_a_device_that_is_not_there_is_one_line_and_leaves_no_page(tmp_path: Path) -> None:
    run = script("--device", "tpu", "--part", "machine", "--page", str(tmp_path / "page.md"))
    assert run.returncode == 1
    assert "no device after" in run.stdout
    assert "unknown device 'tpu'" in run.stdout
    assert not (tmp_path / "page.md").exists()


def test_missing_wheels_are_named(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = importlib.import_module("bare_checkout")
    monkeypatch.setattr(wheels, "REQUIRED", {"a_library_of_nobody": "a-library-of-nobody"})
    monkeypatch.setattr(wheels, "OPTIONAL", {"another_of_nobody": "another-of-nobody"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "another_of_nobody-1.0-py3-none-any.whl").write_bytes(b"no zip file")
    lines = wheels.install_missing(str(tmp_path / "wheels"), tmp_path)
    assert lines[0].startswith("another-of-nobody: its wheel cannot be installed")
    assert lines[1:] == [
        "missing: a-library-of-nobody (parts that need it are skipped)",
        "missing: another-of-nobody (optional)",
    ]
    assert wheels.install_missing(str(tmp_path / "none"), tmp_path)[0] == f"no folder of wheels at {tmp_path / 'none'}"


def test_the_checkout_is_used_without_being_installed(command: Any, tmp_path: Path) -> None:
    """With what this Python has but textgym: that of the checkout comes first, with agents and metadata in it."""
    bare = importlib.import_module("bare_checkout")
    code = (
        "import importlib.metadata as m, importlib.util as u, textgym\n"
        "print(textgym.__file__, u.find_spec('textgym.agents').origin, m.version('textgym'))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=bare.environment(ROOT), cwd=tmp_path, capture_output=True, text=True
    )
    package, agents, version = run.stdout.split()
    linked = ROOT / "build" / "gpu" / "checkout" / "textgym"
    assert Path(package) == linked / "__init__.py"
    assert Path(agents).resolve() == ROOT / "agents" / "__init__.py"
    assert version == importlib.import_module("textgym").__version__


@pytest.mark.parametrize(
    ("part", "package"), [("grpo_trl", "trl"), ("vllm_peer", "vllm"), ("adam8bit", "bitsandbytes")]
)
def test_a_part_without_its_peer_says_so(part: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    run = script("--device", "cpu", "--part", part, "--page", str(tmp_path / "page.md"))
    assert run.returncode == 0
    assert f"missing: {package}" in run.stdout
    assert f"skipped: missing: {package}" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_the_rehearsal_runs_every_line_on_a_cpu(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    run = script("--device", "cpu", "--page", str(page))
    assert run.returncode == 0, run.stdout[-5000:]
    parts = json.loads(page.with_suffix(".json").read_text())["parts"]
    peers = {"adam8bit", "grpo_trl", "ppo_trl", "vllm_peer"}
    assert {name for name, part in parts.items() if part["state"] == "skipped"} <= peers
    assert all(part["figures"] for name, part in parts.items() if part["state"] == "done")


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
