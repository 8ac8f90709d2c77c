"""`make gpu`: parts that fail, hang or lack something leave a line, what was measured stays; the rehearsal on a CPU."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
import weakref
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
FIGURE = {"name": "speed", "value": 3.0, "unit": "times", "note": "", "goal": "at least 2", "met": True}
TELL = f"import json; print(json.dumps({{'figure': {FIGURE!r}}}), flush=True)"
SCRIPTS = {
    "good": TELL,
    "hangs": f"{TELL}; import subprocess, time; subprocess.Popen(['sleep', '300']); time.sleep(300)",
    "fails": f"{TELL}; raise ValueError('no luck')",
    "dies": f"{TELL}; import os, subprocess; subprocess.Popen(['sleep', '300']); os._exit(3)",
    "skips": "print('noise'); print('{\"skipped\": \"the library is missing\"}')",
    "lacking": TELL,
    "process": "import json, os; print(json.dumps({'note': str(os.getpid())}))",
    "process again": "import json, os; print(json.dumps({'note': str(os.getpid())}))",
    "alone": "import json, os; print(json.dumps({'note': str(os.getpid())}))",
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "gpu")
    return importlib.import_module("gpu")


@pytest.fixture
def stubs(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, with short scripts as its parts, which need no library."""
    folder = tmp_path / "benchmarks" / "gpu"
    folder.mkdir(parents=True)
    for name, script in SCRIPTS.items():
        (folder / f"{name}.py").write_text(script)
    parts = {name: command.Part(name.title(), 300) for name in SCRIPTS}
    parts["hangs"] = command.Part("Hangs", 2)
    parts["lacking"] = command.Part("Lacking", 300, ("a_library_of_nobody",))
    parts["alone"] = command.Part("Alone", 300, alone=True)
    monkeypatch.setattr(command, "PARTS", parts)
    monkeypatch.setattr(command, "BASE", ())
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.import_module("gpu_workers"), "environment", lambda root: dict(os.environ))
    return command


@pytest.mark.slow
def test_a_part_that_hangs_or_fails_keeps_its_figures_and_the_next_part_goes_on(stubs: Any, tmp_path: Path) -> None:
    run = stubs.Run("cuda", "abc", tmp_path / "page.md")
    results: dict[str, Any] = {"parts": {}}
    stubs.run_parts(["good", "hangs", "fails", "skips", "lacking"], run, 602.0, results)  # none to spare

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
    assert "- Hangs: stopped: over its time of 4 s" in page


@pytest.mark.slow
def test_a_part_that_dies_while_a_child_lives_has_failed_at_once(stubs: Any, tmp_path: Path) -> None:
    """Its child lives for 300 s, so a command that waits for it would stop the part after its 250 s."""
    results: dict[str, Any] = {"parts": {}}
    stubs.run_parts(["dies", "good"], stubs.Run("cuda", "abc", tmp_path / "page.md"), 250.0, results)
    assert results["parts"]["dies"]["state"] == "failed"
    assert results["parts"]["dies"]["why"] == "exit code 3"
    assert results["parts"]["dies"]["figures"] == [FIGURE]
    assert results["parts"]["good"]["state"] == "done"


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
        f"import sys, os; sys.path.insert(0, {str(ROOT / 'scripts' / 'gpu')!r})\n"
        "import gpu, pathlib\n"
        "import gpu_workers; gpu_workers.environment = lambda root: dict(os.environ)\n"
        f"gpu.ROOT = pathlib.Path({str(tmp_path)!r}); gpu.BASE = ()\n"
        "gpu.PARTS = {'hangs': gpu.Part('Hangs', 60)}\n"
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


def test_parts_share_a_process_until_one_fails(stubs: Any, tmp_path: Path) -> None:
    results: dict[str, Any] = {"parts": {}}
    run = stubs.Run("cuda", "abc", tmp_path / "page.md")
    stubs.run_parts(["process", "alone", "process again"], run, 1000.0, results)
    first, alone, again = (results["parts"][name]["notes"] for name in ("process", "alone", "process again"))
    assert first == again != alone
    stubs.run_parts(["process", "fails", "process again"], run, 1000.0, results)
    assert results["parts"]["process"]["notes"] != results["parts"]["process again"]["notes"]


def test_all_parts_fit_into_the_limit(command: Any) -> None:
    planned = sum(part.seconds for name, part in command.PARTS.items() if name != "vllm_peer")
    assert planned <= command.LIMIT - 20, "the unpacking of wheels takes 20 seconds"
    assert list(command.PARTS)[-1] == "vllm_peer"


def test_a_part_may_take_what_no_later_part_needs(stubs: Any) -> None:
    assert stubs.time_for("good", 3000, ["lacking"]) == 3000
    assert stubs.time_for("good", 3000, ["fails", "skips"]) == 2400
    assert stubs.time_for("good", 3000, ["fails"] * 20) == 600
    assert stubs.time_for("good", 400, []) == 400


@pytest.mark.parametrize(
    ("device", "given", "seen"),
    [
        ("cuda", None, {"CUDA_VISIBLE_DEVICES": "0"}),
        ("cuda:1", None, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("cuda", "", {"CUDA_VISIBLE_DEVICES": ""}),
        ("cuda:1", "4,6", {"CUDA_VISIBLE_DEVICES": "6"}),
        ("cuda:2", "4,6", {"CUDA_VISIBLE_DEVICES": ""}),
        ("cpu", "4,6", {"CUDA_VISIBLE_DEVICES": ""}),
        ("cuda:x", None, {}),
    ],
)
def test_a_part_sees_the_gpu_that_it_measures(
    command: Any, device: str, given: str | None, seen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert importlib.import_module("gpu_workers").visible_gpu(device) == seen


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


def write_wheel(folder: Path, package: str, version: str, tag: str = "py3-none-any", files: Any = ()) -> None:
    """Write a wheel of a pure Python package with empty files."""
    name = package.replace("-", "_")
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")
        for file in files:
            wheel.writestr(file, "")


@pytest.fixture
def bare(command: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that installs wheels, with no package that it asks for."""
    module = importlib.import_module("bare_checkout")
    monkeypatch.setattr(module, "REQUIRED", {})
    monkeypatch.setattr(module, "OPTIONAL", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    return module


def test_missing_wheels_are_named(bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bare, "REQUIRED", {"a_library_of_nobody": "a-library-of-nobody"})
    monkeypatch.setattr(bare, "OPTIONAL", {"another_of_nobody": "another-of-nobody"})
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "another_of_nobody-1.0-py3-none-any.whl").write_bytes(b"no zip file")
    lines = bare.install_missing(str(tmp_path / "wheels"), tmp_path)
    assert lines[0].startswith("another-of-nobody cannot be installed")
    assert lines[1:] == [
        "missing: a-library-of-nobody (parts that need it are skipped)",
        "missing: another-of-nobody (optional)",
    ]
    assert bare.install_missing(str(tmp_path / "none"), tmp_path)[0] == f"no folder of wheels at {tmp_path / 'none'}"


@pytest.mark.slow
def test_of_several_wheels_that_for_this_python_is_taken(bare: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A package whose name only begins with the same letters is not taken for it."""
    monkeypatch.setattr(bare, "OPTIONAL", {"of_nobody": "of-nobody", "of_other": "of-other"})
    for tag in ("cp27-cp27m-win32", "py3-none-any", "zz9-none-any"):
        write_wheel(tmp_path, "of-nobody", "1.0", tag, ["of_nobody.py"])
    write_wheel(tmp_path, "of-nobody-two", "2.0", files=["of_nobody_two.py"])
    write_wheel(tmp_path, "of-other", "1.0", "cp27-cp27m-win32", ["of_other.py"])
    lines = bare.install_missing(str(tmp_path), tmp_path)
    assert lines[0] == "of-nobody: installed"
    assert lines[1].startswith("of-other cannot be installed: ")
    assert lines[2:] == ["missing: of-other (optional)"]
    assert [path.name for path in bare.unpacked(tmp_path).glob("*.py")] == ["of_nobody.py"]


@pytest.mark.slow
def test_each_version_of_trl_has_a_folder_of_its_own(
    bare: Any, benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts take the newest one that has what they need: PPO is in old versions alone."""
    for version, files in {"1.12.0": ["trl/experimental/ppo/a.py", "trl/grpo.py"], "1.9.0": [], "1.16.0": []}.items():
        write_wheel(tmp_path, "trl", version, files=["trl/trainer.py", *files])
    lines = bare.install_missing(str(tmp_path), tmp_path)
    assert [line.endswith("installed") for line in lines] == [True] * 3
    assert bare.install_missing(str(tmp_path), tmp_path) == [], "they are there"

    versions = benchmark("measuring.trl_versions")
    monkeypatch.setattr(versions, "UNPACKED", tmp_path / "build" / "gpu")
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda name: name == "datasets" or None)
    assert [folder.name for folder in versions.libraries_with("trl.trainer")] == ["trl-1.16.0"]
    assert [folder.name for folder in versions.libraries_with("trl.experimental.ppo")] == ["trl-1.12.0"]
    with pytest.raises(SystemExit):
        versions.libraries_with("trl.dqn")


def test_the_checkout_is_used_without_being_installed(bare: Any, tmp_path: Path) -> None:
    """Packages are those of this Python, except textgym: that is the checkout's, with agents and metadata."""
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
    ("part", "package"),
    [
        ("adam8bit", "bitsandbytes"),
        pytest.param("grpo_trl", "trl", marks=pytest.mark.slow),
        pytest.param("vllm_peer", "vllm", marks=pytest.mark.slow),
    ],
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
    without = {"adam8bit", "grpo_trl", "ppo_trl", "vllm_peer", "scenarios"}
    assert {name for name, part in parts.items() if part["state"] == "skipped"} <= without
    assert all(part["figures"] for name, part in parts.items() if part["state"] == "done")


def test_a_model_that_does_not_fit_is_freed_and_a_smaller_one_is_next(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`learn` explains an out-of-memory error by a MemoryError, whose traceback keeps the agent alive."""
    part = benchmark("large_update")
    agents: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    class Agent:
        pass

    def measure(size: Any, *rest: Any) -> None:
        alive.extend(agent() is not None for agent in agents)
        agent = Agent()
        agents.append(weakref.ref(agent))
        if len(agents) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(agents) == 2:
            raise MemoryError("the GPU was out of memory")

    monkeypatch.setattr(part, "measure", measure)
    monkeypatch.setattr(part, "start", lambda text: torch.device("cuda"))
    monkeypatch.setattr(part, "need_bf16", lambda device: None)
    monkeypatch.setattr(part, "fitting", lambda sizes, *rest, **settings: sizes[0] if sizes else None)
    part.main()
    assert len(agents) == 3
    assert alive == [False] * 3
    assert capsys.readouterr().out.count("a smaller model is next") == 2


def test_a_lap_ends_when_the_gpu_has_finished(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the rest of one side's kernels would run during the other side's turn."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("finished"))
    peers = benchmark("measuring.peers")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    monkeypatch.setattr(peers, "say", lambda figures: events.append("told"))
    clock = peers.Clock()
    clock.start()
    clock.lap()
    assert events[:3] == ["finished", "finished", "told"]


@pytest.mark.slow
def test_every_file_of_tests_and_every_failure_is_told_at_once(bare: Any, tmp_path: Path) -> None:
    """The process is killed in the third file; the first one cannot be imported."""
    (tmp_path / "test_0.py").write_text("import a_library_of_nobody\n")
    (tmp_path / "test_a.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    (tmp_path / "test_b.py").write_text("import os\ndef test_good(): pass\ndef test_end(): os._exit(3)\n")
    code = f"import torch; from measuring.tally import run_tests; run_tests({str(tmp_path)!r}, torch.device('cpu'))"
    variables = bare.environment(ROOT)
    run = subprocess.run([sys.executable, "-c", code], env=variables, cwd=tmp_path, capture_output=True, text=True)
    told = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert run.returncode == 3
    assert told[0]["note"] == "failed: test_0.py: ModuleNotFoundError: No module named 'a_library_of_nobody'"
    assert told[1]["figure"]["name"] == "test_0.py: tests failed"
    assert told[2]["note"] == "failed: test_a.py::test_bad: assert 1 == 2"
    assert told[3]["figure"]["name"] == "test_a.py: tests failed"
    assert (told[3]["figure"]["value"], told[3]["figure"]["note"]) == (1, "1 passed, 0 skipped")


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "gpu" / "gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
