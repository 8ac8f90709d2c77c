"""The page of `textgym view`: its files, what it says of runs in any state, and that data cannot leave its place."""

from __future__ import annotations

import base64
import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from textgym import cli
from textgym.agents.runs.claims import RunClaim
from textgym.errors import ConfigError, DamagedFolderError
from textgym.flags import View
from textgym.viewer import write_page
from textgym.viewer.highlights import Highlights, disagreements
from textgym.viewer.page import SCRIPTS, STYLES
from textgym.viewer.records import FORMAT, Record, records_of, write_record
from textgym.viewer.rows import rows_of
from textgym.viewer.runs import MOST_POINTS, read_metrics, read_run

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='hacked = 2'> \u2028\u2029 ]]> <!-- \x1b[31m"


def record(update: int = 2, **changes: Any) -> Record:
    """Two rows: "good fun" with a score, and a row without, in which the environment inserted a token."""
    whole: Record = {
        "format": FORMAT,
        "textgym": "0.2.0",
        "agent": "PPO",
        "update": update,
        "episodes": 4 * update,
        "kl_coef": 0.05,
        "clip": [0.8, 1.2],
        "num_rows": 4,
        "pieces": [" good", EVIL, " fun"],
        "prompts": ["A film", EVIL],
        "rows": {"prompt": [0, 1], "length": [2, 3], "score": [1.25, None], "stopped": [True, False]},
        "texts": {},
        "tokens": {"piece": [0, 2, 1, 1, 0], "reward": [0.0, 1.25, 0.0, 0.0, 0.0], "mine": [1, 1, 1, 0, 1]},
        "numbers": {
            "log_prob": [-1.0, -2.0, -0.5, -0.25],
            "kl": [0.5, 0.25, -0.5, 0.0],
            "value": [0.0, 1.0, 0.0, 0.0],
            "return": [1.0, 1.5, 0.0, 0.0],
            "advantage": [1.0, 0.5, 0.0, 0.0],
            "ratio": [1.5, 1.0, 1.0, 1.0],
            "clipped": [1.0, 0.0, 0.0, 0.0],
        },
        "each": 2,
        "alternatives": {
            "policy": {"piece": [0, 1] * 4, "percent": [60, 40] * 4},
            "reference": {"piece": [0, 2] * 4, "percent": [50, 30] * 4},
        },
    }
    return {**whole, **changes}


def make_run(folder: Path, updates: tuple[int, ...] = (2, 4), metric: str = "objective/scores") -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"kind": "textgym run", "format": 2}))
    lines = [json.dumps({metric: float(update), "episodes": 4 * update}) for update in range(1, 5)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text(json.dumps({"env": EVIL, "config": {"learning_rate": 0.1}}))
    (folder / "checkpoints" / "step-000004").mkdir(parents=True)
    for update in updates:
        write_record(folder, record(update))
    return folder


def index_of(page: Path) -> dict[str, Any]:
    text = (page.parent / "data" / "index.js").read_text()
    [data] = re.fullmatch(r'textgym\.index\("([^"]*)"\);\n', text).groups()  # type: ignore[union-attr]
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b85decode(data.replace(",", "<"))))
    return found


def test_the_page_is_a_folder_of_static_files(tmp_path: Path) -> None:
    page = write_page([make_run(tmp_path / "run")])
    assert page == tmp_path / "run" / "viewer" / "index.html"
    files = {path.relative_to(page.parent).as_posix() for path in page.parent.rglob("*") if path.is_file()}
    assets = {f"assets/{name}" for name in (*STYLES, *SCRIPTS, "uPlot.LICENSE")}
    data = {"data/index.js", "data/run0-update2.js", "data/run0-update4.js"}
    assert files == {"index.html", "textgym_manifest.json"} | assets | data
    text = page.read_text()
    named = set(re.findall(r'(?:src|href)="([^"#][^":]*)"', text))
    assert named <= files, "it loads nothing that is not in the folder"


def test_it_is_written_again_and_never_over_other_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", updates=(2,))
    write_page([run])
    write_record(run, record(4))
    page = write_page([run])
    assert (page.parent / "data" / "run0-update4.js").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="files that textgym did not write"):
        write_page([run], tmp_path / "mine")


@pytest.mark.parametrize("single_file", [False, True])
def test_texts_of_runs_are_only_in_encoded_data(tmp_path: Path, single_file: bool) -> None:
    run = make_run(tmp_path / "<b>run")
    page = write_page([run], single_file=single_file)
    for path in page.parent.rglob("*.*s") if not single_file else [page]:
        text = path.read_text(encoding="utf-8")
        assert "hacked" not in text
        assert "learning_rate" not in text
    for path in page.parent.glob("data/*.js"):
        assert re.fullmatch(r"[\x20\x22-\x3b\x3d-\x5b\x5d-\x7e\n!]+", path.read_text()), "no <, no backslash"
    assert "<title>&lt;b&gt;run - textgym</title>" in page.read_text(encoding="utf-8")


def test_a_single_file_holds_everything(tmp_path: Path) -> None:
    page = write_page([make_run(tmp_path / "run")], tmp_path / "page", single_file=True)
    assert {path.name for path in page.parent.iterdir()} == {"index.html", "textgym_manifest.json"}
    text = page.read_text(encoding="utf-8")
    assert text.count('textgym.record("0/') == 2
    assert " src=" not in text.replace("script.src", "")


def test_a_single_file_that_browsers_cannot_open_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textgym.viewer.page.LARGEST_SINGLE_FILE", 1000)
    with pytest.raises(ValueError, match="leave --single-file out"):
        write_page([make_run(tmp_path / "run")], tmp_path / "page", single_file=True)
    assert not (tmp_path / "page").exists()


def test_runs_of_one_name_are_told_apart_and_a_name_is_no_template(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "{scripts}") for name in ("a", "b")]
    page = write_page(runs, tmp_path / "page")
    assert [run["name"] for run in index_of(page)["runs"]] == [str(run) for run in runs]
    assert page.read_text().count("data/index.js") == 1


def test_rows_of_a_record_are_cut_at_their_lengths() -> None:
    first, second = rows_of(record())
    assert (first.text, first.prompt, first.outcomes["score"]) == (" good fun", "A film", 1.25)
    assert first.numbers["kl"] == [0.5, 0.25]
    assert second.text == EVIL + EVIL + " good"
    assert second.numbers["kl"] == [-0.5, 0.0], "the environment's token has none"
    assert first.total("kl") == 0.75
    assert first.value_error == 0.75
    assert second.value_error is None, "a row without a score is not trained on"
    assert first.clipped == 0.5


def test_highlights_name_the_most_striking_rows() -> None:
    highlights = Highlights()
    repeated = {
        "tokens": {"piece": [0, 2, *[1] * 9], "reward": [0.0] * 11},
        "rows": {"prompt": [0, 1], "length": [2, 9], "score": [-1.0, 3.0], "stopped": [True, False]},
        "numbers": {"log_prob": [0.0] * 11, "kl": [1.0] * 11},
    }
    highlights.add(rows_of(record(2)))
    highlights.add(rows_of(record(4, **repeated)))
    lists = {
        entry["title"]: [(row["update"], row["row"], row["value"]) for row in entry["rows"]]
        for entry in highlights.lists()
    }
    assert lists["Largest KL"][0] == (4, 1, 9.0)
    assert lists["Repetition"] == [(4, 1, 0.8333)]
    assert lists["Most clipped"] == [(2, 0, 0.5)]
    assert lists["Lowest scores"][0] == (4, 0, -1.0)
    assert lists["Highest scores"][0] == (4, 1, 3.0)
    assert lists["Unscored"] == [(2, 1, 2.0)]


def test_rows_on_which_reward_functions_disagree_stand_out() -> None:
    rows = {
        "prompt": [0, 0, 0, 0],
        "length": [1] * 4,
        "score": [0.0] * 4,
        "stopped": [True] * 4,
        "reward/model": [0.0, 0.0, 0.0, 100.0],
        "reward/judge": [1.0, 1.0, 1.0, 0.0],
        "reward/constant": [1.0, 1.0, None, 1.0],
    }
    tokens = {"piece": [0] * 4, "reward": [0.0] * 4}
    spreads = disagreements(rows_of(record(rows=rows, tokens=tokens, numbers={"kl": [0.0] * 4})))
    assert max(range(4), key=spreads.__getitem__) == 3
    assert disagreements([]) == []


def test_the_index_has_curves_records_checkpoints_and_repeated_prompts(tmp_path: Path) -> None:
    [run] = index_of(write_page([make_run(tmp_path / "run")]))["runs"]
    assert run["metrics"]["x"] == [4, 8, 12, 16]
    assert run["metrics"]["columns"] == {"objective/scores": [1.0, 2.0, 3.0, 4.0]}
    assert [(entry["update"], entry["rows"], entry["score"]) for entry in run["records"]] == [
        (2, 2, 1.25),
        (4, 2, 1.25),
    ]
    assert run["checkpoints"] == [4]
    assert {history["prompt"]: history["places"] for history in run["histories"]} == {
        "A film": [[2, 0], [4, 0]],
        EVIL: [[2, 1], [4, 1]],
    }
    assert run["config"] == {"env": EVIL, "learning_rate": "0.1"}


def test_two_runs_of_different_tasks_have_each_their_metrics(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", metric="loss"), make_run(tmp_path / "b", updates=(), metric="objective/kl")]
    first, second = index_of(write_page(runs, tmp_path / "page"))["runs"]
    assert list(first["metrics"]["columns"]) == ["loss"]
    assert list(second["metrics"]["columns"]) == ["objective/kl"]
    assert second["records"] == []


def test_half_written_files_of_a_run_in_progress_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = records_of(run)[1]
    path.write_bytes(path.read_bytes()[:40])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"objective/scores": 5.0, "epi')
    (run / "config.json").write_text("{")
    page = write_page([run])
    [found] = index_of(page)["runs"]
    assert len(found["metrics"]["x"]) == 4
    assert [entry["update"] for entry in found["records"]] == [2]
    assert [warning.partition(" is left out")[0] for warning in found["warnings"]] == ["update-000004.json.gz"]
    assert not (page.parent / "data" / "run0-update4.js").exists()


def test_a_run_without_anything_yet_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"kind": "textgym run"}')
    [found] = index_of(write_page([run]))["runs"]
    assert found["metrics"]["x"] == []
    assert found["records"] == []


@pytest.mark.parametrize("content", [None, "{", "[]", '{"kind": "something else"}'])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(DamagedFolderError, match=r"is no run folder.*--output-dir of textgym train"):
        write_page([tmp_path])
    assert not (tmp_path / "viewer").exists()


def test_a_run_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    records_of(run)[0].write_bytes(gzip.compress(json.dumps({"format": FORMAT + 1, "textgym": "9"}).encode()))
    with pytest.raises(DamagedFolderError, match="update textgym"):
        read_run(run)


def test_metrics_that_are_not_finite_are_gaps_and_long_runs_are_thinned(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"updates": 1, "loss": NaN}\n{"updates": 2, "eval/score": 1.23456789}\nnull\n')
    metrics = read_metrics(path)
    assert metrics["clock"] == "updates"
    assert metrics["columns"] == {"loss": [None, None], "eval/score": [None, 1.2346]}
    path.write_text("".join(f'{{"episodes": {i}, "loss": {i}}}\n' for i in range(3 * MOST_POINTS)))
    x = read_metrics(path)["x"]
    assert (len(x), x[0], x[-1]) == (MOST_POINTS, 0, 3 * MOST_POINTS - 1)


def test_the_command_says_which_file_to_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    cli.main(["view", *map(str, runs), "--output-dir", str(tmp_path / "page"), "--single-file"])
    assert capsys.readouterr().out == f"open {tmp_path / 'page' / 'index.html'} in a browser\n"
    with pytest.raises(SystemExit, match="is no run folder"):
        cli.main(["view", str(tmp_path)])


def test_following_a_run_renews_the_page_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", updates=(2,))
    claim = RunClaim(run, resume=True)
    seen: list[tuple[bool, int]] = []

    def sleep(seconds: float) -> None:
        """What happens between two looks at the run: it makes an update, then nothing, then it ends."""
        index = index_of(run / "viewer" / "index.html")
        seen.append((index["live"], len(index["runs"][0]["metrics"]["x"])))
        if len(seen) == 1:
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"objective/scores": 5.0, "episodes": 20}\n')
        if len(seen) == 3:
            claim.release()

    monkeypatch.setattr(time, "sleep", sleep)
    cli.main(["view", str(run), "--follow"])
    assert seen == [(True, 4), (True, 5), (True, 5)]
    assert index_of(run / "viewer" / "index.html")["live"] is False


def test_a_page_that_is_written_once_does_not_ask_for_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", updates=(2,))
    claim = RunClaim(run, resume=True)
    cli.main(["view", str(run)])
    claim.release()
    assert index_of(run / "viewer" / "index.html")["live"] is False
    assert "with --follow the page renews itself" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="give --follow or --single-file, not both"):
        View((run,), follow=True, single_file=True)
