"""The page in a browser: it opens from a file, sorts, filters, colours, and shows texts as text.

Needs Chromium (`apt-get install chromium`) and playwright (`pip install playwright`), and is skipped without them.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from textgym.display import printable
from textgym.viewer import write_page
from textgym.viewer.records import FORMAT, Record, read_record, record_path, write_record

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

EVIL = "</script><img src=x onerror='window.hacked = true'><b>bold</b> \u2028\u202e \x1b[31m"
PIECES = [" good", " bad", " film", "\n", EVIL, "<|endoftext|>"]
ROWS = 6
TOKENS = 5


def record(update: int, rows: int = ROWS, tokens: int = TOKENS) -> Record:
    """Rows of two prompts; the third row is unscored, the last one has a text that attacks the page."""
    places = range(rows * tokens)
    pieces = [
        (row + i) % 3 if i < tokens - 1 else 4 if row == rows - 1 else 5 for row in range(rows) for i in range(tokens)
    ]
    return {
        "format": FORMAT,
        "textgym": "0.2.0",
        "agent": "PPO",
        "update": update,
        "episodes": 8 * update,
        "kl_coef": 0.05,
        "clip": [0.8, 1.2],
        "num_rows": 8,
        "pieces": PIECES,
        "prompts": ["This is", EVIL],
        "rows": {
            "prompt": [0 if row < rows // 2 else 1 for row in range(rows)],
            "length": [tokens] * rows,
            "score": [None if row == 2 else float((5 * row) % 7) for row in range(rows)],
            "stopped": [row % 2 == 0 for row in range(rows)],
            "reward/model": [float(row) for row in range(rows)],
            "reward/judge": [float(-row) for row in range(rows)],
        },
        "texts": {},
        "tokens": {
            "piece": pieces,
            "reward": [float(i % tokens == tokens - 1) for i in places],
            "mine": [int(i % tokens != 1) for i in places],
        },
        "numbers": {
            name: [shift + scale * (i % 7) for i in range(rows * (tokens - 1))]
            for name, shift, scale in (
                ("log_prob", -4.0, 0.5),
                ("kl", -0.5, 0.25),
                ("value", 0.0, 0.1),
                ("return", 0.5, 0.1),
                ("advantage", -1.0, 0.4),
                ("entropy", 0.5, 0.3),
                ("ratio", 0.7, 0.1),
            )
        }
        | {"clipped": [float(i % 7 == 6) for i in range(rows * (tokens - 1))]},
        "each": 2,
        "alternatives": {
            "policy": {"piece": [0, 4] * (rows * (tokens - 1)), "percent": [60, 0] * (rows * (tokens - 1))},
            "reference": {"piece": [1, 0] * (rows * (tokens - 1)), "percent": [55, 40] * (rows * (tokens - 1))},
        },
    }


def make_run(
    folder: Path, metric: str = "objective/scores", records: tuple[Record, ...] = (record(1), record(3))
) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"kind": "textgym run", "format": 2}))
    lines = [
        {metric: update / 2, "objective/kl": update**2, EVIL: 1.0, "episodes": 8 * update} for update in range(1, 4)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"env": EVIL, "kl_target": 5.0, "name": folder.name}))
    for each in records:
        write_record(folder, each)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab, in which nothing may be complained of, no text may run, and nothing may be fetched from elsewhere."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    complaints: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: (
            complaints.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None
        ),
    )
    yield page
    assert complaints == []
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('main img').length") == 0
    page.close()


def opened(tab: Any, page: Path, address: str = "#/") -> Any:
    tab.goto(f"{page.as_uri()}{address}")
    tab.wait_for_selector("main h2, main [role=alert]")
    return tab


def column(tab: Any, number: int) -> list[str]:
    return tab.locator(f"table.rows tbody tr td:nth-child({number})").all_text_contents()


@pytest.mark.parametrize("single_file", [False, True])
def test_it_opens_from_a_file_with_curves_and_links(tab: Any, tmp_path: Path, single_file: bool) -> None:
    opened(tab, write_page([make_run(tmp_path / "run")], single_file=single_file))
    tab.wait_for_selector("figure[data-metric='objective/scores'] canvas")
    assert tab.locator("figure").count() == 3
    tab.fill("#metric-filter", "kl")
    assert tab.locator("figure:visible").count() == 1
    tab.locator("section.card", has_text="Largest KL").locator("a").first.click()
    tab.wait_for_selector(".tokens")


def test_rows_are_sorted_filtered_searched_and_grouped(tab: Any, tmp_path: Path) -> None:
    page = write_page([make_run(tmp_path / "run")])
    opened(tab, page, "#/run/0/update/3")
    assert column(tab, 1) == ["1", "2", "3", "4", "5", "6"]

    tab.click("[data-sort=score]")
    assert column(tab, 4) == ["6", "5", "4", "1", "0", "unscored"], "largest first, missing ones last"
    tab.click("[data-sort=score]")
    assert column(tab, 4) == ["0", "1", "4", "5", "6", "unscored"]
    assert tab.locator("th[aria-sort=ascending]").count() == 1
    assert tab.evaluate("document.activeElement.dataset.sort") == "score", "the keyboard stays where it was"

    tab.select_option("#filter", "unscored")
    assert column(tab, 4) == ["unscored"]
    tab.select_option("#filter", "length")
    assert set(column(tab, 12)) == {"length limit"}
    tab.select_option("#filter", "all")

    tab.fill("#limit", "4")
    assert column(tab, 4) == ["4", "5", "6"], "scores of at least 4; an unscored row has none"
    tab.select_option("#side", "most")
    assert column(tab, 4) == ["0", "1", "4"]
    tab.select_option("#limited", "reward/judge")
    tab.fill("#limit", "-3.5")
    assert column(tab, 6) == ["-5", "-4"]
    tab.fill("#limit", "")
    assert len(column(tab, 1)) == ROWS
    tab.fill("#search", "BOLD")
    assert len(column(tab, 1)) == 3, "rows whose prompt or response has it"
    tab.fill("#search", "")

    tab.check("#grouped")
    assert tab.locator("section.group").count() == 2
    assert tab.locator("section.group").first.locator("li").count() == 3


def test_tokens_are_coloured_by_any_quantity_and_show_all_numbers(tab: Any, tmp_path: Path) -> None:
    opened(tab, write_page([make_run(tmp_path / "run")]), "#/run/0/update/3/row/0")
    assert tab.locator(".token").count() == TOKENS
    colours = {}
    for name in tab.locator("#quantity option").evaluate_all("all => all.map((option) => option.value)"):
        tab.select_option("#quantity", name)
        colours[name] = tab.locator(".token").evaluate_all("all => all.map((token) => token.style.background)")
    assert set(colours) >= {"log_prob", "reference_log_prob", "kl", "entropy", "value", "advantage", "reward", "ratio"}
    assert set(colours) >= {"clipped", "mine"}
    assert all(colour[1] == "" for colour in colours.values()), "the environment's token has no colour"
    assert colours["log_prob"][0] == "rgb(68, 1, 84)", "the least likely token of the record is the darkest"
    assert colours["kl"] != colours["log_prob"]

    tab.hover("[data-token='2']")
    details = tab.inner_text(".details")
    for line in ("KL\t-0.250", "log-prob\t-3.50", "reference log-prob\t-3.25", "ratio new / old\t0.800", "clipped\tno"):
        assert line in details, line
    assert "60%" in details
    assert "<1%" in details
    assert "55%" in details
    tab.hover("[data-token='1']")
    assert "of the environment" in tab.inner_text(".details")
    assert tab.locator(".role").all_text_contents() == ["policy", "environment", "policy"]
    assert tab.locator(".strip canvas").count() == 1


def test_the_mask_can_be_shown_if_the_policy_generated_everything(tab: Any, tmp_path: Path) -> None:
    whole = record(1, tokens=4)
    del whole["tokens"]["mine"]
    whole["numbers"] = {"log_prob": [0.0] * 4 * ROWS, "kl": [0.0] * 4 * ROWS}
    whole["alternatives"] = {}
    opened(tab, write_page([make_run(tmp_path / "run", records=(whole,))]), "#/run/0/update/1/row/0")
    tab.select_option("#quantity", "mine")
    assert "" not in tab.locator(".token").evaluate_all("all => all.map((token) => token.style.background)")
    tab.hover("[data-token='2']")
    assert "mask\tyes" in tab.inner_text(".details")
    assert tab.locator(".role").count() == 0, "there is nobody to tell the policy from"


@pytest.mark.parametrize("judged", [False, True])
def test_one_reward_function_and_the_judge_have_columns(tab: Any, tmp_path: Path, judged: bool) -> None:
    made = record(1)
    del made["rows"]["reward/judge"]
    if judged:
        made["rows"]["judge"] = [0.5, -0.5, None, 0.25, 0.75, -0.75]
        made["judges"] = ["judge"]
    page = write_page([make_run(tmp_path / "run", records=(made,))])
    opened(tab, page, "#/run/0/update/1")
    heads = tab.locator("table.rows th").all_text_contents()
    assert heads[4:6] == (["model", "judge"] if judged else ["model", "KL"])
    assert column(tab, 5) == ["0", "1", "2", "3", "4", "5"]
    if judged:
        tab.click("[data-sort=judge]")
        assert column(tab, 6)[0::5] == ["0.750", "\u2013"], "largest first, missing ones last"
        tab.goto(f"{page.as_uri()}#/")
        tab.locator("section.card", has_text="High reward, low judge").locator("a").first.click()
        tab.wait_for_selector("h2:has-text('row 6')")
        assert "judge" in tab.inner_text("dl.facts")


def test_what_python_spells_out_the_page_shows_as_symbols(tab: Any, tmp_path: Path) -> None:
    opened(tab, write_page([make_run(tmp_path / "run")]))
    commands = [code for code in range(0x110000) if printable(chr(code)) != chr(code)]
    same = "codes => codes.filter((code) => textgym.visible(String.fromCodePoint(code)) === String.fromCodePoint(code))"
    assert len(commands) > 2000
    assert tab.evaluate(same, commands) == []
    plain = [ord(character) for character in "a\n\t\u00e9\u65e5\U0001f469\u200d"]
    assert tab.evaluate(same, plain) == plain


def test_names_of_settings_and_rewards_are_shown_as_text(tab: Any, tmp_path: Path) -> None:
    made = record(1)
    made["rows"] |= {"reward/a\u202eb": [0.0] * ROWS}
    run = make_run(tmp_path / "run", records=(made,))
    (run / "config.json").write_text(json.dumps({"c\u2066d": 1}))
    page = opened(tab, write_page([run]))
    page.click("summary")
    assert "c\u27e8U+2066\u27e9d" in page.inner_text("details")
    page.goto(page.url.split("#")[0] + "#/run/0/update/1")
    page.wait_for_selector("table.rows")
    assert "a\u27e8U+202E\u27e9b" in page.inner_text("table.rows thead")


def test_few_records_stay_in_memory(tab: Any, tmp_path: Path) -> None:
    page = opened(tab, write_page([make_run(tmp_path / "run", records=tuple(map(record, range(1, 31))))]))
    assert (
        page.evaluate("Promise.all([...Array(30).keys()].map((i) => textgym.load(0, i + 1))).then((all) => all.length)")
        == 30
    )
    assert page.evaluate("textgym.inMemory()") == {"records": 16, "compressed": 0}
    assert page.evaluate("textgym.load(0, 1).then((record) => record.update)") == 1, "it is loaded again"


def test_the_keyboard_reaches_rows_updates_and_tokens(tab: Any, tmp_path: Path) -> None:
    opened(tab, write_page([make_run(tmp_path / "run")]), "#/run/0/update/1")
    tab.keyboard.press("]")
    tab.wait_for_function("location.hash === '#/run/0/update/3'")
    tab.wait_for_selector("table.rows")
    tab.keyboard.press("j")
    tab.wait_for_function("location.hash === '#/run/0/update/3/row/0'")
    tab.wait_for_selector(".tokens")
    tab.keyboard.press("j")
    tab.wait_for_function("location.hash === '#/run/0/update/3/row/1'")
    tab.wait_for_selector("h2:has-text('row 2')")
    tab.focus(".token")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.dataset.token") == "2"
    assert "token 3" in tab.inner_text(".details")
    tab.keyboard.press("c")
    assert tab.input_value("#quantity") == "advantage"
    tab.keyboard.press("?")
    assert tab.locator("dialog[open]").count() == 1


def test_responses_to_one_prompt_are_shown_over_the_run(tab: Any, tmp_path: Path) -> None:
    opened(tab, write_page([make_run(tmp_path / "run")]), "#/run/0/update/3/row/0")
    tab.click("text=This prompt over the run")
    tab.wait_for_selector("h2:has-text('One prompt')")
    tab.wait_for_function("document.querySelectorAll('li.card').length === 6")
    assert tab.locator("li.card a").first.inner_text() == "update 1, row 1"


def test_two_runs_are_drawn_over_each_other_and_chosen_between(tab: Any, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", "loss", (record(2),))]
    opened(tab, write_page(runs, tmp_path / "page"))
    tab.wait_for_selector("figure[data-metric='objective/kl'] canvas")
    legend = tab.inner_text("figure[data-metric='objective/kl']")
    assert "first" in legend
    assert "second" in legend
    tab.locator("figure[data-metric='loss']").scroll_into_view_if_needed()
    tab.wait_for_selector("figure[data-metric='loss'] canvas")
    tab.select_option("#run", "1")
    tab.click("#tabs a:nth-child(2)")
    tab.wait_for_selector("h2:has-text('Update 2')")


def test_texts_are_shown_as_text(tab: Any, tmp_path: Path) -> None:
    opened(tab, write_page([make_run(tmp_path / "run")], single_file=True), f"#/run/0/update/3/row/{ROWS - 1}")
    shown = tab.inner_text("main")
    assert "<b>bold</b>" in shown
    assert "⟨U+202E⟩" in shown
    assert "\u241b[31m" in shown
    tab.goto(tab.url.split("#")[0] + "#/run/0/update/3")
    tab.wait_for_selector("table.rows")
    tab.goto(tab.url.split("#")[0] + "#/")
    tab.wait_for_selector("figure")
    tab.click("summary")
    assert "<b>bold</b>" in tab.inner_text("details")


@pytest.mark.parametrize("address", ["#/", "#/run/0/update/3", "#/run/0/update/3/row/0", "#/run/0/prompt/0"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_screen_of_360_pixels(tab: Any, tmp_path: Path, address: str, theme: str) -> None:
    tab.emulate_media(color_scheme=theme)
    tab.set_viewport_size({"width": 360, "height": 740})
    opened(tab, write_page([make_run(tmp_path / "run")]), address)
    tab.wait_for_timeout(200)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (theme == "light")


def test_a_response_of_many_tokens_is_shown_part_by_part(tab: Any, tmp_path: Path) -> None:
    opened(tab, write_page([make_run(tmp_path / "run", records=(record(1, 2, 12_000),))]), "#/run/0/update/1/row/0")
    assert tab.locator(".token").count() == 2000
    tab.click("text=more of 12000 tokens")
    assert tab.locator(".token").count() == 4000


@pytest.mark.parametrize("address", ["#/run/7", "#/run/0/update/99", "#/run/0/update/3/row/99", "#/run/0/prompt/99"])
def test_addresses_that_lead_nowhere_say_so(browser: Any, tmp_path: Path, address: str) -> None:
    tab = browser.new_page()  # a missing file is an error of the console
    opened(tab, write_page([make_run(tmp_path / "run")]), address)
    assert tab.locator("[role=alert]").count() == 1
    tab.close()


def test_a_run_without_records_shows_its_curves(tab: Any, tmp_path: Path) -> None:
    opened(tab, write_page([make_run(tmp_path / "run", records=())]))
    tab.wait_for_selector("figure canvas")
    assert tab.locator("#tabs a").count() == 1


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [
        ({"kl_target": 5.0, "kl_bounds": None}, True),
        ({"kl_target": None, "kl_bounds": [2.0, 6.0]}, True),
        ({"kl_target": None, "kl_bounds": None}, False),
        ({"kl_bounds": EVIL}, False),
        ({}, False),
    ],
)
def test_the_kl_budget_is_drawn_whatever_steers_the_kl(
    tab: Any, tmp_path: Path, settings: dict[str, Any], drawn: bool
) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.json").write_text(json.dumps(settings))
    opened(tab, write_page([run]))
    legend = tab.locator("figure[data-metric='objective/kl'] .u-legend")
    legend.wait_for(state="attached")
    assert ("budget" in legend.text_content()) == drawn


def test_the_page_reads_the_numbers_that_were_written(tab: Any, tmp_path: Path) -> None:
    """Of all sizes, those that are not finite, and more pieces than a packed column can name."""
    generator = random.Random(0)
    made = record(1)
    count = len(made["numbers"]["kl"])
    for power, name in enumerate(made["numbers"], start=-3):
        made["numbers"][name] = [generator.gauss(0, 10.0**power) for _ in range(count)]
    made["numbers"]["kl"][:3] = [math.nan, math.inf, -1e30]
    made["pieces"] = [f"p{i}" for i in range(60_000)]
    made["tokens"]["piece"] = [generator.randrange(60_000) for _ in made["tokens"]["piece"]]
    for columns in made["alternatives"].values():
        columns["piece"] = [generator.randrange(5) for _ in columns["piece"]]
        columns["percent"] = [generator.randrange(101) for _ in columns["percent"]]
    run = make_run(tmp_path / "run", records=(made,))
    expected = read_record(record_path(run, 1))

    opened(tab, write_page([run]))
    read = tab.evaluate(
        "textgym.load(0, 1).then(({ tokens, numbers, alternatives }) => ({ tokens, numbers, alternatives }))"
    )
    assert read["tokens"] == expected["tokens"]
    assert read["alternatives"] == expected["alternatives"]
    assert read["numbers"]["reference_log_prob"][:2] == [None, None], "it follows from a KL that is not finite"
    assert read["numbers"].keys() == {*expected["numbers"], "reference_log_prob"}
    for name, column in expected["numbers"].items():
        for value, written in zip(read["numbers"][name], column, strict=True):
            assert value == (None if written is None else pytest.approx(written, rel=1e-9)), name


def add_update(run: Path, update: int, score: float, **metrics: float) -> None:
    """What a run writes in an update that is recorded."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"objective/scores": score, "episodes": 8 * update, **metrics}) + "\n")
    write_record(run, record(update))


def last_value(tab: Any, metric: str) -> str:
    return str(tab.get_attribute(f"figure[data-metric='{metric}']", "aria-label")).split()[-1]


def test_a_page_of_a_live_run_renews_its_curves_in_place(tab: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = opened(tab, write_page([run], live=True))
    page.wait_for_selector("figure[data-metric='objective/scores'] canvas")
    assert page.inner_text("#live") == "live, 3 updates"
    page.evaluate("window.scrollTo(0, 120)")
    page.evaluate("document.querySelector('.grid canvas').mark = 'the same'")
    before = page.evaluate("document.querySelector('.grid').getBoundingClientRect().top")

    add_update(run, 4, 7.25, **{"eval/score": 1.5})
    write_page([run], live=True)
    page.wait_for_selector("figure[data-metric='eval/score']")
    assert page.inner_text("#live") == "live, 4 updates"
    assert last_value(page, "objective/scores") == "7.25"
    assert page.evaluate("document.querySelector('.grid canvas').mark") == "the same"
    assert page.evaluate("document.querySelector('.grid').getBoundingClientRect().top") == before
    assert page.locator("figure").last.get_attribute("data-metric") == "eval/score", "what was there stays in its place"

    add_update(run, 5, 8.5)
    write_page([run], live=False)
    page.wait_for_selector("#live", state="hidden")
    assert last_value(page, "objective/scores") == "8.50"
    page.evaluate("() => { textgym.index = () => { window.asked = true; }; }")
    page.wait_for_timeout(4000)
    assert page.evaluate("window.asked") is None, "a run that has ended is not asked again"


def test_a_response_that_is_read_stays_while_its_run_goes_on(tab: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = opened(tab, write_page([run], live=True), "#/run/0/update/3")
    page.fill("#search", "good")
    rows = column(page, 1)
    page.evaluate("document.querySelector('table.rows').mark = 'the same'")

    add_update(run, 4, 7.25)
    write_page([run], live=True)
    page.wait_for_selector("#update option:nth-child(3)", state="attached")
    assert page.evaluate("document.querySelector('table.rows').mark") == "the same"
    assert (page.input_value("#search"), column(page, 1), page.input_value("#update")) == ("good", rows, "3")

    page.click("[aria-label='Next update']")
    page.wait_for_selector("h2:has-text('Update 4')")
