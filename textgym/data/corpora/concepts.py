"""Words, and example sentences that contain them.

Source: the example sentences of WordNet 3.0 (Princeton University; under its own permissive licence, which is in the
package), from Debian's wordnet-base. It is downloaded once (6.5 MB) and never redistributed.
"""

from __future__ import annotations

import io
import re
import tarfile
from functools import lru_cache

from textgym.data.corpora.sources import Archive, fetch
from textgym.data.corpora.splits import in_split
from textgym.data.rows import Row

WORDNET = Archive(
    "wordnet-base",
    "1:3.0-37",
    "wordnet-base_1%3a3.0-37_all.deb",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    6_467_132,
    client="apt",
)
EXAMPLE = re.compile(r'"([^"]+)"')
WORD = re.compile(r"[a-z]+")
FUNCTION_WORDS = set(
    WORD.findall(
        "about above after all and any are because been before being but can could did does done down each for "
        "from had has have her here him his how into its let may might more most must not off one only other our "
        "out over own same she should some such than that the their them then there these they this those too "
        "under until very was were what when where which while who whom why will with would you your "
    )
)


def concept_prompts(split: str) -> list[Row]:
    """Return rows with `prompt` (`"dog, park, run ="`), `concepts` (these words) and `references` (sentences).

    The concepts are the nouns and verbs of a sentence, as they are inflected there, in alphabetical order. Sentences
    have 4 to 14 words and 2 to 5 concepts. Sentences with the same concepts are references of the same row.

    Args:
        split: `"train"`, `"validation"` or `"test"`.

    Raises:
        ValueError: If the split is unknown.
        FetchError: If there is no apt-get, or the download or its checksum fails.
    """
    rows = [
        {"prompt": f"{', '.join(concepts)} =", "concepts": list(concepts), "references": list(sentences)}
        for concepts, sentences in _sentences().items()
    ]
    return in_split(rows, split)


@lru_cache(maxsize=1)
def _sentences() -> dict[tuple[str, ...], list[str]]:
    with tarfile.open(fileobj=io.BytesIO(deb_data(fetch(WORDNET).read_bytes()))) as archive:
        nouns_and_verbs = _lemmas(archive, "noun") | _lemmas(archive, "verb")
        examples = [example for part in ("noun", "verb", "adj", "adv") for example in _examples(archive, part)]
    found: dict[tuple[str, ...], list[str]] = {}
    for sentence in dict.fromkeys(examples):
        words = WORD.findall(sentence.lower())
        concepts = tuple(sorted({w for w in words if len(w) > 2 and w in nouns_and_verbs} - FUNCTION_WORDS))
        if 4 <= len(words) <= 14 and 2 <= len(concepts) <= 5:
            found.setdefault(concepts, []).append(sentence)
    return found


def deb_data(package: bytes) -> bytes:
    """Return the member `data.tar.*` of a Debian package, which is an `ar` archive.

    Raises:
        ValueError: If this is not a Debian package.
    """
    # An `ar` archive begins with 8 bytes, "!<arch>\n". Each member has a header of 60 bytes (name in bytes 0 to 15,
    # size in bytes 48 to 57) and begins at an even offset.
    place = 8
    while package.startswith(b"!<arch>\n") and place + 60 <= len(package):
        name, size = package[place : place + 16].decode().strip(), int(package[place + 48 : place + 58])
        if name.startswith("data.tar"):
            return package[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError("this file is not a Debian package: delete it and download it again")


def _lines(archive: tarfile.TarFile, name: str) -> list[str]:
    file = archive.extractfile(f"./usr/share/wordnet/{name}")
    assert file is not None, "the archive matched its checksum, so its members are known"
    return [line for line in file.read().decode().splitlines() if not line.startswith(" ")]  # the licence is indented


def _lemmas(archive: tarfile.TarFile, part: str) -> set[str]:
    return {line.partition(" ")[0] for line in _lines(archive, f"index.{part}")}


def _examples(archive: tarfile.TarFile, part: str) -> list[str]:
    return [example for line in _lines(archive, f"data.{part}") for example in EXAMPLE.findall(line)]
