"""Real text fetched once as a package of an index, checked against a pinned SHA-256, and kept in a cache folder.

Sources (licences as their packages state them):

* `movie_snippets`: 10,605 movie-review snippets with about 20 human ratings each, from the vaderSentiment 3.3.2 sdist
  (MIT; Hutto and Gilbert, ICWSM 2014). The text is third-party: it is fetched at run time and never redistributed.
* `chitchat`: 7,168 human conversations, from chitchat-dataset 0.9.0 (MIT; Myers et al., 2020).

The modules `answers`, `articles`, `concepts`, `dialogues` and `translations` beside this one name theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class FetchError(RuntimeError):
    """A source could not be fetched or is corrupt; the message says what to do next."""


@dataclass(frozen=True)
class Archive:
    """A file of a package index, pinned by its SHA-256; `client` is the program that fetches it."""

    package: str
    version: str
    filename: str
    sha256: str
    num_bytes: int
    pip_flags: tuple[str, ...] = ()
    client: Literal["pip", "apt"] = "pip"


@dataclass(frozen=True)
class Snippet:
    """One human-rated text. `rating` is the mean of about 20 `ratings` from -4 (negative) to 4 (positive)."""

    text: str
    rating: float
    ratings: tuple[int, ...] = ()

    @property
    def split(self) -> str:
        """`"train"` (80%), `"policy"` (15%, prompts to train on) or `"test"` (5%, prompts to evaluate on).

        Decided by a hash of the text, so a duplicate can never stand on both sides.
        """
        bucket = int.from_bytes(hashlib.sha256(self.text.lower().encode()).digest()[:4], "big") % 100
        return "train" if bucket < 80 else "policy" if bucket < 95 else "test"


VADER = Archive(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2_466_783,
    ("--no-binary", ":all:", "--no-build-isolation"),
)
CHITCHAT = Archive(
    "chitchat-dataset",
    "0.9.0",
    "chitchat_dataset-0.9.0-py3-none-any.whl",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    8_105_664,
)


def cache_dir() -> Path:
    """Where fetched and converted files live: `$TEXTGYM_CACHE`, or `textgym` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "textgym"
    return Path(os.environ.get("TEXTGYM_CACHE", default))


def movie_snippets() -> list[Snippet]:
    """The human-rated movie-review snippets, fetched on first use (2.5 MB).

    Raises:
        FetchError: no network, a wrong checksum, or a changed archive.
    """
    with tarfile.open(fetch(VADER), "r:gz") as outer:
        nested = _member(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(nested), mode="r:gz") as inner:
        texts, raters = (
            _member(inner, f"hutto_ICWSM_2014/movieReviewSnippets_{name}.txt").decode("utf-8-sig")
            for name in ("GroundTruth", "anonDataRatings")
        )
    rows = [line.split("\t", 2) for line in texts.splitlines() if line.strip()]
    given = {line.split("\t")[0]: json.loads(line.split("\t")[3]) for line in raters.splitlines() if line.strip()}
    return [
        Snippet(text=" ".join(text.split()), rating=float(rating), ratings=tuple(given[number]))
        for number, rating, text in rows
    ]


def chitchat() -> list[list[str]]:
    """The conversations of chitchat-dataset, each a list of turns, fetched on first use (8 MB).

    Raises:
        FetchError: no network, a wrong checksum, or a changed archive.
    """
    with zipfile.ZipFile(fetch(CHITCHAT)) as wheel:
        conversations = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    return [[_joined(turn) for turn in conversation["messages"]] for conversation in conversations.values()]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, "the archive matched its checksum, so its members are known"
    return file.read()


def _joined(turn: list[dict[str, str]]) -> str:
    """A turn is one or more messages that a person sent in a row."""
    return " ".join(" ".join(message["text"].split()) for message in turn)


def fetch(archive: Archive) -> Path:
    """Path of the archive in the cache; downloads it with pip or apt, which know the user's index and proxy settings.

    Raises:
        FetchError: no network, or a wrong checksum.
    """
    path = cache_dir() / "downloads" / archive.filename
    if path.exists():
        if _sha256(path) == archive.sha256:
            return path
        path.unlink()  # a torn or altered copy: fetch it again
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        downloaded = (_pip_download if archive.client == "pip" else _apt_download)(archive, Path(folder))
        os.replace(downloaded, path)
    return path


def _pip_download(archive: Archive, folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    # With a hash in the requirement pip refuses an altered file before anything in it runs.
    requirement.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", *archive.pip_flags, "--dest", str(folder), "--requirement", str(requirement)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "TMPDIR": str(folder)}
    )
    _watch(process, folder, archive)
    output = process.communicate()[0]
    downloaded = folder / archive.filename
    if process.returncode or not downloaded.exists():
        raise FetchError(_explain(archive, output))
    if _sha256(downloaded) != archive.sha256:
        raise FetchError(f"{archive.filename} does not have the SHA-256 pinned here. {_by_hand(archive)}")
    return downloaded


def _apt_download(archive: Archive, folder: Path) -> Path:
    """Fetches a package of Debian, whatever the user's rights: nothing is installed."""
    if shutil.which("apt-get") is None:
        raise FetchError(
            f"{archive.filename} is a package of Debian, and this system has no apt-get. {_by_hand(archive)}"
        )
    command = ["apt-get", "download", "--quiet", f"{archive.package}={archive.version}"]
    process = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    downloaded = folder / archive.filename
    if process.returncode or not downloaded.exists():
        raise FetchError(f"{_explain(archive, process.stdout)} `apt-get update` may be due.")
    if _sha256(downloaded) != archive.sha256:
        raise FetchError(f"{archive.filename} does not have the SHA-256 pinned here. {_by_hand(archive)}")
    return downloaded


def _watch(process: subprocess.Popen[str], folder: Path, archive: Archive) -> None:
    """Draws a progress bar from the bytes that pip has written so far, since pip's own goes to its own terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(f"fetching {archive.filename}", total=archive.num_bytes)
        while process.poll() is None:
            time.sleep(0.1)
            progress.update(task, completed=min(_largest_file(folder), archive.num_bytes))
        if process.returncode == 0:
            progress.update(task, completed=archive.num_bytes)


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(folder):  # which passes over folders that pip takes away meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(Path(root, name).stat().st_size)
    return max(sizes)


def _explain(archive: Archive, output: str) -> str:
    if "No module named pip" in output:
        return f"pip is missing from {sys.executable}: install it with `python -m ensurepip`. {_by_hand(archive)}"
    if "DO NOT MATCH THE HASHES" in output:
        return f"{archive.filename}: the index served a file with another SHA-256 than pinned here. {_by_hand(archive)}"
    reason = next(
        (line for line in reversed(output.splitlines()) if "ERROR" in line or line.startswith("E:")),
        output.strip()[-200:],
    )
    return f"could not fetch {archive.filename} ({reason}). Is there a network? {_by_hand(archive)}"


def _by_hand(archive: Archive) -> str:
    target = cache_dir() / "downloads" / archive.filename
    return f"Check the network and run again, or put the file (sha256 {archive.sha256}) at {target} yourself."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
