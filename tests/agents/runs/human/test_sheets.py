"""Sheets for raters: blinded, escaped, and read back as a win rate and an agreement."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from textgym import ActorCritic, cli
from textgym.agents.runs.human.agreement import cohen_kappa, fleiss_kappa
from textgym.agents.runs.human.sheets import read_sheets, write_sheet
from textgym.errors import DataError
from textgym.models.loading import load_tokenizer

PROMPTS = [f"prompt {index}" for index in range(40)]
TEXTS = {"policy": [f"good {index}" for index in range(40)], "reference": [f"bad {index}" for index in range(40)]}


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def answered(folder: Path, name: str, choices: dict[str, str]) -> Path:
    file = folder / name
    file.write_text("id,choice\n" + "".join(f"{pair},{choice}\n" for pair, choice in choices.items()))
    return file


def rater(rows: list[dict[str, str]], wins: int) -> dict[str, str]:
    """A rater to whom the policy wins the first pairs, and the reference the others."""
    return {
        row["id"]: "1" if row["first"].startswith("good") == (index < wins) else "2" for index, row in enumerate(rows)
    }


def test_a_sheet_says_neither_by_side_nor_by_order_whose_a_text_is(tmp_path: Path) -> None:
    table, page, key = write_sheet(tmp_path / "new" / "sheets" / "ppo", PROMPTS, TEXTS)
    rows = rows_of(table)
    assert rows[0].keys() == {"id", "prompt", "first", "second", "choice"}
    assert 10 < sum(row["first"].startswith("good") for row in rows) < 30
    assert [row["prompt"] for row in rows] != PROMPTS
    assert sorted(row["prompt"] for row in rows) == sorted(PROMPTS)
    for row in rows:
        number = row["prompt"].split()[1]
        assert {row["first"], row["second"]} == {f"good {number}", f"bad {number}"}
    for file in (table, page):
        assert not re.search("policy|reference", file.read_text().replace("Content-Security-Policy", ""))
    shown = re.findall(r'<pre>(.*?)</pre><div class="texts"><pre>(.*?)</pre><pre>(.*?)</pre>', page.read_text())
    assert shown == [(row["prompt"], row["first"], row["second"]) for row in rows]
    assert set(json.loads(key.read_text())["pairs"]) == {row["id"] for row in rows}


def test_the_win_rate_is_that_of_the_policies_and_not_of_the_sides(tmp_path: Path) -> None:
    table, _, key = write_sheet(tmp_path / "ppo", PROMPTS, TEXTS)
    rows = rows_of(table)
    result = read_sheets(key, [answered(tmp_path, "anna.csv", rater(rows, 30))])
    assert result.win_rate.value == 0.75
    assert 0.5 < result.win_rate.low < 0.75 < result.win_rate.high < 1.0
    assert (result.pairs, result.answers, result.agreement) == (40, 40, None)
    assert next(result.lines()).startswith("win rate of policy against reference: 0.750 [")

    half = {row["id"]: "0" for row in rows[:10]} | {row["id"]: "" for row in rows[10:]}
    both = read_sheets(key, [answered(tmp_path, "anna.csv", rater(rows, 30)), answered(tmp_path, "ben.csv", half)])
    assert both.win_rate.value == (10 * 0.75 + 20) / 40
    assert (both.answers, both.common) == (50, 10)


def test_the_agreement_is_cohens_for_two_raters_and_fleiss_for_three(tmp_path: Path) -> None:
    table, _, key = write_sheet(tmp_path / "ppo", PROMPTS, TEXTS)
    rows = rows_of(table)
    files = [answered(tmp_path, f"{wins}.csv", rater(rows, wins)) for wins in (20, 30, 40)]
    categories = [[float(index < wins) for index in range(40)] for wins in (20, 30, 40)]
    two, three = read_sheets(key, files[:2]), read_sheets(key, files)
    assert two.agreement == pytest.approx(cohen_kappa(*categories[:2]))
    assert two.agreement == pytest.approx(0.5)
    assert three.agreement == pytest.approx(fleiss_kappa(list(zip(*categories, strict=True))))
    assert f"(kappa): {two.agreement:.3f} (40 common pairs)" in list(two.lines())[1]


def test_equal_texts_are_ties_and_not_shown(tmp_path: Path) -> None:
    table, _, key = write_sheet(tmp_path / "ppo", ["p", "q"], {"policy": ["a", "same"], "reference": ["b", "same"]})
    [row] = rows_of(table)
    choice = {row["id"]: "1" if row["first"] == "a" else "2"}
    result = read_sheets(key, [answered(tmp_path, "anna.csv", choice)])
    assert (result.win_rate.value, result.pairs, result.answers) == (0.75, 2, 1)
    with pytest.raises(DataError, match="policy and reference wrote the same texts"):
        write_sheet(tmp_path / "other", ["q"], {"policy": ["same"], "reference": ["same"]})


def test_text_of_a_policy_is_neither_markup_nor_a_formula(tmp_path: Path) -> None:
    bad = ["</pre><script>alert(1)</script>", '=HYPERLINK("http://evil")', " +1", "\x1b[2J{id}"]
    table, page, _ = write_sheet(tmp_path / "ppo", ["<b>"] * 4, {"policy": bad, "reference": ["ok"] * 4})
    assert page.read_text().count("<script>") == 1, "the page's own"
    assert "<b>" not in page.read_text()
    cells = [row[side] for row in rows_of(table) for side in ("first", "second")]
    assert not [cell for cell in cells if cell.lstrip().startswith(("=", "+"))]
    assert "\x1b" not in table.read_text() + page.read_text()


def test_a_sheet_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    write_sheet(tmp_path / "ppo", PROMPTS, TEXTS)
    with pytest.raises(FileExistsError, match=r"ppo\.csv is there: choose another name"):
        write_sheet(tmp_path / "ppo", PROMPTS, TEXTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,prompt\npair1,p\n", "it needs 'id' and 'choice'"),
        ("id,choice\npair99,1\n", "the pair 'pair99', which the key does not know"),
        ("id,choice\npair1,left\n", "the choice 'left' for 'pair1': it must be 1, 2, or 0"),
        ("id,choice\npair1,1\npair1,2\n", "two answers to 'pair1'"),
        ("id,choice\npair1,\n", "there are no answers"),
    ],
)
def test_answers_that_cannot_be_are_named(content: str, message: str, tmp_path: Path) -> None:
    _, _, key = write_sheet(tmp_path / "ppo", PROMPTS, TEXTS)
    (tmp_path / "answers.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_sheets(key, [tmp_path / "answers.csv"])
    with pytest.raises(DataError, match=r"answers\.csv is no key of a sheet"):
        read_sheets(tmp_path / "answers.csv", [tmp_path / "answers.csv"])


@pytest.mark.slow
def test_the_commands_write_a_sheet_and_read_it_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = ActorCritic.from_pretrained("tiny")
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight.mul_(2.0)  # another policy than the reference
    policy.save_pretrained(tmp_path / "policy", load_tokenizer("tiny"))
    small = ["--prompts", "4", "--num-envs", "4", "--samples", "0", "--env-kwargs", '{"max_new_tokens": 8}']
    sheet = ["--pairwise-sheet", str(tmp_path / "sheet")]
    cli.main(["evaluate", "--policy", "tiny", "--against", str(tmp_path / "policy"), *small, *sheet])
    assert f"not for raters: {tmp_path}" in capsys.readouterr().out.replace("\n", "")
    rows = rows_of(tmp_path / "sheet.csv")
    answers = answered(tmp_path, "anna.csv", {row["id"]: "1" for row in rows})
    cli.main(["read-sheet", str(tmp_path / "sheet.key.json"), str(answers)])
    assert "win rate of policy against other policy: " in capsys.readouterr().out


# --- agreement ---


def test_cohens_kappa_by_hand() -> None:
    """50 items: both yes 20, yes and no 5, no and yes 10, both no 15; p = .7 and e = .5 * .6 + .5 * .4 = .5."""
    first = "y" * 25 + "n" * 25
    second = "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert math.isnan(cohen_kappa("yy", "yy"))


def test_fleiss_kappa_of_a_published_table() -> None:
    """Ten items and fourteen raters in five categories, for which Fleiss' kappa is 0.210."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    answers: list[Any] = [[category for category, count in enumerate(row) for _ in range(count)] for row in table]
    assert fleiss_kappa(answers) == pytest.approx(0.210, abs=5e-4)
    assert math.isnan(fleiss_kappa([[1, 1], [1, 1]]))
