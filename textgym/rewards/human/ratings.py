"""HumanRatings: a reward function whose scores people give while a policy trains."""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from textgym.data.messages import Text, content
from textgym.errors import ConfigError
from textgym.rewards.human.questions import COMPARED, Question, Questions
from textgym.rewards.human.terminal import answer_in_terminal
from textgym.rewards.human.web import RatingServer
from textgym.settings import unmet

Place = Literal["web", "terminal"]
MOST_ANSWERS = 21


class HumanRatings:
    """A reward function that asks people how good each completion is, or which of two is better.

    The answers are appended to a file. A text that has a rating there is not asked for again, so a run that was stopped
    goes on where it was. A text that is skipped, or that nobody has rated in time, has no score.

    Args:
        file: JSONL file of the answers.
        place: `"web"` serves a form on this machine and prints its address; `"terminal"` asks in the terminal.
        compare: Whether to compare completions instead: those of a prompt in one batch two by two, in their order. The
            better one scores 1, the other one 0, and both 1/2 if they are alike. If their number is odd, the last one
            has no score.
        scale: Lowest and highest rating, whole numbers.
        timeout: Seconds that raters have for a batch; `None` for no limit.
        port: Port of the web form; 0 for any that is free.

    Raises:
        ConfigError: If an argument has a wrong value.
        DataError: If the file has other lines than answers to such questions.
    """

    __name__ = "human_ratings"

    def __init__(
        self,
        file: str | os.PathLike[str],
        place: Place = "web",
        *,
        compare: bool = False,
        scale: tuple[int, int] = (1, 5),
        timeout: float | None = None,
        port: int = 0,
    ) -> None:
        if place not in get_args(Place):
            raise ConfigError(f"place must be one of {get_args(Place)}, got {place!r}")
        low, high = scale
        if any(unmet(end, int) for end in scale) or not 0 < high - low < MOST_ANSWERS:
            raise ConfigError(f"scale must be two whole numbers, at most {MOST_ANSWERS - 1} apart, got {scale!r}")
        if timeout is not None and (unmet(timeout, float) or timeout < 0):
            raise ConfigError(f"timeout must be a number of seconds, or None for no limit, got {timeout!r}")
        if unmet(port, int) or not 0 <= port < 2**16:
            raise ConfigError(f"port must be from 0 to 65535, got {port!r}")
        self.file, self.place, self.compare = os.fspath(file), place, compare
        self.scale, self.timeout, self.port = (low, high), timeout, port
        ratings = tuple(float(value) for value in range(low, high + 1))
        self.questions = Questions(Path(self.file), COMPARED if compare else ratings)
        self.server: RatingServer | None = None
        self.reader: threading.Thread | None = None

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float | None]:
        """Return the score of each completion, `None` without one."""
        asked = [content(prompt) for prompt in prompts]
        texts = [content(completion) for completion in completions]
        if self.compare:
            return self._compared(asked, texts)
        questions = [Question(prompt, (text,)) for prompt, text in zip(asked, texts, strict=True)]
        self._ask(questions)
        return [self.questions.answers.get(question) for question in questions]

    def close(self) -> None:
        """Stop serving the form; a later call starts again."""
        if self.server is not None:
            self.server.close()
        self.server = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self.file, self.place, self.compare, self.scale, self.timeout, self.port)

    def _compared(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float | None]:
        rows_of: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            rows_of[prompt].append(row)
        couples = [pair for rows in rows_of.values() for pair in zip(rows[::2], rows[1::2], strict=False)]
        questions = {
            (one, other): Question(prompts[one], tuple(sorted((texts[one], texts[other]))))
            for one, other in couples
            if texts[one] != texts[other]
        }
        self._ask(list(questions.values()))

        scores: list[float | None] = [None] * len(texts)
        for one, other in couples:
            scores[one] = scores[other] = 0.5 if texts[one] == texts[other] else None
        for (one, other), question in questions.items():
            answer = self.questions.answers.get(question)
            if answer is not None:
                first = question.texts[0] == texts[one]
                scores[one], scores[other] = (answer, 1 - answer) if first else (1 - answer, answer)
        return scores

    def _ask(self, questions: Sequence[Question]) -> None:
        if all(question in self.questions.answers for question in questions):
            return
        if self.place == "web" and self.server is None:
            self.server = RatingServer(self.questions, self.port)
            print(f"texts wait for ratings: open {self.server.address} in a browser", file=sys.stderr, flush=True)
        if self.place == "terminal" and self.reader is None:
            self.reader = threading.Thread(target=answer_in_terminal, args=(self.questions,), daemon=True)
            self.reader.start()
        self.questions.ask(questions, self.timeout)


def _made(
    file: str, place: Place, compare: bool, scale: tuple[int, int], timeout: float | None, port: int
) -> HumanRatings:
    return HumanRatings(file, place, compare=compare, scale=scale, timeout=timeout, port=port)
