"""The original data sets of the hub, for which the tasks use stand-ins by default (extra `tasks`).

Each data set has the licence that its card states. The `datasets` package downloads and caches them. Since version 4 it
does not run scripts, so data sets that are defined by a script are read from the hub's conversion to parquet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from textgym.data.corpora.splits import check_split
from textgym.data.rows import Row

Record = Mapping[str, Any]
CONVERSIONS = "refs/convert/parquet"
"""The branch of a data set that holds the hub's conversion to parquet."""


@dataclass(frozen=True)
class Original:
    """A data set of the hub.

    Attributes:
        path: Its name, or a folder with files of the same columns.
        rows: Function that makes rows of prompts from its records.
        config: Name of the configuration, if there are several.
        converted: Folder of the configuration in the conversion to parquet, possibly as a glob pattern; its subfolders
            are the splits. `None` if the data set is not defined by a script.
    """

    path: str
    rows: Callable[[Iterable[Record]], list[Row]]
    config: str | None = None
    converted: str | None = None

    def load(self, split: str, revision: str | None = None) -> list[Row]:
        """Load rows with `prompt`, `references` and the other columns of the task.

        Args:
            split: `"train"`, `"validation"` or `"test"`.
            revision: Commit of the data set, or of its conversion to parquet; `None` for the newest.

        Raises:
            ImportError: If the datasets package is missing; the message says how to install it.
            ValueError: If the split is unknown.
        """
        check_split(split)
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError(f"{self.path} needs datasets: pip install 'textgym[tasks]'") from error
        if self.converted is None:
            named = {} if revision is None else {"revision": revision}
            return self.rows(load_dataset(self.path, self.config, split=split, **named))
        # Without explicit files, `datasets` would take the folder "challenge_test" for a part of the split "test".
        files = {split: f"{self.converted}/{split}/*.parquet"}
        return self.rows(load_dataset(self.path, data_files=files, split=split, revision=revision or CONVERSIONS))


def _common_gen(records: Iterable[Record]) -> list[Row]:
    """Return one row per set of concepts; each record has one of its sentences."""
    grouped: dict[int, Row] = {}
    for record in records:
        row = grouped.setdefault(
            record["concept_set_idx"],
            {"prompt": f"{', '.join(record['concepts'])} =", "concepts": list(record["concepts"]), "references": []},
        )
        row["references"] += [record["target"]] if record["target"] else []  # the test split has no public targets
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
