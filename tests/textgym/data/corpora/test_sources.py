"""Fetching: checksums, no network, nothing half-written. pip is pointed at folders, never at a network."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from textgym.data.corpora import sources
from textgym.data.corpora.sources import CHITCHAT, VADER, Archive, FetchError, Snippet

WHEEL = "textgym_fake-1.0-py3-none-any.whl"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no index to fetch from."""
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    metadata = {
        "METADATA": "Metadata-Version: 2.1\nName: textgym-fake\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        for name, content in metadata.items():
            wheel.writestr(f"textgym_fake-1.0.dist-info/{name}", content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def archive(index: Path) -> Archive:
    content = (index / WHEEL).read_bytes()
    return Archive("textgym-fake", "1.0", WHEEL, hashlib.sha256(content).hexdigest(), len(content))


def test_a_fetched_file_is_cached_and_not_fetched_again(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = archive(index)
    path = sources.fetch(wanted)
    assert path == cache / "downloads" / WHEEL
    assert [entry.name for entry in path.parent.iterdir()] == [WHEEL]
    monkeypatch.setattr(sources, "_pip_download", lambda *_: pytest.fail("fetched again"))
    assert sources.fetch(wanted) == path


def test_a_torn_file_in_the_cache_is_fetched_again(cache: Path, index: Path) -> None:
    torn = cache / "downloads" / WHEEL
    torn.parent.mkdir(parents=True)
    torn.write_bytes((index / WHEEL).read_bytes()[:50])
    assert sources.fetch(archive(index)).read_bytes() == (index / WHEEL).read_bytes()


def test_an_altered_file_of_the_index_is_refused(cache: Path, index: Path) -> None:
    wanted = archive(index)
    with zipfile.ZipFile(index / WHEEL, "a") as wheel:
        wheel.writestr("evil.py", "")
    with pytest.raises(FetchError, match=r"does not have the SHA-256 pinned.*put the file \(sha256"):
        sources.fetch(wanted)
    assert list((cache / "downloads").iterdir()) == []


def test_without_a_network_the_error_says_what_to_do(cache: Path) -> None:
    with pytest.raises(FetchError) as error:
        sources.movie_snippets()
    message = str(error.value)
    assert "Is there a network?" in message
    assert str(cache / "downloads" / VADER.filename) in message
    assert VADER.sha256 in message
    assert list((cache / "downloads").iterdir()) == []


def test_a_corrupt_archive_without_a_network_is_not_read(cache: Path) -> None:
    corrupt = cache / "downloads" / CHITCHAT.filename
    corrupt.parent.mkdir(parents=True)
    corrupt.write_bytes(b"not a zip file")
    with pytest.raises(FetchError, match=r"Check the network and run again"):
        sources.chitchat()


def test_splits_are_disjoint_stable_and_as_large_as_they_say() -> None:
    snippets = [Snippet(f"A film, number {index}.", 0.0) for index in range(4000)]
    shares = {split: sum(s.split == split for s in snippets) / 4000 for split in ("train", "policy", "test")}
    assert shares == pytest.approx({"train": 0.8, "policy": 0.15, "test": 0.05}, abs=0.02)
    # A duplicate, even in other letter case or with another rating, stands on the same side.
    assert all(Snippet(s.text.upper(), 3.0).split == s.split for s in snippets)
    assert Snippet("An unforgettable film.", 3.0).split == "train"


@pytest.mark.data
@pytest.mark.skipif(not (sources.cache_dir() / "downloads" / VADER.filename).exists(), reason="not fetched")
def test_the_movie_snippets_are_what_the_docs_say() -> None:
    snippets = sources.movie_snippets()
    assert len(snippets) == 10_605
    assert all(-4.0 <= snippet.rating <= 4.0 and snippet.text for snippet in snippets)
    texts = {split: {s.text.lower() for s in snippets if s.split == split} for split in ("train", "policy", "test")}
    assert not texts["train"] & texts["policy"]
    assert not texts["train"] & texts["test"]
    assert not texts["policy"] & texts["test"]
