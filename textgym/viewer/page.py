"""The page of `textgym view`: a folder of static files that opens in a browser without a server or a network."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Sequence, Set
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from textgym.data.files import atomic_folder
from textgym.data.manifests import read_run
from textgym.display import html_text
from textgym.errors import DamagedFolderError
from textgym.viewer.growing_folder import GrowingFolder
from textgym.viewer.records import NewerRecordError, records_of, update_of
from textgym.viewer.runs import describe_run
from textgym.viewer.summaries import Summary, read_summary, stamp_of, summary_of

KIND = "textgym viewer"
STYLES = ("uPlot.min.css", "viewer.css")
SCRIPTS = ("uPlot.iife.min.js", "data.js", "colours.js", "curves.js", "tokens.js", "rows.js", "live.js", "viewer.js")
"""In the order in which they are loaded."""
LARGEST_SINGLE_FILE = 50_000_000
"""Characters of a single file that browsers open without trouble."""
DIGITS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~"
"""Those of `base64.b85encode`, but a comma for `<`, which means something to HTML."""


def write_page(
    runs: Sequence[str | Path], output: str | Path | None = None, single_file: bool = False, live: bool = False
) -> Path:
    """Write the page of one or several runs, and return its `index.html`.

    Of a page that is there, what is still right is kept, so that writing it again takes as long as what is new.

    Args:
        runs: Run folders, finished or in progress.
        output: Folder to write; by default `viewer` in the first run folder. A page that is there is replaced.
        single_file: Whether to put everything into `index.html`, for small runs.
        live: Whether the page will be written again, because a run is in progress. An open page then looks for new
            data every few seconds, until it is written with `live=False`; a single file does not.

    Raises:
        RunFolderError: If a folder holds no run, or one of another version.
        DamagedFolderError: If a newer version of textgym wrote a record.
        FileExistsError: If the output folder has other files.
        ValueError: If a single file would be too large.
    """
    page = Page(runs, output)
    return page.write_single_file() if single_file else page.write(live)


class RecordGoneError(Exception):
    """The run has removed a record since it was listed: it was resumed from an earlier checkpoint, for example."""


class PageRecord:
    """A record in a page: the number of its run, its file in the run folder, and its summary."""

    def __init__(self, run: int, path: Path) -> None:
        self.run, self.path, self.update = run, path, update_of(path)
        self.summary: Summary = {}
        self.is_new = True
        name = f"data/run{run}-update{self.update}"
        self.script_name, self.summary_name = f"{name}.js", f"{name}.json"

    def script(self) -> str:
        """Return the script that hands the record to the page.

        Raises:
            RecordGoneError: If there is no such file any more.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError as error:
            raise RecordGoneError from error
        return _call("record", data, f"{self.run}/{self.update}", self.summary["prompts"])


class Page:
    """The page of one or several runs, which can be written again and again while they are in progress.

    Each record has two files in `data/`: a script that the page loads when the record is shown, and its summary, from
    which the index is made.

    Args:
        runs: Run folders, finished or in progress.
        output: Folder of the page; by default `viewer` in the first run folder.
    """

    def __init__(self, runs: Sequence[str | Path], output: str | Path | None = None) -> None:
        self.runs = [Path(run) for run in runs]
        self.folder = self.runs[0] / "viewer" if output is None else Path(output)
        self.summaries: dict[str, Summary] = {}  # by the name of their file

    def write(self, live: bool = False) -> Path:
        """Write what is new, and return `index.html`; arguments and errors as of `write_page`."""
        return self._repeated(lambda: self._write(live))

    def write_single_file(self) -> Path:
        """Write a page that is one file, and return it; errors as of `write_page`."""
        return self._repeated(self._write_single_file)

    def _repeated(self, write: Callable[[], Path]) -> Path:
        """Write the page; start again each time that a run has removed a record meanwhile, which is then not listed."""
        for run in self.runs:
            read_run(run)
        while True:
            try:
                return write()
            except RecordGoneError:
                continue

    def _write(self, live: bool) -> Path:
        folder = GrowingFolder(self.folder, KIND, "textgym view")
        runs, records = self._read(folder.files.keys())
        keep: list[str] = []
        write: dict[str, Callable[[], str]] = {}
        for record in records:
            if record.is_new:
                write[record.script_name] = record.script
                write[record.summary_name] = partial(_json, record.summary)
            else:
                keep += [record.script_name, record.summary_name]
        # The index comes after what it names, and the page comes last.
        write |= {f"assets/{name}": partial(_asset, name) for name in (*STYLES, *SCRIPTS, "uPlot.LICENSE")}
        write["data/index.js"] = partial(_index, runs, live)
        write["index.html"] = partial(_linked, _title(runs))
        folder.update(keep, write)
        return self.folder / "index.html"

    def _write_single_file(self) -> Path:
        with atomic_folder(self.folder, KIND, "textgym view", overwrite=True) as temporary:
            runs, records = self._read(set())
            scripts = chain([_index(runs, live=False)], (record.script() for record in records))
            (temporary / "index.html").write_text(_single_file(_title(runs), scripts), encoding="utf-8")
        return self.folder / "index.html"

    def _read(self, there: Set[str]) -> tuple[list[dict[str, Any]], list[PageRecord]]:
        """Return what the index says of each run, and the records of all runs.

        Args:
            there: Names of the files that the page has.
        """
        runs: list[dict[str, Any]] = []
        records: list[PageRecord] = []
        for number, run in enumerate(self.runs):
            own, warnings = self._read_records(number, run, there)
            runs.append(describe_run(run, [record.summary for record in own], warnings))
            records += own
        self.summaries = {record.summary_name: record.summary for record in records}
        if len({run["name"] for run in runs}) < len(runs):
            for description, run in zip(runs, self.runs, strict=True):
                description["name"] = str(run)
        return runs, records

    def _read_records(self, number: int, run: Path, there: Set[str]) -> tuple[list[PageRecord], list[str]]:
        """Return the records of a run, and what is to be said of those that cannot be read."""
        records, warnings = [], []
        for path in records_of(run.resolve()):
            record = PageRecord(number, path)
            try:
                kept = self._kept(record, there)
                record.is_new = kept is None
                record.summary = summary_of(path) if kept is None else kept
            except NewerRecordError:
                raise
            except (DamagedFolderError, FileNotFoundError) as error:  # the run may have removed it just now
                warnings.append(f"{path.name} is left out: {error}")
            else:
                records.append(record)
        return records, warnings

    def _kept(self, record: PageRecord, there: Set[str]) -> Summary | None:
        """Return the summary that was made of this record before; `None` if its files have to be written."""
        if not {record.script_name, record.summary_name} <= there or not (self.folder / record.script_name).exists():
            return None
        kept = self.summaries.get(record.summary_name) or read_summary(self.folder / record.summary_name)
        return kept if kept is not None and kept["record"] == stamp_of(record.path) else None


def _index(runs: Sequence[dict[str, Any]], live: bool) -> str:
    """Return the script that hands the index to the page."""
    index = _json({"textgym": version("textgym"), "live": live, "runs": runs})
    return _call("index", gzip.compress(index.encode("ascii"), mtime=0))


def _linked(title: str) -> str:
    """Return a page whose scripts and data are files beside it."""
    styles = [f'<link rel="stylesheet" href="assets/{name}">' for name in STYLES]
    names = (*(f"assets/{name}" for name in SCRIPTS), "data/index.js")
    return _page(title, styles, [f'<script src="{name}"></script>' for name in names])


def _single_file(title: str, scripts: Iterable[str]) -> str:
    """Return a page that has its scripts and data in it."""
    texts, size = [], 0
    for text in scripts:
        texts.append(text)
        size += len(text)
        if size > LARGEST_SINGLE_FILE:
            raise ValueError(
                f"the records are more than {LARGEST_SINGLE_FILE / 1e6:.0f} MB, too much for browsers in a single "
                "file: leave --single-file out"
            )
    styles = [f"<style>{_asset(name)}</style>" for name in STYLES]
    return _page(title, styles, [f"<script>{text}</script>" for text in (*map(_asset, SCRIPTS), *texts)])


def _page(title: str, styles: list[str], scripts: list[str]) -> str:
    parts = {"{title}": html_text(title), "{styles}": "\n".join(styles), "{scripts}": "\n".join(scripts)}
    # In one pass, since a title may spell the name of another part.
    return re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], _asset("index.html"))


def _title(runs: Sequence[dict[str, Any]]) -> str:
    return ", ".join(run["name"] for run in runs)


def _asset(name: str) -> str:
    return (files("textgym.viewer") / "assets" / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _call(function: str, data: bytes, *arguments: Any) -> str:
    """Return a script that hands data to the page, in characters that mean nothing to HTML or JavaScript."""
    return f"textgym.{function}({', '.join(json.dumps(argument) for argument in (*arguments, base85(data)))});\n"


def base85(data: bytes) -> str:
    """Return data as digits, five for four bytes; `base64.b85encode` takes ten times as long.

    >>> base85(b"text")
    'bY*yS'
    """
    padding = -len(data) % 4
    words = np.frombuffer(data + bytes(padding), dtype=">u4").astype(np.int64)
    digits = words[:, None] // 85 ** np.arange(4, -1, -1) % 85
    text = np.frombuffer(DIGITS, dtype=np.uint8)[digits].tobytes()
    return text[: len(text) - padding].decode("ascii")
