"""Text of the tasks: splits, packages of Debian, and what the fetched sources hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from textgym.data.corpora import articles, concepts, dialogues, sources, translations
from textgym.data.corpora import questions as answers
from textgym.data.corpora.sources import Archive, FetchError
from textgym.data.corpora.splits import SPLITS, in_split, split_of
from textgym.data.overlap import key_of_text
from textgym.data.rows import Row

LOADERS = [
    (answers.question_prompts, [answers.CHATTERBOT], (212, 34, 25)),
    (articles.summary_prompts, [articles.WIKI], (7884, 974, 1004)),
    (articles.fact_prompts, [articles.WIKI], (7884, 974, 1004)),
    (concepts.concept_prompts, [concepts.WORDNET], (20156, 2501, 2490)),
    (dialogues.reply_prompts, [sources.CHITCHAT], (4819, 507, 532)),
    (translations.translation_prompts, translations.CATALOGUES, (1704, 219, 204)),
]


def test_splits_are_disjoint_and_as_large_as_they_say() -> None:
    rows = [{"prompt": f"Question {index}?"} for index in range(3000)]
    parts = {split: in_split(rows, split) for split in SPLITS}
    assert sum(len(part) for part in parts.values()) == 3000
    assert [len(parts[split]) / 3000 for split in SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert split_of("A TEXT") == split_of("a text")
    with pytest.raises(ValueError, match="there is no split 'dev': use 'train', 'validation' or 'test'"):
        in_split(rows, "dev")


def test_a_debian_package_is_an_ar_archive() -> None:
    def member(name: str, content: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        return header + content + b"\n" * (len(content) % 2)

    package = b"!<arch>\n" + member("debian-binary", b"2.0\n") + member("control.tar.xz", b"odd")
    assert concepts.deb_data(package + member("data.tar.xz", b"files")) == b"files"
    for broken in (package, b"", b"PK" + package):
        with pytest.raises(ValueError, match="not a Debian package"):
            concepts.deb_data(broken)


def test_without_apt_the_error_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FetchError, match="has no apt-get") as error:
        sources.fetch(concepts.WORDNET)
    assert str(tmp_path / "downloads" / concepts.WORDNET.filename) in str(error.value)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("load", "archives", "sizes"), LOADERS, ids=lambda value: getattr(value, "__name__", ""))
def test_fetched_text_is_what_the_docs_say(
    load: Callable[[str], list[Row]], archives: list[Archive], sizes: tuple[int, ...]
) -> None:
    if not all((sources.cache_dir() / "downloads" / archive.filename).exists() for archive in archives):
        pytest.skip("not fetched")
    parts = [load(split) for split in SPLITS]
    assert tuple(len(part) for part in parts) == sizes
    for row in (row for part in parts for row in part):
        assert row["prompt"].strip()
        assert row["references"]
        assert all(
            text.strip() for text in ([row["references"]] if isinstance(row["references"], str) else row["references"])
        )
    train, validation, test = ({key_of_text(row["prompt"]) for row in part} for part in parts)
    assert not train & test
    assert not (train | test) & validation
