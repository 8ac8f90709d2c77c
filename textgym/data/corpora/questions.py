"""Questions about general knowledge and computer problems, and their answers.

Source: chatterbot-corpus 1.3.3 (BSD), downloaded once (0.3 MB): the English `trivia` and `tech_support`. Many of its
1,311 exchanges repeat a question; each question is one row with all its answers.
"""

from __future__ import annotations

import zipfile
from functools import lru_cache

import yaml

from textgym.data.corpora.sources import Archive, fetch
from textgym.data.corpora.splits import in_split
from textgym.data.rows import Row

CHATTERBOT = Archive(
    "chatterbot-corpus",
    "1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    345_706,
)
TOPICS = ("trivia", "tech_support")


def question_prompts(split: str) -> list[Row]:
    """Return rows with `prompt` (`"Question: ... Answer:"`), `answer` (the first one) and `references` (all answers).

    Args:
        split: `"train"`, `"validation"` or `"test"`.

    Raises:
        ValueError: If the split is unknown.
        FetchError: If the download or its checksum fails.
    """
    rows = [
        {"prompt": f"Question: {question} Answer:", "answer": answers[0], "references": list(answers)}
        for question, answers in _questions().items()
    ]
    return in_split(rows, split)


@lru_cache(maxsize=1)
def _questions() -> dict[str, list[str]]:
    answers: dict[str, list[str]] = {}
    with zipfile.ZipFile(fetch(CHATTERBOT)) as wheel:
        for topic in TOPICS:
            corpus = yaml.safe_load(wheel.read(f"chatterbot_corpus/data/english/{topic}.yml"))
            for question, answer, *_ in corpus["conversations"]:
                known = answers.setdefault(" ".join(str(question).split()), [])
                known += [text for text in [" ".join(str(answer).split())] if text not in known]
    return answers
