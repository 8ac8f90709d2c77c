"""Words, and an example sentence that uses them.

Source: WordNet 3.0 (Princeton University; a permissive licence of its own, which the package states), the example
sentences in its glosses, from Debian's wordnet-base, fetched once (6.5 MB) and never redistributed.
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
    """Rows with `prompt` (`"dog, park, run ="`), `concepts` (those words) and `references` (the sentences).

    The concepts are the nouns and verbs of a sentence, in the form they have there, in alphabetical order; sentences of
    4 to 14 words with 2 to 5 concepts are taken, and all that share their concepts are references of one row.

    Args:
        split: `"train"`, `"validation"` or `"test"`.

    Raises:
        ValueError: an unknown split.
        FetchError: no network, no apt, or a wrong checksum.
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
    """The archive of files, `data.tar.*`, in a Debian package, which is an `ar` archive of three members.

    Raises:
        ValueError: it is none.
    """
    place = 8  # after "!<arch>\n"; a header of 60 bytes before each member, which an even place begins
    while package.startswith(b"!<arch>\n") and place + 60 <= len(package):
        name, size = package[place : place + 16].decode().strip(), int(package[place + 48 : place + 58])
        if name.startswith("data.tar"):
            return package[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError("this is no Debian package: fetch it again")


def _lines(archive: tarfile.TarFile, name: str) -> list[str]:
    file = archive.extractfile(f"./usr/share/wordnet/{name}")
    assert file is not None, "the archive matched its checksum, so its members are known"
    return [line for line in file.read().decode().splitlines() if not line.startswith(" ")]  # the licence is indented


def _lemmas(archive: tarfile.TarFile, part: str) -> set[str]:
    return {line.partition(" ")[0] for line in _lines(archive, f"index.{part}")}


def _examples(archive: tarfile.TarFile, part: str) -> list[str]:
    return [example for line in _lines(archive, f"data.{part}") for example in EXAMPLE.findall(line)]
