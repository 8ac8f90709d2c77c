"""Sheets for human evaluation: pairs of two policies' completions, blinded and in random order.

    textgym evaluate runs/ppo --pairwise-sheet sheets/ppo
    textgym read-sheet sheets/ppo.key.json anna.csv ben.csv

`sheets/ppo.csv` and `sheets/ppo.html` have the same pairs; raters fill in either. `sheets/ppo.key.json` says which
completion is whose, and is not for raters.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from textgym.data.files import atomic_file
from textgym.data.messages import Text, content
from textgym.display import html_text, printable
from textgym.errors import DataError
from textgym.rewards.intervals import Interval, bootstrap

from .agreement import cohen_kappa, fleiss_kappa

CHOICES = {"1": 1.0, "2": 0.0, "0": 0.5}
"""What the first text of a pair earns by each choice: it is better, the second one is, or they are alike."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of cells that spreadsheets take for formulas."""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Which is better?</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">
<style>
body {{ font: 1em sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
pre {{ white-space: pre-wrap; background: #f4f4f4; padding: 1em; margin: .3em 0 }}
.texts {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1em }}
section {{ border-top: 1px solid #999; padding: 1em 0 }}
</style></head><body>
<p>Choose the better text of each pair. Then save your answers and send the file back.</p>
{sections}
<button onclick="save()">Save the answers</button>
<script>
function save() {{
  const chosen = [...document.querySelectorAll("input:checked")].map(box => box.name + "," + box.value);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([["id,choice", ...chosen].join("\\n") + "\\n"]));
  link.download = "answers.csv";
  link.click();
}}
</script></body></html>
"""
SECTION = """<section><pre>{prompt}</pre><div class="texts"><pre>{first}</pre><pre>{second}</pre></div>
<label><input type="radio" name="{id}" value="1"> the left one</label>
<label><input type="radio" name="{id}" value="2"> the right one</label>
<label><input type="radio" name="{id}" value="0"> they are alike</label></section>
"""


@dataclass(frozen=True)
class Result:
    """What raters said of two policies.

    Attributes:
        names: The two policies.
        win_rate: Share of pairs that the first policy wins, with its 95% interval over prompts; a tie counts as one
            half, and the answers of several raters to a pair are averaged.
        pairs: Number of pairs with an answer.
        answers: Number of answers.
        agreement: Kappa of Cohen for two raters and of Fleiss for more, over the pairs that all of them answered;
            `None` for one rater, or without such pairs.
        common: Number of these pairs.
    """

    names: tuple[str, str]
    win_rate: Interval
    pairs: int
    answers: int
    agreement: float | None
    common: int

    def lines(self) -> Iterator[str]:
        """Yield the result as lines of text."""
        first, second = self.names
        yield f"win rate of {first} against {second}: {self.win_rate} ({self.pairs} pairs, {self.answers} answers)"
        if self.agreement is not None:
            yield f"agreement of the raters beyond chance (kappa): {self.agreement:.3f} ({self.common} common pairs)"


def write_sheet(
    path: Path,
    prompts: Sequence[Text],
    completions: Mapping[str, Sequence[str]],
    seed: int = 0,
    overwrite: bool = False,
) -> list[Path]:
    """Write a sheet for raters as CSV and HTML, and its key.

    Pairs whose texts are equal are left out of the sheet; the key counts them as ties.

    Args:
        path: Where to write, without an ending.
        prompts: The prompts.
        completions: The completions of two policies by their names, one of each prompt.
        seed: Seed of the order of the pairs and of their sides.
        overwrite: Whether to replace files that are there: a new key does not fit answers to an old sheet.

    Returns:
        The three files.

    Raises:
        FileExistsError: If one of them is there.
        DataError: If no two texts differ.
    """
    files = [path.with_name(path.name + ending) for ending in (".csv", ".html", ".key.json")]
    table, page, secret = files
    there = [str(file) for file in files if file.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{there[0]} is there: choose another name, so that answers keep their key")
    names = list(completions)
    rng = random.Random(seed)
    rows, key, ties = [], {}, []
    for prompt, *texts in zip(prompts, *completions.values(), strict=True):
        if texts[0] == texts[1]:
            ties.append(content(prompt))
            continue
        swapped = rng.random() < 0.5
        rows.append((content(prompt), *(texts[::-1] if swapped else texts)))
        key[len(rows)] = {"prompt": content(prompt), "first": names[swapped]}
    if not rows:
        raise DataError(f"{names[0]} and {names[1]} wrote the same texts, so there is nothing to compare")

    order = rng.sample(range(len(rows)), len(rows))
    numbered = [(f"pair{number}", *rows[index]) for number, index in enumerate(order, start=1)]
    pairs = {f"pair{number}": key[index + 1] for number, index in enumerate(order, start=1)}
    contents = {
        table: _csv(numbered),
        page: _html(numbered),
        secret: json.dumps({"policies": names, "pairs": pairs, "ties": ties}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, text in contents.items():
        with atomic_file(file) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return files


def read_sheets(key: Path, sheets: Sequence[Path], resamples: int = 1000, seed: int = 0) -> Result:
    """Return what raters said.

    Args:
        key: The key of the sheet.
        sheets: CSV files with the columns `id` and `choice`, one of each rater: 1, 2, or 0 if both texts are alike;
            an empty choice counts as no answer.
        resamples: Number of bootstrap samples of the prompts.
        seed: Seed of the bootstrap.

    Raises:
        DataError: If a file has another form, has pairs that the key does not know, or there is no answer.
    """
    names, pairs, ties = _read_key(key)
    answers = [_read_answers(sheet, pairs) for sheet in sheets]
    answered = [pair for pair in pairs if any(pair in said for said in answers)]
    if not answered:
        raise DataError(f"there are no answers in {', '.join(map(str, sheets))}: fill in the column 'choice'")

    # Of each pair the mean over raters of what the first policy earns; equal texts are ties, whoever reads them.
    earned = {
        pair: [said[pair] if pairs[pair]["first"] == names[0] else 1 - said[pair] for said in answers if pair in said]
        for pair in answered
    }
    values = np.array([*(np.mean(earned[pair]) for pair in answered), *[0.5] * len(ties)])
    prompts = [*(pairs[pair]["prompt"] for pair in answered), *ties]
    win_rate = bootstrap(lambda rows: float(values[rows].mean()), prompts, resamples, seed)

    common = [pair for pair in pairs if all(pair in said for said in answers)]
    agreement = None
    if common and len(answers) == 2:
        agreement = cohen_kappa(*([earned[pair][rater] for pair in common] for rater in range(2)))
    elif common and len(answers) > 2:
        agreement = fleiss_kappa([earned[pair] for pair in common])
    return Result(names, win_rate, len(values), sum(map(len, answers)), agreement, len(common))


def _csv(rows: Sequence[tuple[str, ...]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("id", "prompt", "first", "second", "choice"))
    for name, *texts in rows:
        writer.writerow((name, *map(_cell, texts), ""))
    return out.getvalue()


def _cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    shown = printable(text)
    return f"'{shown}" if shown.lstrip(" ").startswith(FORMULA) else shown


def _html(rows: Sequence[tuple[str, ...]]) -> str:
    columns = ("id", "prompt", "first", "second")
    sections = (SECTION.format(**dict(zip(columns, map(html_text, row), strict=True))) for row in rows)
    return PAGE.format(sections="".join(sections))


def _read_key(file: Path) -> tuple[tuple[str, str], dict[str, Any], list[str]]:
    try:
        key = json.loads(file.read_text(encoding="utf-8"))
        first, second = key["policies"]
        pairs = {name: {"prompt": str(pair["prompt"]), "first": pair["first"]} for name, pair in key["pairs"].items()}
        return (first, second), pairs, [str(prompt) for prompt in key["ties"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is no key of a sheet: pass the .key.json that was written with it") from error


def _read_answers(file: Path, pairs: dict[str, Any]) -> dict[str, float]:
    """Return what the first text of each answered pair earns."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        if not {"id", "choice"} <= set(reader.fieldnames or ()):
            raise DataError(f"{file} has the columns {reader.fieldnames}: it needs 'id' and 'choice'")
        rows = [(row["id"], (row["choice"] or "").strip()) for row in reader]
    answers = {}
    for name, choice in rows:
        if name not in pairs:
            raise DataError(f"{file} has the pair {name!r}, which the key does not know: pass the key of this sheet")
        if name in answers:
            raise DataError(f"{file} has two answers to {name!r}: each rater has a file of their own")
        if choice and choice not in CHOICES:
            raise DataError(f"{file} has the choice {choice!r} for {name!r}: it must be 1, 2, or 0 if both are alike")
        if choice:
            answers[name] = CHOICES[choice]
    return answers
