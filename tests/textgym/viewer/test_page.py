"""The page of `textgym view`: its files, what it says of runs in any state, and that data cannot leave its place."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from textgym import cli
from textgym.agents.runs.claims import RunClaim
from textgym.data.files import TEMPORARY
from textgym.data.manifests import MANIFEST, checked_manifest
from textgym.errors import ConfigError, DamagedFolderError, RunFolderError
from textgym.flags import View
from textgym.viewer import page as pages
from textgym.viewer import summaries, write_page
from textgym.viewer.highlights import Highlights, disagreements, highest_with_low_judge, standardized
from textgym.viewer.page import KIND, SCRIPTS, STYLES, Page, PageRecord
from textgym.viewer.records import FORMAT, Record, record_path, records_of, write_record
from textgym.viewer.rows import rows_of
from textgym.viewer.runs import MOST_POINTS, MOST_UPDATES, describe_run, read_metrics
from textgym.viewer.summaries import prompt_key

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
    records = {f"data/run0-update{update}.{kind}" for update in (2, 4) for kind in ("js", "json")}
    data = {"data/index.js", *records}
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


def read_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the records that are read from now on."""
    read: list[str] = []

    def summary_of(path: Path) -> Any:
        read.append(path.name.removesuffix(".json.gz"))
        return summaries.summary_of(path)

    monkeypatch.setattr(pages, "summary_of", summary_of)
    return read


def state_of(page: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (page.parent / "data").iterdir() if path.name != "index.js"}


@pytest.mark.parametrize("again", [False, True])
def test_a_page_that_is_written_again_reads_and_writes_new_records_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """In the same process, as with --follow, and in another one, which has the files of the page alone."""
    run, read = make_run(tmp_path / "run"), read_of(monkeypatch)
    page = Page([run])
    index = page.write()
    before = state_of(index)
    write_record(run, record(6))
    (page if again else Page([run])).write()
    assert read == ["update-000002", "update-000004", "update-000006"]
    assert {name: time for name, time in state_of(index).items() if name in before} == before
    [found] = index_of(index)["runs"]
    assert [entry["update"] for entry in found["records"]] == [2, 4, 6]
    whole = describe_run(run, [summaries.summary_of(path) for path in records_of(run)])
    assert found["highlights"] == whole["highlights"]
    assert checked_manifest(index.parent, KIND).files.keys() >= {"data/run0-update6.js", "data/run0-update6.json"}


def test_records_that_a_resumed_run_replaces_are_read_again_and_those_that_are_gone_leave_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read = make_run(tmp_path / "run"), read_of(monkeypatch)
    page = Page([run])
    page.write()
    records_of(run)[1].unlink()
    write_record(run, record(2, episodes=9))
    index = page.write()
    assert read[2:] == ["update-000002"]
    assert [(entry["update"], entry["episodes"]) for entry in index_of(index)["runs"][0]["records"]] == [(2, 9)]
    assert state_of(index).keys() == {"run0-update2.js", "run0-update2.json"}


def test_files_of_a_page_that_are_lost_or_of_another_run_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, read = [make_run(tmp_path / name, updates=(2,)) for name in ("a", "b")], read_of(monkeypatch)
    index = write_page(runs, tmp_path / "page")
    write_page(runs[::-1], tmp_path / "page")
    assert len(read) == 4, "the numbers of the runs have changed"
    (index.parent / "data" / "run0-update2.js").unlink()
    (index.parent / "data" / "run1-update2.json").write_text("{")
    write_page(runs[::-1], tmp_path / "page")
    assert len(read) == 6
    checked_manifest(index.parent, KIND)


def test_a_page_leaves_files_of_others_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", updates=(2,))
    index = write_page([run])
    (index.parent / "notes.txt").write_text("mine")
    (index.parent / "data" / "run0-update4.js").write_text("mine")
    write_page([run])
    write_record(run, record(4))
    with pytest.raises(FileExistsError, match=r"run0-update4\.js is not textgym's"):
        write_page([run])
    assert (index.parent / "notes.txt").read_text() == "mine"
    assert (index.parent / "data" / "run0-update4.js").read_text() == "mine"


def test_a_page_whose_writing_was_killed_is_known_as_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")

    def killed(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pages, "_index", killed)
        with pytest.raises(KeyboardInterrupt):
            write_page([run])
    assert not (run / "viewer" / "index.html").exists()
    read = read_of(monkeypatch)
    checked_manifest(write_page([run]).parent, KIND)
    assert read == [], "records that were done stay"


def test_a_page_survives_a_crash_while_its_manifest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is what says that the folder is textgym's, so it is always a whole one."""
    run = make_run(tmp_path / "run", updates=(2,))
    write_text = Path.write_text

    def cut(path: Path, text: str, **options: Any) -> int:
        if path.name.endswith(MANIFEST):
            write_text(path, text[: len(text) // 2], **options)
            raise KeyboardInterrupt
        return write_text(path, text, **options)

    for _ in ("the first time", "over another one"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", cut)
            with pytest.raises(KeyboardInterrupt):
                write_page([run])
        checked_manifest(write_page([run]).parent, KIND)
        write_record(run, record(4))


def test_what_a_killed_process_left_does_not_keep_a_page_from_being_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", updates=(2,))
    (run / "viewer").mkdir()
    (run / "viewer" / f"{TEMPORARY}0-{MANIFEST}").write_text("{")
    checked_manifest(write_page([run]).parent, KIND)


@pytest.mark.parametrize("single_file", [False, True])
def test_a_record_that_the_run_removes_meanwhile_is_left_out(
    single_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    script = PageRecord.script

    def removed(of: PageRecord) -> str:
        record_path(run, 4).unlink(missing_ok=True)
        return script(of)

    monkeypatch.setattr(PageRecord, "script", removed)
    page = write_page([run], single_file=single_file)
    if not single_file:
        [found] = index_of(page)["runs"]
        assert [entry["update"] for entry in found["records"]] == [2]
        assert not (page.parent / "data" / "run0-update4.js").exists()
    checked_manifest(page.parent, KIND)


def test_a_prompt_of_many_records_is_shown_at_even_distances(tmp_path: Path) -> None:
    made = summaries.summary_of(write_record(tmp_path, record(1)))
    many = [{**made, "figures": {**made["figures"], "update": update}} for update in range(1, 3 * MOST_UPDATES + 1)]
    places = describe_run(tmp_path, many)["histories"][0]["places"]
    assert len(places) == MOST_UPDATES
    assert (places[0][0], places[-1][0]) == (1, 3 * MOST_UPDATES)


def test_copies_of_records_are_no_records(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", updates=(2,))
    shutil.copy(records_of(run)[0], run / "records" / "update-000002 (copy).json.gz")
    [found] = index_of(write_page([run]))["runs"]
    assert [entry["update"] for entry in found["records"]] == [2]


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
    assert max(range(4), key=lambda row: spreads[row] or 0.0) == 3
    assert disagreements([]) == []


def test_rows_with_a_high_score_and_a_low_judge_stand_out() -> None:
    rows = {
        "prompt": [0] * 6,
        "length": [1] * 6,
        "score": [0.0, 1.0, 2.0, 3.0, None, 3.0],
        "stopped": [True] * 6,
        "judge": [0.1, 0.2, 0.3, -0.9, -0.9, None],
    }
    tokens = {"piece": [0] * 6, "reward": [0.0] * 6}
    judged = record(rows=rows, tokens=tokens, numbers={"kl": [0.0] * 6}, judges=["judge"])
    gaps = highest_with_low_judge(rows_of(judged))
    assert [row for row, gap in enumerate(gaps) if gap is not None] == [3], "not the unscored or unjudged ones"
    highlights = Highlights()
    highlights.add(rows_of(judged))
    [found] = [entry for entry in highlights.lists() if entry["title"] == "High reward, low judge"]
    assert [(row["update"], row["row"]) for row in found["rows"]] == [(2, 3)]
    assert found["rows"][0]["value"] == pytest.approx(gaps[3], rel=1e-3)
    assert highest_with_low_judge(rows_of(record())) == [None, None], "nobody judges"


@pytest.mark.parametrize("worst", ["reward/first", "reward/second"])
def test_of_several_judges_the_lowest_counts(worst: str) -> None:
    good = {"reward/first": [1.0, 1.0, 1.0, 2.0], "reward/second": [1.0, 1.0, 1.0, 2.0]}
    rows = {
        "prompt": [0] * 4,
        "length": [1] * 4,
        "score": [0.0, 0.0, 0.0, 1.0],
        "stopped": [True] * 4,
        **good,
        worst: [1.0, 1.0, 1.0, 0.0],
    }
    tokens = {"piece": [0] * 4, "reward": [0.0] * 4}
    gaps = highest_with_low_judge(rows_of(record(rows=rows, tokens=tokens, numbers={"kl": [0.0] * 4}, judges=[*good])))
    assert [row for row, gap in enumerate(gaps) if gap is not None] == [3]


@pytest.mark.parametrize("values", [[0.0, 1e-200], [1.0, 1.0, None], [None], []])
def test_numbers_without_a_spread_have_no_standard_scores(values: list[float | None]) -> None:
    assert standardized(values) == [None] * len(values)


def test_highlights_of_many_records_are_those_of_all_their_rows() -> None:
    records = [
        record(update, rows={"prompt": [0, 1], "length": [2, 3], "score": [update % 5, None], "stopped": [True, False]})
        for update in range(1, 13)
    ]
    together, merged = Highlights(), Highlights()
    for made in records:
        together.add(rows_of(made))
        alone = Highlights()
        alone.add(rows_of(made))
        merged.merge(json.loads(json.dumps(alone.best)))
    assert merged.lists() == together.lists()


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
        prompt_key("A film"): [[2, 0], [4, 0]],
        prompt_key(EVIL): [[2, 1], [4, 1]],
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
    RunClaim(run).release()
    [found] = index_of(write_page([run]))["runs"]
    assert found["metrics"]["x"] == []
    assert found["records"] == []


@pytest.mark.parametrize("content", [None, "{", "[]", '{"kind": "something else"}'])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=f"{tmp_path} is no run folder: "):
        write_page([tmp_path])
    assert not (tmp_path / "viewer").exists()


def test_a_run_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    records_of(run)[0].write_bytes(gzip.compress(json.dumps({"format": FORMAT + 1, "textgym": "9"}).encode()))
    with pytest.raises(DamagedFolderError, match="update textgym"):
        write_page([run])
    assert not (run / "viewer").exists()


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
