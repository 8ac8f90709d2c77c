"""The data sets that the stand-ins stand for, from the hub, with the columns that their tasks read (extra `tasks`).

Each keeps the licence of its own card. They are loaded by name with the `datasets` package, which caches them. It runs
no scripts since its version 4; of data sets that are defined by one it reads the hub's own conversion to parquet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from textgym.data.corpora.splits import check_split
from textgym.data.rows import Row

Record = Mapping[str, Any]
CONVERSIONS = "refs/convert/parquet"
"""The branch of a data set that the hub's conversion is on."""


@dataclass(frozen=True)
class Original:
    """A data set of the hub.

    Attributes:
        path: its name, or a folder with files of the same columns.
        rows: makes prompts of its records.
        config: which part of it.
        converted: the folder of that part in the conversion to parquet, which may be a pattern; its subfolders are the
            splits. Not set where the data set is no script.
    """

    path: str
    rows: Callable[[Iterable[Record]], list[Row]]
    config: str | None = None
    converted: str | None = None

    def load(self, split: str) -> list[Row]:
        """Rows with `prompt`, `references` and what else the task reads.

        Args:
            split: `"train"`, `"validation"` or `"test"`.

        Raises:
            ImportError: without the datasets package; the message is the pip line.
            ValueError: an unknown split.
        """
        check_split(split)
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError(f"{self.path} needs datasets: pip install 'textgym[tasks]'") from error
        if self.converted is None:
            return self.rows(load_dataset(self.path, self.config, split=split))
        files = {split: f"{self.converted}/{split}/*.parquet"}  # by themselves "challenge_test" would count as "test"
        return self.rows(load_dataset(self.path, data_files=files, split=split, revision=CONVERSIONS))


def _common_gen(records: Iterable[Record]) -> list[Row]:
    """One row for each set of concepts: a record has one of its sentences."""
    grouped: dict[int, Row] = {}
    for record in records:
        row = grouped.setdefault(
            record["concept_set_idx"],
            {"prompt": f"{', '.join(record['concepts'])} =", "concepts": list(record["concepts"]), "references": []},
        )
        row["references"] += [record["target"]] if record["target"] else []  # those of the test split are not public
    return list(grouped.values())


def _cnn_dailymail(records: Iterable[Record]) -> list[Row]:
    return [{"prompt": f"{r['article']} In short:", "references": r["highlights"]} for r in records]


def _totto(records: Iterable[Record]) -> list[Row]:
    return [
        {
            "prompt": f"{r['linearized_input']} | Text:",
            "references": list(r["references"]) or [r["target"]],
            "concepts": [r["table_page_title"]],
        }
        for r in records
    ]


def _iwslt(records: Iterable[Record]) -> list[Row]:
    return [
        {"prompt": f"English: {pair['en']} German:", "references": [pair["de"]]}
        for pair in (r["translation"] for r in records)
    ]


def _narrative_qa(records: Iterable[Record]) -> list[Row]:
    rows = []
    for record in records:
        answers = [answer["text"] for answer in record["answers"]]
        story, question = record["document"]["summary"]["text"], record["question"]["text"]
        prompt = f"{story} Question: {question} Answer:"
        rows.append({"prompt": prompt, "answer": answers[0], "references": answers})
    return rows


def _daily_dialog(records: Iterable[Record]) -> list[Row]:
    return [
        {"prompt": f"A: {first.strip()}\nB: {second.strip()}\nA:", "references": reply.strip()}
        for turns in (record["utterances"] for record in records)
        for first, second, reply in zip(turns, turns[1:], turns[2:], strict=False)
    ]


COMMON_GEN = Original("allenai/common_gen", _common_gen)
CNN_DAILYMAIL = Original("abisee/cnn_dailymail", _cnn_dailymail, "3.0.0")
TOTTO = Original("GEM/totto", _totto, converted="*")
IWSLT = Original("IWSLT/iwslt2017", _iwslt, converted="iwslt2017-en-de")
NARRATIVE_QA = Original("deepmind/narrativeqa", _narrative_qa)
DAILY_DIALOG = Original("roskoN/dailydialog", _daily_dialog, converted="full")
