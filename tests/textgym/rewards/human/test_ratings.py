"""Ratings of people: asked in a form or a terminal, kept in a file, and never asked for twice."""

from __future__ import annotations

import html
import io
import json
import pickle
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from textgym import HumanRatings
from textgym.errors import ConfigError, DataError
from textgym.rewards.human.questions import Question
from textgym.testing import byte_tokenizer, mock_lm

Choice = Callable[[str], str]
"""What a rater chooses, by the text of the page."""


def get(address: str, host: str | None = None) -> str:
    request = urllib.request.Request(address, headers={} if host is None else {"Host": host})
    with urllib.request.urlopen(request) as answer:
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        return str(answer.read().decode())


def post(address: str, **form: str) -> None:
    urllib.request.urlopen(address, urllib.parse.urlencode(form).encode()).close()


def fields_of(page: str) -> dict[str, str]:
    return dict(re.findall(r'name="(secret|question)" value="([^"]+)"', page))


class Rater(threading.Thread):
    """Answers the questions of the form until the test ends."""

    def __init__(self, ratings: HumanRatings, choose: Choice) -> None:
        super().__init__(daemon=True)
        self.ratings, self.choose = ratings, choose
        self.pages: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            server = self.ratings.server
            if server is None:
                continue
            page = get(server.address)
            if "<form" in page:
                self.pages.append(page)
                post(server.address, **fields_of(page), answer=self.choose(page))


@pytest.fixture
def rated(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Make ratings with a rater who answers in the form."""
    raters: list[Rater] = []

    def make(choose: Choice, **settings: Any) -> tuple[HumanRatings, Rater]:
        ratings = HumanRatings(tmp_path / "ratings.jsonl", **settings)
        raters.append(Rater(ratings, choose))
        raters[-1].start()
        return ratings, raters[-1]

    yield make
    for rater in raters:
        rater.over.set()
        rater.join()
        rater.ratings.close()


def by_length(page: str) -> str:
    """One point for each letter of the text, which stands after the prompt."""
    return str(len(re.findall(r"<pre>(.*?)</pre>", page)[1]))


def better(page: str) -> str:
    """The text that is later in the alphabet, whichever is the upper one."""
    upper, lower = re.findall(r"<pre>(.*?)</pre>", page)[1:]
    wanted = "The upper one" if upper > lower else "The lower one"
    return str(re.findall(rf'value="([^"]*)">{wanted}', page)[0])


# --- the form ---


def test_texts_are_rated_in_the_form_and_never_again(rated: Any, tmp_path: Path) -> None:
    ratings, rater = rated(by_length)
    assert ratings(["p", "p", "q"], ["aa", "bbbb", "aa"]) == [2.0, 4.0, 2.0]
    assert ratings(["p", "q"], ["bbbb", "ccccc"]) == [4.0, 5.0]
    assert len(rater.pages) == 4
    lines = [json.loads(line) for line in (tmp_path / "ratings.jsonl").read_text().splitlines()]
    assert lines[1] == {"prompt": "p", "texts": ["bbbb"], "answer": 4.0}

    again = HumanRatings(tmp_path / "ratings.jsonl")
    assert again(["q", "p"], ["ccccc", "aa"]) == [5.0, 2.0]
    assert again.server is None, "nothing was asked"


def test_a_text_of_several_rows_is_asked_for_once(rated: Any) -> None:
    ratings, rater = rated(by_length)
    assert ratings(["p"] * 3, ["aa"] * 3) == [2.0] * 3
    assert len(rater.pages) == 1


def test_texts_of_a_prompt_are_compared_two_by_two(rated: Any) -> None:
    ratings, rater = rated(better, compare=True)
    prompts = ["p", "q", "p", "q", "p", "r", "r"]
    texts = ["b", "d", "a", "e", "c", "same", "same"]
    assert ratings(prompts, texts) == [1.0, 0.0, 0.0, 1.0, None, 0.5, 0.5]
    assert len(rater.pages) == 2
    assert ratings(["p", "p"], ["a", "b"]) == [0.0, 1.0], "the same comparison in the other order"
    assert len(rater.pages) == 2


def test_which_text_is_shown_first_says_nothing() -> None:
    turned = [Question("p", (f"a{index}", f"b{index}")).turned for index in range(200)]
    assert 60 < sum(turned) < 140
    assert not Question("p", ("a",)).turned


def test_a_skipped_text_has_no_score_and_is_asked_for_again(rated: Any, tmp_path: Path) -> None:
    ratings, rater = rated(lambda _: "")
    assert ratings(["p"], ["aa"]) == [None]
    assert not (tmp_path / "ratings.jsonl").exists()
    rater.choose = by_length
    assert ratings(["p"], ["aa"]) == [2.0]


def test_text_of_the_policy_is_shown_as_text(rated: Any) -> None:
    ratings, rater = rated(lambda _: "1")
    bad = "</pre><script>alert(1)</script>\x1b[2J"
    ratings(["<img src=x onerror=alert(2)>"], [bad])
    [page] = rater.pages
    assert "<script" not in page
    assert "<img" not in page
    assert html.escape("</pre><script>alert(1)</script>") in page
    assert "\x1b" not in page


def test_other_pages_in_the_browser_can_neither_read_nor_answer(tmp_path: Path) -> None:
    ratings = HumanRatings(tmp_path / "ratings.jsonl", timeout=0.0)
    assert ratings(["p"], ["aa"]) == [None]
    assert ratings.server is not None
    address = ratings.server.address
    [key] = ratings.questions.asked
    for form, status in (
        ({"question": key, "answer": "2"}, 403),
        ({"question": key, "answer": "2", "secret": "guessed"}, 403),
        ({"question": "other", "answer": "2", "secret": ratings.server.secret}, 403),
        ({"question": key, "answer": "7", "secret": ratings.server.secret}, 400),
        ({"question": key, "answer": "nan", "secret": ratings.server.secret}, 400),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(address, **form)
        assert caught.value.code == status
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(address, host="evil.example")
    assert caught.value.code == 403
    assert not (tmp_path / "ratings.jsonl").exists()

    post(address, question=key, answer="2", secret=ratings.server.secret)  # late, but an answer
    assert ratings(["p"], ["aa"]) == [2.0]
    ratings.close()
    assert ratings.server is None


# --- the terminal ---


def in_terminal(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: Any, **settings: Any) -> HumanRatings:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return HumanRatings(*arguments, place="terminal", **settings)


def test_texts_are_rated_in_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ratings = in_terminal(monkeypatch, "4\n\n9\nfine\n2\n", tmp_path / "ratings.jsonl")
    assert ratings(["p", "p", "p", "p"], ["a", "b\x1b[2J", "c", "d"]) == [4.0, None, 2.0, None]
    shown = capsys.readouterr().err
    assert "How good is it? 1 (bad) to 5 (good)" in shown
    assert "the answer of a rater is 9.0: it must be one of 1, 2, 3, 4, 5" in shown
    assert "could not convert string to float: 'fine'" in shown
    assert "\x1b" not in shown


def test_texts_are_compared_in_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt for index in range(8) for prompt in [f"p{index}"] * 2]
    ratings = in_terminal(monkeypatch, "1\n" * 7 + "=\n", tmp_path / "ratings.jsonl", compare=True)
    scores = ratings(prompts, ["a", "b"] * 8)
    expected = [0.0 if Question(f"p{index}", ("a", "b")).turned else 1.0 for index in range(7)]
    assert scores[::2] == [*expected, 0.5]
    assert {0.0, 1.0} < set(scores)


# --- the file, and arguments ---


def test_a_line_that_was_not_written_whole_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "ratings.jsonl"
    line = '{"prompt": "p", "texts": ["a"], "answer": 3.0}\n'
    file.write_text(line + line[:20])
    with pytest.warns(UserWarning, match="was not written whole, and is removed"):
        ratings = HumanRatings(file)
    assert ratings(["p"], ["a"]) == [3.0]
    assert file.read_text() == line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}\n", "line 1 of .* is no answer of a rater"),
        ("[1]\n", "line 1 of .* is no answer of a rater"),
        (
            '{"prompt": "p", "texts": ["a"], "answer": 9}\n',
            "of line 1 of .* is 9.0: it must be one of 1, 2, 3",
        ),
    ],
)
def test_another_file_is_refused(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        HumanRatings(tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    "settings", [{"place": "phone"}, {"scale": (5, 1)}, {"scale": (0, 100)}, {"timeout": -1.0}, {"port": 70_000}]
)
def test_arguments_are_checked(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        HumanRatings(tmp_path / "ratings.jsonl", **settings)


def test_a_pickled_one_reads_the_same_file(tmp_path: Path) -> None:
    ratings = HumanRatings(tmp_path / "ratings.jsonl", compare=True, timeout=2.0)
    copy = pickle.loads(pickle.dumps(ratings))
    assert (copy.file, copy.compare, copy.timeout) == (ratings.file, True, 2.0)


def test_an_environment_pays_what_people_say_and_stops_the_form(rated: Any) -> None:
    ratings, rater = rated(lambda _: "3")
    arguments: dict[str, Any] = {"prompts": ["one"], "tokenizer": byte_tokenizer(), "reference": mock_lm()}
    env = gym.make("textgym/Text-v0", reward=ratings, max_new_tokens=1, kl_coef=0.0, **arguments)
    env.reset(seed=0)
    _, reward, terminated, _, _ = env.step(97)
    assert terminated
    assert reward == 3.0
    rater.over.set()
    rater.join()
    env.close()
    assert ratings.server is None
