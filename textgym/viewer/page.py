"""The page of `textgym view`: a folder of static files that opens in a browser without a server or a network."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from textgym.data.files import atomic_folder
from textgym.viewer.records import record_path
from textgym.viewer.runs import read_run

KIND = "textgym viewer"
STYLES = ("uPlot.min.css", "viewer.css")
SCRIPTS = ("uPlot.iife.min.js", "data.js", "colours.js", "curves.js", "tokens.js", "rows.js", "live.js", "viewer.js")
"""In the order in which they are loaded."""
LARGEST_SINGLE_FILE = 50_000_000
"""Characters of a single file that browsers open without trouble."""


def write_page(
    runs: Sequence[str | Path], output: str | Path | None = None, single_file: bool = False, live: bool = False
) -> Path:
    """Write the page of one or several runs, and return its `index.html`.

    Args:
        runs: Run folders, finished or in progress.
        output: Folder to write; by default `viewer` in the first run folder. A page that is there is replaced.
        single_file: Whether to put everything into `index.html`, for small runs.
        live: Whether the page will be written again, because a run is in progress. An open page then looks for new
            data every few seconds, until it is written with `live=False`; a single file does not.

    Raises:
        DamagedFolderError: If a folder holds no run, or a newer version of textgym wrote it.
        FileExistsError: If the output folder has other files.
        ValueError: If a single file would be too large.
    """
    folders = [Path(run) for run in runs]
    folder = folders[0] / "viewer" if output is None else Path(output)
    found = [read_run(run) for run in folders]
    if len({run["name"] for run in found}) < len(found):
        for run, path in zip(found, folders, strict=True):
            run["name"] = str(path)
    title = ", ".join(run["name"] for run in found)
    with atomic_folder(folder, KIND, "textgym view", overwrite=True) as temporary:
        scripts = _data(folders, found, live and not single_file)
        if single_file:
            (temporary / "index.html").write_text(_single_file(title, scripts), encoding="utf-8")
        else:
            _write_files(temporary, title, scripts)
    return folder / "index.html"


def _data(folders: Sequence[Path], runs: Sequence[dict[str, Any]], live: bool) -> Iterator[tuple[str, str]]:
    """Yield name and text of each script with data, one at a time, since records may be large together."""
    yield "data/index.js", _call("index", _compressed({"textgym": version("textgym"), "live": live, "runs": runs}))
    for number, (folder, run) in enumerate(zip(folders, runs, strict=True)):
        for entry in run["records"]:
            update = entry["update"]
            data = record_path(folder, update).read_bytes()
            yield f"data/run{number}-update{update}.js", _call("record", data, f"{number}/{update}")


def _write_files(folder: Path, title: str, scripts: Iterator[tuple[str, str]]) -> None:
    (folder / "data").mkdir()
    (folder / "assets").mkdir()
    for name in (*STYLES, *SCRIPTS, "uPlot.LICENSE"):
        (folder / "assets" / name).write_text(_asset(name), encoding="utf-8")
    for name, text in scripts:
        (folder / name).write_text(text, encoding="ascii")
    styles = [f'<link rel="stylesheet" href="assets/{name}">' for name in STYLES]
    loaded = [f'<script src="{name}"></script>' for name in (*(f"assets/{name}" for name in SCRIPTS), "data/index.js")]
    (folder / "index.html").write_text(_page(title, styles, loaded), encoding="utf-8")


def _single_file(title: str, scripts: Iterator[tuple[str, str]]) -> str:
    texts, size = [], 0
    for _, text in scripts:
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
    parts = {"{title}": html.escape(title), "{styles}": "\n".join(styles), "{scripts}": "\n".join(scripts)}
    # In one pass, since a title may spell the name of another part.
    return re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], _asset("index.html"))


def _asset(name: str) -> str:
    return (files("textgym.viewer") / "assets" / name).read_text(encoding="utf-8")


def _compressed(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return gzip.compress(text.encode("ascii"), mtime=0)


def _call(function: str, data: bytes, *arguments: str) -> str:
    """Return a script that hands data to the page, in characters that mean nothing to HTML or JavaScript."""
    text = base64.b85encode(data).replace(b"<", b",").decode("ascii")
    return f"textgym.{function}({', '.join(json.dumps(argument) for argument in (*arguments, text))});\n"
