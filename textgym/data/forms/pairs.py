"""The forms of preferences that data sets have, each brought into one: a prompt, and two texts that continue it.

Besides pairs with `chosen` and `rejected`, these are two answers with a label (`human_ref_A` and `human_ref_B`, as in
SHP), and rankings of any number of answers: `completions` with `ranks` or `ratings`, `answers` with ranks as in Nectar,
`completions` with scores as in UltraFeedback, and trees of conversations (`prompt` with `replies`) as in OpenAssistant.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from textgym.data.forms.trees import checked_rank, message_of
from textgym.data.messages import Messages, Text, checked_text, conversation_with_tools, is_blank, shortened
from textgym.data.tools import Tools, tools_of
from textgym.errors import DataError

Pair = dict[str, Any]
WORDS = re.compile(r"\s*\S+|\s+$")
OPENERS = ("system", "developer", "user")
"""Roles of the first message of a whole conversation; a completion begins with another one."""


class Ranking(NamedTuple):
    """Completions of one prompt, and how good each is.

    Attributes:
        prompt: The prompt; `None` if the completions are whole texts.
        completions: K texts or conversations.
        values: K numbers, of which the highest is the best; equal ones are ties. A rank is minus its value.
        rated: Whether the values are ratings, whose differences mean something.
    """

    prompt: Text | None
    completions: list[Text]
    values: list[float]
    rated: bool

    def pairs(self) -> Iterator[Pair]:
        """Yield all comparisons of completions with different values; those of ratings have a margin."""
        prompt = {} if self.prompt is None else {"prompt": self.prompt}
        both = zip(self.completions, self.values, strict=True)
        for (first, value), (second, other) in itertools.combinations(both, 2):
            if value != other:
                better, worse = (first, second) if value > other else (second, first)
                margin = {"margin": abs(value - other)} if self.rated else {}
                yield {**prompt, "chosen": better, "rejected": worse, **margin}


def pairs_of_row(row: Any, place: str) -> list[Pair]:
    """Return the preference pairs of a row: one, or all comparisons of a ranking's completions.

    Args:
        row: A row of a data set, in any of the accepted forms.
        place: Description of the row, for error messages.

    Raises:
        DataError: If the row has another form, or a value that cannot be.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is {shortened(row)}: a preference is a dict with 'chosen' and 'rejected'")
    given = {key for key, value in row.items() if value is not None}
    tools = tools_of(row, place)
    if {"chosen", "rejected"} <= given:
        return [_with_tools(_pair(row, place), tools, place)]
    rankings = rankings_of_row(row, place)
    if rankings is not None:
        return [_pair(pair, place) for ranking in rankings for pair in ranking.pairs()]
    if {"history", "human_ref_A", "human_ref_B", "labels"} <= given:
        return [_with_tools(_labelled(row, place), tools, place)]
    raise DataError(
        f"{place} has the keys {sorted(map(str, given))}: it needs 'chosen' and 'rejected', or 'completions' with "
        "'ranks' or 'ratings'"
    )


def rankings_of_row(row: Mapping[str, Any], place: str) -> list[Ranking] | None:
    """Return the rankings of a row, several of a tree; `None` if it has another form.

    Raises:
        DataError: If the row has a value that cannot be.
    """
    tools = tools_of(row, place)
    rankings = _rankings_of_row(row, place)
    if rankings is None or not tools:
        return rankings
    return [_ranking_with_tools(ranking, tools, place) for ranking in rankings]


def _rankings_of_row(row: Mapping[str, Any], place: str) -> list[Ranking] | None:
    given = {key for key, value in row.items() if value is not None}
    if {"prompt", "answers"} <= given:
        return [_nectar(row, place)]
    if {"instruction", "completions"} <= given:
        return [_ultrafeedback(row, place)]
    if "completions" in given:
        return [_ranking(row, given, place)]
    if isinstance(row.get("prompt"), Mapping):
        return list(_tree(row["prompt"], place))
    return None


def split_pair(pair: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    """Return the prompt, the chosen completion and the rejected completion of a preference pair.

    If the pair has no `prompt`, the prompt is the longest common beginning of both texts, in whole words or messages.

    >>> split_pair({"chosen": "The film is good.", "rejected": "The film is great."})
    ('The film is', ' good.', ' great.')

    Raises:
        DataError: If there is no prompt and the texts have no common beginning.
    """
    chosen, rejected = pair["chosen"], pair["rejected"]
    if pair.get("prompt"):
        return pair["prompt"], chosen, rejected
    # Whole words, because half a word would be tokenized differently than the word in the text.
    first, second = (WORDS.findall(text) if isinstance(text, str) else list(text) for text in (chosen, rejected))
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    shared = min(len(first), len(second)) if shared is None else shared
    if not shared:
        raise DataError(
            f"{shortened(chosen)} and {shortened(rejected)} have no common beginning, so their prompt is unknown: pass "
            "it as 'prompt'"
        )
    if isinstance(chosen, str):
        return "".join(first[:shared]), "".join(first[shared:]), "".join(second[shared:])
    return first[:shared], first[shared:], second[shared:]


def _pair(row: Mapping[str, Any], place: str) -> Pair:
    pair = dict(row)
    for name in ("chosen", "rejected"):
        pair[name] = checked_text(row[name], name, place)
    if row.get("prompt") is not None:
        pair["prompt"] = checked_text(row["prompt"], "prompt", place)
    _check_numbers(pair, place)

    prompt, texts = pair.get("prompt"), [pair["chosen"], pair["rejected"]]
    if len({isinstance(text, str) for text in texts}) == 2:
        if not prompt:
            raise DataError(
                f"one text of {place} is a string and the other a conversation: use the same form for both, or pass "
                "the 'prompt'"
            )
        texts = [_said(text) for text in texts]
        pair["chosen"], pair["rejected"] = texts
    if isinstance(texts[0], str):
        separated = _separate_strings(prompt, texts)
    else:
        separated = _separate_conversations(prompt, texts, place)
    if separated is not None:
        pair["prompt"], pair["chosen"], pair["rejected"] = separated
    return pair


def _with_tools(pair: Pair, tools: Tools, place: str) -> Pair:
    """Return a pair whose prompt, or else each of its conversations, has the tools of its row, if there are any."""
    if not tools:
        return pair
    if not pair.get("prompt"):
        return {**pair, **{side: conversation_with_tools(pair[side], tools, place) for side in ("chosen", "rejected")}}
    prompt = pair["prompt"]
    if isinstance(prompt, str) and not isinstance(pair["chosen"], str):
        prompt = [{"role": "user", "content": prompt}]
    return {**pair, "prompt": conversation_with_tools(prompt, tools, place)}


def _ranking_with_tools(ranking: Ranking, tools: Tools, place: str) -> Ranking:
    """Return a ranking whose prompt, or else each of its conversations, has tools."""
    if not ranking.prompt:
        completions = [conversation_with_tools(text, tools, place) for text in ranking.completions]
        return ranking._replace(completions=completions)
    prompt = ranking.prompt
    if isinstance(prompt, str) and not isinstance(ranking.completions[0], str):
        prompt = [{"role": "user", "content": prompt}]
    return ranking._replace(prompt=conversation_with_tools(prompt, tools, place))


def _separate_strings(prompt: Text | None, texts: Sequence[Any]) -> tuple[Text, Text, Text] | None:
    """Return prompt and completions if both texts repeat the prompt; one word may be repeated by chance."""
    if not isinstance(prompt, str) or len(prompt.split()) < 2:
        return None
    if not all(text.startswith(prompt) for text in texts) or set(texts) == {prompt}:
        return None
    return prompt, texts[0][len(prompt) :], texts[1][len(prompt) :]


def _separate_conversations(
    prompt: Text | None, texts: Sequence[Messages], place: str
) -> tuple[Text, Text, Text] | None:
    """Return prompt and completions if the texts are whole conversations, which begin with the prompt."""
    asked: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    whole = [text[0]["role"] in OPENERS for text in texts]
    if asked and not is_blank(asked) and not any(whole):
        return None

    # The last message of each is never the prompt: if both are equal, so are the completions.
    longest = min(map(len, texts)) - 1
    shared = next((i for i in range(longest) if texts[0][i] != texts[1][i]), longest)
    if not asked or is_blank(asked):
        return _cut(texts, shared) if shared else None
    if not all(whole) or not _names(asked, texts[0][:shared]):
        raise DataError(
            f"the conversations of {place} begin with {shortened(texts[0][0])} and {shortened(texts[1][0])}, but its "
            f"'prompt' is {shortened(prompt)}: the common beginning of whole conversations has to have the "
            "prompt; otherwise 'chosen' and 'rejected' begin with the assistant's message"
        )
    return _cut(texts, shared)


def _names(asked: Messages, shared: Messages) -> bool:
    """Return whether a `prompt` means the common beginning: it is one of its questions, or all of it as a string."""
    prompt, beginning = (
        [_words(message) for message in messages if message["role"] not in OPENERS[:2]] for messages in (asked, shared)
    )
    return bool(beginning) and (
        " ".join(prompt) in " ".join(beginning) or all(words in " ".join(prompt) for words in beginning)
    )


def _cut(texts: Sequence[Messages], size: int) -> tuple[Text, Text, Text]:
    return texts[0][:size], texts[0][size:], texts[1][size:]


def _words(message: Mapping[str, Any]) -> str:
    return " ".join(message["content"].split())


def _said(text: Text) -> Messages:
    return [{"role": "assistant", "content": text}] if isinstance(text, str) else text


def _check_numbers(pair: Pair, place: str) -> None:
    for name, low, high, allowed in (
        ("margin", -math.inf, math.inf, "a finite number"),
        ("probability", 0.0, 1.0, "a number between 0 and 1"),
    ):
        value = pair.get(name)
        if value is not None and not (_is_number(value) and low <= value <= high):
            raise DataError(
                f"{name!r} of {place} is {shortened(value)}: it must be {allowed}, or None if it is unknown"
            )
    group = pair.get("group")
    if group is not None and not (isinstance(group, str) or _is_number(group)):
        raise DataError(f"'group' of {place} is {shortened(group)}: it must be a string or a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _ranking(row: Mapping[str, Any], given: set[str], place: str) -> Ranking:
    """Return completions with `ranks`, of which 1 is the best, or with `ratings`, of which the highest is the best."""
    named = given & {"ranks", "ratings"}
    if len(named) != 1:
        raise DataError(f"{place} has 'completions' and {sorted(named)}: it needs either 'ranks' or 'ratings'")
    [name] = named
    completions, values = row["completions"], row[name]
    if isinstance(completions, str) or not all(isinstance(x, Sequence) for x in (completions, values)):
        raise DataError(f"'completions' and {name!r} of {place} must be lists, got {shortened(completions)}")
    if len(completions) != len(values) or not completions:
        raise DataError(
            f"'completions' of {place} has {len(completions)} texts, and {name!r} has {len(values)} numbers: give each "
            "text one"
        )
    texts = [checked_text(text, "completions", place) for text in completions]
    prompt = None if row.get("prompt") is None else checked_text(row["prompt"], "prompt", place)
    if name == "ranks":
        return Ranking(prompt, texts, [-checked_rank(value, place) for value in values], rated=False)
    return Ranking(prompt, texts, [_rating(value, place) for value in values], rated=True)


def _nectar(row: Mapping[str, Any], place: str) -> Ranking:
    """Return answers with ranks; rank 1 is the best."""
    prompt = checked_text(row["prompt"], "prompt", place)
    answers = row["answers"]
    if not isinstance(answers, Sequence) or not all(
        isinstance(answer, Mapping) and {"answer", "rank"} <= set(answer) for answer in answers
    ):
        raise DataError(
            f"'answers' of {place} is {shortened(answers)}: it must be a list of dicts with 'answer', 'rank'"
        )
    texts = [checked_text(answer["answer"], "answers", place) for answer in answers]
    return Ranking(prompt, texts, [-checked_rank(answer["rank"], place) for answer in answers], rated=False)


def _ultrafeedback(row: Mapping[str, Any], place: str) -> Ranking:
    """Return the responses to an instruction with their overall scores, as a conversation."""
    prompt: Text = [{"role": "user", "content": checked_text(row["instruction"], "instruction", place)}]
    completions = row["completions"]
    if not isinstance(completions, Sequence) or not all(
        isinstance(completion, Mapping) and {"response", "overall_score"} <= set(completion)
        for completion in completions
    ):
        raise DataError(
            f"'completions' of {place} is {shortened(completions)}: beside an 'instruction' it must be a list of dicts "
            "with 'response', 'overall_score'"
        )
    texts: list[Text] = [_said(checked_text(each["response"], "response", place)) for each in completions]
    return Ranking(prompt, texts, [_rating(each["overall_score"], place) for each in completions], rated=True)


def _labelled(row: Mapping[str, Any], place: str) -> Pair:
    """Return two answers as a pair; label 1 prefers A."""
    label = row["labels"]
    if isinstance(label, bool) or label not in (0, 1):
        raise DataError(f"'labels' of {place} is {shortened(label)}: it must be 1 if A is preferred, and 0 if B is")
    prompt = [{"role": "user", "content": checked_text(row["history"], "history", place)}]
    answers = [_said(checked_text(row[f"human_ref_{side}"], f"human_ref_{side}", place)) for side in "AB"]
    chosen, rejected = answers if label == 1 else answers[::-1]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _tree(node: Mapping[str, Any], place: str, before: Messages | None = None) -> Iterator[Ranking]:
    """Yield a ranking of the ranked replies to each message of a tree; rank 0 is the best."""
    before = [*(before or []), message_of(node, place)]
    replies = list(node.get("replies") or [])
    ranked = [reply for reply in replies if reply.get("rank") is not None and reply.get("role") == "assistant"]
    if ranked:
        texts: list[Text] = [[message_of(reply, place)] for reply in ranked]
        yield Ranking(before, texts, [-checked_rank(reply["rank"], place) for reply in ranked], rated=False)
    for reply in replies:
        yield from _tree(reply, place, before)


def _rating(rating: Any, place: str) -> float:
    if not _is_number(rating):
        raise DataError(
            f"a rating of {place} is {shortened(rating)}: it must be a finite number; the highest is the best"
        )
    return float(rating)
