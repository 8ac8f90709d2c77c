"""The page of `textgym view`: a folder of static files that opens in a browser without a server or a network."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from textgym.data.files import atomic_folder
from textgym.viewer.records import records_of, update_of
from textgym.viewer.runs import read_run

KIND = "textgym viewer"
STYLES = ("uPlot.min.css", "viewer.css")
SCRIPTS = ("uPlot.iife.min.js", "data.js", "colours.js", "curves.js", "tokens.js", "rows.js", "viewer.js")
"""In the order in which they are loaded."""
LARGEST_SINGLE_FILE = 50_000_000
"""Characters of a single file that browsers open without trouble."""


def write_page(runs: Sequence[str | Path], output: str | Path | None = None, single_file: bool = False) -> Path:
    """Write the page of one or several runs, and return its `index.html`.

    Args:
        runs: Run folders, finished or in progress.
        output: Folder to write; by default `viewer` in the first run folder. A page that is there is replaced.
        single_file: Whether to put everything into `index.html`, for small runs.

    Raises:
        DamagedFolderError: If a folder holds no run, or a newer version of textgym wrote it.
        FileExistsError: If the output folder has other files.
        ValueError: If a single file would be too large.
    """
    folders = [Path(run) for run in runs]
    folder = folders[0] / "viewer" if output is None else Path(output)
    index = {"textgym": version("textgym"), "runs": [read_run(run) for run in folders]}
    scripts = {"data/index.js": _call("index", _compressed(index))}
    for number, run in enumerate(folders):
        readable = {entry["update"] for entry in index["runs"][number]["records"]}
        for path in records_of(run):
            if update_of(path) in readable:
                key = f"{number}/{update_of(path)}"
                scripts[f"data/run{number}-update{update_of(path)}.js"] = _call("record", path.read_bytes(), key)
    title = ", ".join(run["name"] for run in index["runs"])
    with atomic_folder(folder, KIND, "textgym view", overwrite=True) as temporary:
        if single_file:
            (temporary / "index.html").write_text(_single_file(title, scripts), encoding="utf-8")
        else:
            _write_files(temporary, title, scripts)
    return folder / "index.html"


def _write_files(folder: Path, title: str, scripts: dict[str, str]) -> None:
    (folder / "data").mkdir()
    (folder / "assets").mkdir()
    for name in (*STYLES, *SCRIPTS, "uPlot.LICENSE"):
        (folder / "assets" / name).write_text(_asset(name), encoding="utf-8")
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="ascii")
    styles = [f'<link rel="stylesheet" href="assets/{name}">' for name in STYLES]
    loaded = [f'<script src="{name}"></script>' for name in (*(f"assets/{name}" for name in SCRIPTS), "data/index.js")]
    (folder / "index.html").write_text(_page(title, styles, loaded), encoding="utf-8")


def _single_file(title: str, scripts: dict[str, str]) -> str:
    if (size := sum(map(len, scripts.values()))) > LARGEST_SINGLE_FILE:
        raise ValueError(
            f"the records are {size / 1e6:.0f} MB, too much for browsers in a single file: leave --single-file out"
        )
    styles = [f"<style>{_asset(name)}</style>" for name in STYLES]
    loaded = [f"<script>{text}</script>" for text in (*map(_asset, SCRIPTS), *scripts.values())]
    return _page(title, styles, loaded)


def _page(title: str, styles: list[str], scripts: list[str]) -> str:
    page = _asset("index.html").replace("{title}", html.escape(title)).replace("{styles}", "\n".join(styles))
    return page.replace("{scripts}", "\n".join(scripts))


def _asset(name: str) -> str:
    return (files("textgym.viewer") / "assets" / name).read_text(encoding="utf-8")


def _compressed(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return gzip.compress(text.encode("ascii"), mtime=0)


def _call(function: str, data: bytes, *arguments: str) -> str:
    """Return a script that hands data to the page, in characters that mean nothing to HTML or JavaScript."""
    text = base64.b85encode(data).replace(b"<", b",").decode("ascii")
    return f"textgym.{function}({', '.join(json.dumps(argument) for argument in (*arguments, text))});\n"
