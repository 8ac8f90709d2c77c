"""Download text from packages, check it against a pinned SHA-256, and cache it.

Sources, with the licences that their packages state:

* `movie_snippets`: 10,605 movie-review snippets with about 20 human ratings each, from the source distribution of
  vaderSentiment 3.3.2 (MIT; Hutto and Gilbert, ICWSM 2014). The text is third-party: it is downloaded at run time and
  never redistributed.
* `chitchat`: 7,168 human conversations, from chitchat-dataset 0.9.0 (MIT; Myers et al., 2020).

The modules `articles`, `concepts`, `dialogues`, `questions` and `translations` in this folder name their own sources.
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

from textgym.errors import TextgymError


class FetchError(TextgymError, RuntimeError):
    """Raised if a source cannot be downloaded or is corrupt; the message says what to do."""


@dataclass(frozen=True)
class Archive:
    """A file of a package index, pinned by its SHA-256; `client` is the program that downloads it."""

    package: str
    version: str
    filename: str
    sha256: str
    num_bytes: int
    pip_flags: tuple[str, ...] = ()
    client: Literal["pip", "apt"] = "pip"


@dataclass(frozen=True)
class Snippet:
    """A text with human ratings. `rating` is the mean of about 20 `ratings` from -4 (negative) to 4 (positive)."""

    text: str
    rating: float
    ratings: tuple[int, ...] = ()

    @property
    def split(self) -> str:
        """The split: `"train"` (80%), `"policy"` (15%, prompts for training) or `"test"` (5%, for evaluation).

        It depends on a hash of the text alone, so duplicates are always in the same split.
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
    """Return the cache folder: `$TEXTGYM_CACHE`, or `textgym` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "textgym"
    return Path(os.environ.get("TEXTGYM_CACHE", default))


def movie_snippets() -> list[Snippet]:
    """Return the movie-review snippets with human ratings; they are downloaded on first use (2.5 MB).

    Raises:
        FetchError: If the download or its checksum fails.
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
    """Return the conversations of chitchat-dataset as lists of turns; they are downloaded on first use (8 MB).

    Raises:
        FetchError: If the download or its checksum fails.
    """
    with zipfile.ZipFile(fetch(CHITCHAT)) as wheel:
        conversations = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    return [[_joined(turn) for turn in conversation["messages"]] for conversation in conversations.values()]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, "the archive matched its checksum, so its members are known"
    return file.read()


def _joined(turn: list[dict[str, str]]) -> str:
    """Join the messages of a turn, which are those that a person sent in a row."""
    return " ".join(" ".join(message["text"].split()) for message in turn)


def fetch(archive: Archive) -> Path:
    """Return the path of an archive in the cache; download it first if it is not there.

    Raises:
        FetchError: If the download or its checksum fails.
    """
    path = cache_dir() / "downloads" / archive.filename
    if path.exists():
        if _sha256(path) == archive.sha256:
            return path
        path.unlink()  # incomplete or changed: download it again
    path.parent.mkdir(parents=True, exist_ok=True)
    # pip and apt, because they know the user's index, mirror and proxy settings.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        downloaded = (_pip_download if archive.client == "pip" else _apt_download)(archive, Path(folder))
        os.replace(downloaded, path)
    return path


def _pip_download(archive: Archive, folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    # With the hash in the requirement, pip refuses a changed file before it runs any code from it.
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
    """Download a Debian package without installing it, which needs no root privileges."""
    if shutil.which("apt-get") is None:
        raise FetchError(f"{archive.filename} is a Debian package, and this system has no apt-get. {_by_hand(archive)}")
    command = ["apt-get", "download", "--quiet", f"{archive.package}={archive.version}"]
    process = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    downloaded = folder / archive.filename
    if process.returncode or not downloaded.exists():
        raise FetchError(f"{_explain(archive, process.stdout)} `apt-get update` may help.")
    if _sha256(downloaded) != archive.sha256:
        raise FetchError(f"{archive.filename} does not have the SHA-256 pinned here. {_by_hand(archive)}")
    return downloaded


def _watch(process: subprocess.Popen[str], folder: Path, archive: Archive) -> None:
    """Show a progress bar of the bytes that pip has written so far, because pip's own bar is lost in the pipe."""
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
    for root, _, names in os.walk(folder):  # unlike Path.rglob, it tolerates folders that pip deletes meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(Path(root, name).stat().st_size)
    return max(sizes)


def _explain(archive: Archive, output: str) -> str:
    if "No module named pip" in output:
        return f"pip is missing from {sys.executable}: install it with `python -m ensurepip`. {_by_hand(archive)}"
    if "DO NOT MATCH THE HASHES" in output:
        return f"{archive.filename} from the index does not have the SHA-256 pinned here. {_by_hand(archive)}"
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
