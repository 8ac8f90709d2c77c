"""Questions to raters: asked by a reward function, answered by another thread, and kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from textgym.errors import DataError

Answers = tuple[float, ...]
"""Answers that a rater may give: the ratings of a text, or for two texts 1, 1/2 and 0, what the first one earns."""
COMPARED: Answers = (1.0, 0.5, 0.0)


class Question(NamedTuple):
    """One text to rate, or two to compare.

    Attributes:
        prompt: The prompt as text.
        texts: One completion, or two in alphabetical order, so that the same comparison is asked once.
    """

    prompt: str
    texts: tuple[str, ...]

    @property
    def turned(self) -> bool:
        """Whether the second text is shown first, so that the order says nothing of the texts."""
        return bool(hashlib.sha256(json.dumps(self).encode()).digest()[0] & 1) and len(self.texts) == 2


class Questions:
    """Questions that wait for an answer, and all answers so far.

    Args:
        file: JSONL with a line for each answer, which are read at the start and appended to.
        possible: Answers that a rater may give.

    Raises:
        DataError: If the file has a line of another form.
    """

    def __init__(self, file: Path, possible: Answers) -> None:
        self.file, self.possible = file, possible
        self.answers: dict[Question, float] = {}
        self.waiting: dict[Question, None] = {}  # in the order in which they were asked
        self.asked: dict[str, Question] = {}
        self.changed = threading.Condition()
        self.ended = False
        for place, question, answer in _read(file):
            self._check(answer, place)
            self.answers[question] = answer

    def ask(self, questions: Sequence[Question], timeout: float | None) -> None:
        """Wait until all questions have an answer, are skipped, or the time is over.

        Args:
            questions: The questions.
            timeout: Seconds; `None` for no limit.
        """
        with self.changed:
            fresh = [question for question in dict.fromkeys(questions) if question not in self.answers]
            self.waiting.update(dict.fromkeys(fresh))
            self.asked.update({key_of(question): question for question in fresh})
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.ended or not any(q in self.waiting for q in fresh), timeout)
            for question in fresh:
                self.waiting.pop(question, None)

    def next(self, wait: bool = False) -> Question | None:
        """Return the first question that waits; `None` if there is none, or with `wait` after `end`."""
        with self.changed:
            if wait:
                self.changed.wait_for(lambda: self.ended or bool(self.waiting))
            return None if self.ended else next(iter(self.waiting), None)

    def answer(self, question: Question, answer: float | None) -> None:
        """Keep the answer of a question, which may be late; `None` skips the question.

        Raises:
            ValueError: If it is no possible answer.
        """
        if answer is not None:
            self._check(answer, "a rater")
        with self.changed:
            if answer is not None and question not in self.answers:
                _append(self.file, {"prompt": question.prompt, "texts": list(question.texts), "answer": answer})
                self.answers[question] = answer
            self.waiting.pop(question, None)
            self.changed.notify_all()

    def end(self) -> None:
        """Let all waiting threads go on; questions without an answer stay without one."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _check(self, answer: float, whose: str) -> None:
        if answer not in self.possible:
            shown = ", ".join(f"{value:g}" for value in self.possible)
            raise DataError(f"the answer of {whose} is {answer!r}: it must be one of {shown}")


def key_of(question: Question) -> str:
    """Return a short name of a question, for forms."""
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()[:16]


def _append(file: Path, row: dict[str, object]) -> None:
    """Append a line to a file in one write, and flush it to the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as out:
        out.write((json.dumps(row) + "\n").encode())
        os.fsync(out.fileno())


def _read(file: Path) -> Iterator[tuple[str, Question, float]]:
    """Yield the place, the question and the answer of each line; a last line that was not written whole is removed."""
    if not file.exists():
        return
    whole, _, rest = file.read_bytes().rpartition(b"\n")
    if rest:
        warnings.warn(f"the last line of {file} was not written whole, and is removed: {rest!r}", stacklevel=4)
        os.truncate(file, len(whole) + 1 if whole else 0)
    for number, line in enumerate(whole.split(b"\n"), start=1):
        place = f"line {number} of {file}"
        if line.strip():
            try:
                row = json.loads(line)
                question, answer = Question(str(row["prompt"]), tuple(map(str, row["texts"]))), float(row["answer"])
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{place} is no answer of a rater ({error}): remove the line, or choose another file"
                ) from error
            yield place, question, answer
