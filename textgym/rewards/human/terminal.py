"""Questions in a terminal, answered by lines."""

from __future__ import annotations

import sys
from typing import TextIO

from textgym.display import printable
from textgym.rewards.human.questions import Question, Questions


def answer_in_terminal(questions: Questions, lines: TextIO | None = None, output: TextIO | None = None) -> None:
    """Show one question after another, and read a line for each, until the input ends.

    An empty line skips a question.
    """
    lines, output = lines or sys.stdin, output or sys.stderr
    while (question := questions.next(wait=True)) is not None:
        print(_shown(question, questions), file=output, flush=True)
        line = lines.readline()
        if not line:
            questions.end()
            return
        try:
            questions.answer(question, _read(line, question))
        except ValueError as error:
            print(error, file=output, flush=True)


def _shown(question: Question, questions: Questions) -> str:
    prompt, texts = printable(question.prompt), [printable(text) for text in question.texts]
    if len(texts) == 2:
        first, second = texts[::-1] if question.turned else texts
        return f"\n{prompt}\n[1] {first}\n[2] {second}\nWhich is better? 1, 2, = if they are alike, or Enter to skip:"
    low, high = questions.possible[0], questions.possible[-1]
    return f"\n{prompt}\n> {texts[0]}\nHow good is it? {low:g} (bad) to {high:g} (good), or Enter to skip:"


def _read(line: str, question: Question) -> float | None:
    """Return the answer that a line gives.

    Raises:
        ValueError: If it gives none.
    """
    word = line.strip()
    if not word:
        return None
    if len(question.texts) == 1:
        return float(word)
    earned = {"1": 1.0, "2": 0.0, "=": 0.5}
    if word not in earned:
        raise ValueError(f"{printable(word)!r} is no answer: type 1, 2 or =")
    return 1 - earned[word] if question.turned else earned[word]
