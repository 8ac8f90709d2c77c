"""English sentences of user interfaces and their German translations.

Sources, downloaded once (33 MB): the message catalogues of four packages, each under the licence of its package: django
5.2.19 (BSD-3-Clause), wagtail 8.0.1 (BSD-3-Clause), spyder 6.1.8 (MIT) and jupyterlab-language-pack-de-DE 4.5.post3
(BSD-3-Clause). Messages with fewer than three words or with markup are left out.
"""

from __future__ import annotations

import gettext
import io
import re
import zipfile
from collections.abc import Iterator
from functools import lru_cache

from textgym.data.corpora.sources import Archive, fetch
from textgym.data.corpora.splits import in_split
from textgym.data.rows import Row

CATALOGUES = (
    Archive(
        "django",
        "5.2.19",
        "django-5.2.19-py3-none-any.whl",
        "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        8_319_631,
    ),
    Archive(
        "wagtail",
        "8.0.1",
        "wagtail-8.0.1-py3-none-any.whl",
        "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
        9_841_588,
    ),
    Archive(
        "spyder",
        "6.1.8",
        "spyder-6.1.8-py3-none-any.whl",
        "4da836742a7138c93392a8a0bd1a5ff40002cf92d217ef0e7bed11b522322f90",
        14_481_595,
    ),
    Archive(
        "jupyterlab-language-pack-de-DE",
        "4.5.post3",
        "jupyterlab_language_pack_de_de-4.5.post3-py2.py3-none-any.whl",
        "b716b56f7e0c884f42152d5e36c253ea0f32ca41f99097d842d3934f4a4bc7fb",
        68_327,
    ),
)
GERMAN = re.compile(r"/(de|de_DE)/LC_MESSAGES/\w+\.mo$")
MARKUP = re.compile(r"[%{}<>&\n\x00]")


def translation_prompts(split: str) -> list[Row]:
    """Return rows with `prompt` (`"English: ... German:"`) and `references` (all translations in the catalogues).

    Args:
        split: `"train"`, `"validation"` or `"test"`.

    Raises:
        ValueError: If the split is unknown.
        FetchError: If the download or its checksum fails.
    """
    rows = [
        {"prompt": f"English: {english} German:", "references": list(german)}
        for english, german in _sentences().items()
    ]
    return in_split(rows, split)


@lru_cache(maxsize=1)
def _sentences() -> dict[str, list[str]]:
    translations: dict[str, list[str]] = {}
    for english, german in (pair for archive in CATALOGUES for pair in _messages(archive)):
        known = translations.setdefault(english, [])
        known += [text for text in [german] if text not in known]
    return translations


def _messages(archive: Archive) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(fetch(archive)) as wheel:
        for name in sorted(filter(GERMAN.search, wheel.namelist())):
            catalogue = gettext.GNUTranslations(io.BytesIO(wheel.read(name)))
            messages: dict[object, str] = vars(catalogue)["_catalog"]  # gettext has no public way to list messages
            for key, german in messages.items():
                # A plural has a tuple as its key. "\x04" separates a message's context from its text.
                english = " ".join(key.rpartition("\x04")[2].split()) if isinstance(key, str) else ""
                if len(english.split()) >= 3 and german != english and not MARKUP.search(f"{key}{german}"):
                    yield english, " ".join(german.split())
