"""What models read of a data set: counts, cut tokens, faults, and a few texts token for token.

textgym data pairs.jsonl
textgym data rows.jsonl --reader sft --model runs/sft/policy --max-length 256
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from textgym.data.completions import Example, PlacedExample, Reading, placed_examples, read_examples, read_pairs
from textgym.data.faults import Faults
from textgym.data.forms.trees import is_one_message
from textgym.data.preferences import PlacedPair, placed_preferences, text_of
from textgym.data.rows import read_rows
from textgym.errors import DataError
from textgym.models.architectures.positions import position_limit
from textgym.models.loading import load_classifier, load_tokenizer, resolve
from textgym.rewards.models.config import RewardModelConfig
from textgym.rewards.models.reading import WITHOUT_LIMIT
from textgym.rewards.models.reward_model import RewardModel
from textgym.rewards.models.training import read_rated_pairs
from textgym.settings import Reader

ACCEPTED = "data are a .jsonl file, or 'module:attribute'"


@dataclass
class Texts:
    """What a model reads of a data set.

    Attributes:
        what: What the rows are to it, such as "examples".
        places: Descriptions of their rows.
        texts: What it reads of each, by name, such as "prompt".
        lengths: Number of tokens of each text.
        whole_lengths: The same before texts are cut.
        faults: What is wrong with rows.
    """

    what: str
    places: list[str]
    texts: list[dict[str, str]]
    lengths: list[int]
    whole_lengths: list[int]
    faults: Faults


def data_report(
    source: str, model: str = "tiny", reader: Reader | None = None, max_length: int = 512, examples: int = 3
) -> Iterator[str]:
    """Yield the lines of a report.

    Args:
        source: A .jsonl file or `"module:attribute"`.
        model: The model that is to be trained; its tokenizer and its number of positions count.
        reader: What reads the data; `None` for all that can read the first row.
        max_length: Maximum number of tokens of a text.
        examples: How many rows to show.

    Raises:
        DataError: If a row cannot be read; the message names it.
    """
    rows = [row for _, row in read_rows(source, "data", ACCEPTED)]
    if not rows:
        raise DataError(f"{source} has no rows")
    yield f"{source}: {len(rows)} rows; {_columns(rows)}"

    limit = position_limit(AutoConfig.from_pretrained(resolve(model)))
    max_length = max_length if limit is None else min(max_length, limit)
    for name in [reader] if reader is not None else readers_of(rows):
        texts = READERS[name](source, model, max_length)
        yield ""
        yield from _section(name, texts, max_length, examples)


def readers_of(rows: Sequence[Any]) -> list[Reader]:
    """Return what can read the first row, or the trees that rows of one message each make up.

    Raises:
        DataError: If nothing can.
    """
    found: list[Reader] = []
    reasons = []
    for load, names in ((placed_examples, ("sft",)), (placed_preferences, ("dpo", "reward-model"))):
        try:
            load(rows if is_one_message(rows[0]) else rows[:1])
            found += names  # type: ignore[arg-type]
        except ValueError as error:
            reasons.append(str(error))
    if not found:
        raise DataError("nothing can read the first row: " + "; ".join(reasons))
    return found


def _columns(rows: Sequence[Any]) -> str:
    """Return how many rows have a value in each column."""
    columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    counts = {key: sum(isinstance(row, dict) and row.get(key) is not None for row in rows) for key in columns}
    return "values in columns: " + ", ".join(f"{key} {count}" for key, count in counts.items())


def _section(name: str, texts: Texts, max_length: int, examples: int) -> Iterator[str]:
    lengths = texts.lengths
    lost = [whole - kept for whole, kept in zip(texts.whole_lengths, lengths, strict=True) if whole > kept]
    yield (
        f"{name} reads {len(texts.places)} {texts.what}; tokens of a text: {min(lengths)} to {max(lengths)}, median "
        f"{statistics.median(lengths):g}; max_length={max_length} cuts {len(lost)} of {len(lengths)} texts by "
        f"{sum(lost)} tokens"
    )
    for sentence in texts.faults.sentences():
        yield f"  warning: {sentence}"
    for place, parts in list(zip(texts.places, texts.texts, strict=True))[:examples]:
        yield f"  {place}"
        # `repr` shows line breaks and spaces, and keeps control characters from the terminal.
        yield from (f"    {part}: {text!r}" for part, text in parts.items())


def _read_by_sft(source: str, model: str, max_length: int) -> Texts:
    tokenizer, rows = load_tokenizer(model), placed_examples(source)
    texts, faults = read_examples(rows, Reading(tokenizer, max_length))
    whole, _ = read_examples(rows, Reading(tokenizer, WITHOUT_LIMIT))
    shown = [
        {"prompt": shown_text(tokenizer, text.prompt), "completion": shown_text(tokenizer, text.completion)}
        for text in texts
    ]
    return Texts("examples", _places(rows), shown, _lengths(texts), _lengths(whole), faults)


def _read_by_dpo(source: str, model: str, max_length: int) -> Texts:
    tokenizer, rows = load_tokenizer(model), placed_preferences(source)
    pairs, faults = read_pairs(rows, Reading(tokenizer, max_length))
    whole, _ = read_pairs(rows, Reading(tokenizer, WITHOUT_LIMIT))
    shown = [
        {
            "prompt": shown_text(tokenizer, chosen.prompt),
            "chosen": shown_text(tokenizer, chosen.completion),
            "rejected": shown_text(tokenizer, rejected.completion),
        }
        for chosen, rejected in pairs
    ]
    lengths, whole_lengths = (_lengths([text for pair in some for text in pair]) for some in (pairs, whole))
    return Texts("preferences", _places(rows), shown, lengths, whole_lengths, faults)


def _read_by_reward_model(source: str, model: str, max_length: int) -> Texts:
    rows = placed_preferences(source)
    reward_model = RewardModel(load_classifier(model, num_layers=1), load_tokenizer(model), max_length=max_length)
    pairs, faults = read_rated_pairs(rows, reward_model, RewardModelConfig())
    tokenizer = reward_model.tokenizer
    shown = [
        {"chosen": shown_text(tokenizer, pair.chosen), "rejected": shown_text(tokenizer, pair.rejected)}
        for pair in pairs
    ]
    lengths = [len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    texts = [text_of(row.pair, side) for row in rows for side in ("chosen", "rejected")]
    whole_lengths = [len(ids) for ids in reward_model.encode(texts, WITHOUT_LIMIT)]
    return Texts("preferences", _places(rows), shown, lengths, whole_lengths, faults)


def shown_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of ids, with special tokens."""
    return str(tokenizer.decode(list(ids)))


def _places(rows: Sequence[PlacedExample] | Sequence[PlacedPair]) -> list[str]:
    return [row.place for row in rows]


def _lengths(texts: Sequence[Example]) -> list[int]:
    return [len(text.prompt) + len(text.completion) for text in texts]


READERS: dict[str, Callable[[str, str, int], Texts]] = {
    "sft": _read_by_sft,
    "dpo": _read_by_dpo,
    "reward-model": _read_by_reward_model,
}
