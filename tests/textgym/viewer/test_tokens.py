"""token_html: texts stay text, every number is under the pointer, and colours follow the numbers."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.errors import ConfigError
from textgym.viewer import token_html
from textgym.viewer.tokens import colours_of

EVIL = "</span><script>alert(1)</script>\"' onload=x \x1b[31m\x00\u202e\u2028\ud800"


class Elements(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def tokens(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "span" and "title" in attributes]


def test_texts_are_escaped_wherever_they_stand() -> None:
    page = token_html([EVIL], {EVIL: [1.0]}, prompt=EVIL, note=EVIL, alternatives={EVIL: [[(EVIL, 0.5)]]}, mask=[True])
    elements = Elements(page)
    assert {tag for tag, _ in elements.tags} == {"div", "span"}
    assert {name for _, attributes in elements.tags for name in attributes} <= {"style", "title"}
    assert elements.text.count("<script>alert(1)</script>") == 3
    assert not set("\x1b\x00\u202e\u2028\ud800") & set(page)
    page.encode("utf-8")


@settings(max_examples=25)
@given(st.lists(st.text(), max_size=5), st.text())
def test_any_text_is_the_same_text(tokens: list[str], prompt: str) -> None:
    elements = Elements(token_html(tokens, prompt=prompt))
    assert {tag for tag, _ in elements.tags} <= {"div", "span"}
    assert len(elements.tokens) == len(tokens)


def test_all_numbers_and_alternatives_are_under_the_pointer() -> None:
    page = token_html(
        ["a", "b"],
        {"kl": [0.25, None], "advantage": [-1.5, math.nan]},
        alternatives={"policy": [[("a", 0.75), ("c", 0.2)], [("b", 1.0)]]},
    )
    first, second = (attributes["title"] for attributes in Elements(page).tokens)
    assert first == "kl 0.25\nadvantage -1.5\npolicy: 'a' 75%, 'c' 20%"
    assert second == "kl none\nadvantage none\npolicy: 'b' 100%"


def test_colours_are_those_of_the_chosen_quantity() -> None:
    numbers = {"entropy": [0.0, 1.0, 2.0], "kl": [2.0, 0.0, -1.0]}
    by_first = [attributes["style"] for attributes in Elements(token_html(["a", "b", "c"], numbers)).tokens]
    assert by_first[0] == "background:rgb(68,1,84);color:#fff"
    assert by_first[2] == "background:rgb(253,231,37);color:#111"
    by_kl = [attributes["style"] for attributes in Elements(token_html(["a", "b", "c"], numbers, color="kl")).tokens]
    assert by_kl[1] == "background:rgb(247,247,247);color:#111", "no KL is white"


@pytest.mark.parametrize("values", [[1.0, 1.0], [math.nan, None], [math.inf, 0.0], [1e308, -1e308], []])
@pytest.mark.parametrize("centre", [None, 0.0])
def test_any_numbers_have_colours(values: list[Any], centre: float | None) -> None:
    for colour in colours_of(values, centre):
        assert colour is None or all(0 <= part <= 255 for part in colour)


def test_tokens_of_the_environment_are_grey() -> None:
    mine, other = Elements(token_html(["a", "b"], {"kl": [1.0, 1.0]}, mask=[True, False])).tokens
    assert "background" in str(mine["style"])
    assert other["style"] == "opacity:.6"


def test_columns_of_another_length_and_unknown_colours_are_refused() -> None:
    with pytest.raises(ConfigError, match="'kl' has 1 entries for 2 tokens"):
        token_html(["a", "b"], {"kl": [1.0]})
    with pytest.raises(ConfigError, match="'mask' has 3 entries"):
        token_html(["a", "b"], mask=[True] * 3)
    with pytest.raises(ConfigError, match=r"color='value' is none of the numbers \['kl'\]"):
        token_html(["a"], {"kl": [1.0]}, color="value")
