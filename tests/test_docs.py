"""README and docs: their code runs as pasted, their commands and links exist, their tables say what the code says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pytest

from textgym import cli
from textgym.agents import PPOConfig
from textgym.data.manifests import FORMAT, RUN, RUN_KIND
from textgym.envs.tasks.sentiment import DEFAULTS
from textgym.registration import TASKS
from textgym.rewards import functions
from textgym.rewards.models import RewardModelConfig

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SITE = util.spec_from_file_location("site_configuration", ROOT / "docs" / "conf.py")
assert SITE is not None
assert SITE.loader is not None
site = util.module_from_spec(SITE)
SITE.loader.exec_module(site)
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
RL4LMS_CONFIGS = [
    "common_gen",
    "dialog",
    "imdb_text_continuation",
    "iwslt2017",
    "narrative_qa",
    "summarization",
    "synthetic_generate_increasing_numbers",
    "totto",
]


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of the shell blocks, and every one in backticks that begins like one, split into words."""
    lines = []
    for page in PAGES.values():
        lines += [line for block in blocks("sh", page) for line in block.splitlines()]
        lines += re.findall(r"`((?:make|textgym|python) [^`]+)`", page)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        pytest.param(name, block, marks=() if name == "README.md" else pytest.mark.slow)
        for name, page in PAGES.items()
        for block in blocks("python", page)
    ],
)
def test_python_blocks_run_as_pasted(name: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, name, "exec"), {"__name__": "__main__"})


def names_of_tests() -> set[str]:
    files = (ROOT / "tests").glob("**/test_*.py")
    return {name for file in files for name in re.findall(r"^def test_(\w+)", file.read_text("utf-8"), re.MULTILINE)}


def rows_of_methods() -> list[list[str]]:
    rows = [row.split("|") for row in PAGES["docs/methods.md"].splitlines() if row.count("|") == 5]
    return [row for row in rows if row[1].strip(" -") not in ("", "method")]


def test_each_method_names_a_place_and_tests_that_exist() -> None:
    tests, rows = names_of_tests(), rows_of_methods()
    assert len(rows) > 80
    for row in rows:
        (path, name) = re.fullmatch(r" `(\S+):([\w.]+)` ", row[3]).groups()  # type: ignore[union-attr]
        assert site.line_of(path, name) > 0, row[3]
        named = set(re.findall(r"`(\w+)`", row[4]))
        assert named, f"nothing proves {row[1]}"
        assert named <= tests, named - tests


def test_the_site_shows_the_line_of_each_method() -> None:
    source = [PAGES["docs/methods.md"]]
    site.show_lines(None, "methods", source)
    shown = re.findall(r"`([\w.]+)` in \[(\S+)\]\(\.\./\2\), line (\d+) \|", source[0])
    assert len(shown) == len(rows_of_methods())
    for name, path, number in shown:
        line = (ROOT / path).read_text("utf-8").splitlines()[int(number) - 1]
        assert re.match(rf" *(def|class) {name.split('.')[-1]}\b", line), (path, number, line)


def test_a_place_that_is_missing_or_ambiguous_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "ROOT", tmp_path)
    methods = [f"class {name}:\n    def loss(self):\n        pass\n" for name in ("First", "Second")]
    (tmp_path / "two.py").write_text("\n".join(methods))
    assert site.line_of("two.py", "Second.loss") == 6
    with pytest.raises(ValueError, match=r"two.py has no First.lost"):
        site.line_of("two.py", "First.lost")
    with pytest.raises(ValueError, match=r"two.py has 2 loss"):
        site.line_of("two.py", "loss")


def test_each_pitfall_names_tests_that_exist() -> None:
    tests = names_of_tests()
    rows = [row.split("|") for row in PAGES["docs/pitfalls.md"].splitlines() if row.count("|") == 5]
    named = [re.findall(r"`(\w+)`", row[4]) for row in rows if row[1].strip(" -") not in ("", "pitfall")]
    assert all(named), "a pitfall that nothing guards against"
    assert {name for names in named for name in names} <= tests


def test_each_fault_names_tests_that_exist() -> None:
    files = (ROOT / "tests").glob("**/test_*.py")
    tests = {name for file in files for name in re.findall(r"^def test_(\w+)", file.read_text("utf-8"), re.MULTILINE)}
    rows = [row.split("|") for row in PAGES["docs/what_happens_if.md"].splitlines() if row.count("|") == 4]
    cells = [row[3] for row in rows if row[1].strip(" -") not in ("", "what happens")]
    assert len(cells) > 20
    for cell in cells:
        named = re.findall(r"`([^`]+)`", cell)
        assert named, "a fault that no test plays"
        assert all(name in tests or (ROOT / name).is_file() for name in named), named


def test_every_model_of_the_compatibility_page_is_exact_or_refused_with_a_reason() -> None:
    models = PAGES["docs/compatibility.md"].split("## Models")[1].split("\n## ")[0]
    results = [row.split("|")[3].strip() for row in models.splitlines() if row.count("|") == 4][2:]
    assert len(results) > 20
    assert all(re.match(r"exact \(\de-0[5-9]\)|refused: \w+ ", result) for result in results)


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning", "--keep-going", "--quiet"]
    built = subprocess.run([*command, "docs", tmp_path / "site"], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "TextVectorEnv" in (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for words in commands() if words[0] == "make" for target in words[1:] if "=" not in target}
    assert {"demo", "test"} <= named <= targets


def test_textgym_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "ppo").mkdir(parents=True)
    (tmp_path / "runs" / "ppo" / "config.json").write_text('{"env": "textgym/Sentiment-v0", "model": "tiny"}')
    (tmp_path / "runs" / "ppo" / RUN).write_text(json.dumps({"kind": RUN_KIND, "format": FORMAT}))
    (tmp_path / "FILE").write_text("agent: ppo\n")  # of `train --config FILE`
    named = [words[1:] for words in commands() if words[0] == "textgym"]
    complete = [words for words in named if len(words) > 1 and words[-1] != "--help"]
    assert len(complete) >= 4
    for words in complete:
        cli.parse(words)
    subcommands = {"demo", "train", "resume", "reward-model", "data", "evaluate", "read-sheet"}
    subcommands |= {"chat", "list", "compare", "view"}
    assert {words[0] for words in named} == subcommands


def test_launched_commands_parse_and_their_settings_exist() -> None:
    launched = [words for words in commands() if words[0] == "accelerate"]
    assert launched
    for words in launched:
        assert (ROOT / words[words.index("--config_file") + 1]).exists()
        module, *arguments = words[words.index("-m") + 1 :]
        assert module == "textgym"
        cli.parse(arguments)


def test_scripts_exist() -> None:
    scripts = {words[1] for words in commands() if words[0] == "python" and words[1].endswith(".py")}
    assert scripts
    assert not [script for script in scripts if not (ROOT / script).exists()]


@pytest.mark.parametrize("name", PAGES)
def test_links_and_their_anchors_exist(name: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), link


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_ready_made_functions_are_those_of_the_code() -> None:
    table = PAGES["docs/rewards.md"].split("## Ready-made functions")[1].split("A reward model is")[0]
    names = {name for row in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert names == set(functions.__all__)


def test_tasks_stand_for_the_same_rl4lms_configs_in_docs_and_docstrings() -> None:
    """And for each of RL4LMs' folders `scripts/training/task_configs` there is one."""
    rows = re.findall(r"^\| `(textgym/\w+-v0)` \|(?:[^|]*\|){3} ([^|]*) \|", PAGES["docs/tasks.md"], re.MULTILINE)
    shown = dict(rows)
    configs = {env_id: re.findall(r"`(\w+)`", cell) for env_id, cell in shown.items()}
    assert set(configs) == {f"textgym/{name}-v0" for name in TASKS}
    for name, module in TASKS.items():
        environment = getattr(import_module(f"textgym.envs.tasks.{module}"), f"{name}Env")
        assert configs[f"textgym/{name}-v0"] == re.findall(r"\(RL4LMs' `(\w+)`", environment.__doc__)
    assert sorted(config for row in configs.values() for config in row) == RL4LMS_CONFIGS


def test_tables_of_arguments_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "pages")
    page = PAGES["docs/environments.md"]
    assert import_module("environment_tables").with_tables(page) == page, "run scripts/pages/environment_tables.py"


@pytest.mark.slow
def test_what_is_read_of_public_data_sets_is_what_the_code_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "pages")
    assert import_module("data_forms").page() == PAGES["docs/data_forms.md"], "run scripts/pages/data_forms.py"


def test_defaults_of_the_sentiment_task_are_those_of_the_code() -> None:
    paragraph = PAGES["docs/environments.md"].split("`textgym/Sentiment-v0` sets ")[1].split("\n\n")[0]
    for name, default in DEFAULTS.items():
        assert f"`{name}={default!r}`".replace("'", '"') in paragraph


def test_settings_that_are_named_exist() -> None:
    for page in PAGES.values():
        for config in (PPOConfig, RewardModelConfig):
            for name in re.findall(rf"{config.__name__}\(([^)]*)\)", page):
                assert {pair.split("=")[0].strip() for pair in name.split(",")} <= set(config.__dataclass_fields__)
