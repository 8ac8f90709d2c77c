"""Write docs/data_forms.md: what SFT, DPO and reward models read of the forms that public data sets have.

    python scripts/pages/data_forms.py

`examples/data/` has a small file of each form. `tests/test_docs.py` fails if the page is not what this prints.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from textgym.agents.runs.data_report import READERS, Texts
from textgym.models.loading import ASSETS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "data_forms.md"
FORMS = {
    "ultrafeedback": "UltraFeedback, binarized (H4): a prompt beside whole conversations",
    "hh": "HH as conversations: prompt, chosen and rejected are lists of messages",
    "hh_strings": "HH as strings: chosen and rejected are whole texts, and there is no prompt",
    "shp": "SHP: a post, two comments, and a label that says which is preferred",
    "nectar": "Nectar: a prompt and answers with ranks; each comparison is a pair",
    "capybara_dpo": "Capybara-DPO: conversations of several turns, and the last question as the prompt",
    "oasst_trees": "OpenAssistant: trees of messages with ranks; each comparison of replies is a pair",
    "oasst_messages": "OpenAssistant, flat (oasst1): one message a row, put together to trees by `parent_id`",
    "rewardbench": "RewardBench: prompt, chosen and rejected are strings",
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
HEADER = """# Forms of public data sets

What models read of the forms that public data sets have, by `python scripts/pages/data_forms.py`. The files are in
[examples/data](../examples/data); each has two rows that were written for this page in the schema of the data set. The
tokenizer is that of `"tiny"` with a chat template, `<user> ...`, and `<|endoftext|>` is its EOS. [Your data](data.md)
lists all accepted forms, and `textgym data FILE` prints this for your own file.

"""


def page() -> str:
    """Return the page."""
    with tempfile.TemporaryDirectory() as folder:
        model = with_template(Path(folder) / "tiny")
        found = {form: {reader: _read(form, reader, model) for reader in READERS} for form in FORMS}
    rows = [f"| {form} | {' | '.join(map(_cell, readers.values()))} |" for form, readers in found.items()]
    table = "\n".join(["| file | SFT | DPO | reward model |", "| --- | --- | --- | --- |", *rows])
    sections = [_section(form, readers) for form, readers in found.items()]
    return HEADER + table + "\n\n" + "\n".join(sections)


def with_template(folder: Path) -> str:
    """Write a copy of the embedded model whose tokenizer has a chat template, and return its path."""
    shutil.copytree(ASSETS / "tiny", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def _read(form: str, reader: str, model: str) -> Texts | str:
    """Return what a reader reads of a file, or why it does not."""
    try:
        return READERS[reader](str(ROOT / "examples" / "data" / f"{form}.jsonl"), model, 128)
    except ValueError as error:
        return str(error).replace(f"{ROOT}/", "")


def _cell(texts: Texts | str) -> str:
    if isinstance(texts, str):
        return "refused"
    return f"{len(texts.places)} {texts.what}" + (", with warnings" if texts.faults.places else "")


def _section(form: str, readers: dict[str, Texts | str]) -> str:
    lines = [f"## {FORMS[form]}", ""]
    for reader, texts in readers.items():
        if isinstance(texts, str):
            lines += [f"{reader}: refused. {texts}", ""]
            continue
        shown = [f"{name}: {text!r}" for row in texts.texts for name, text in row.items()]
        said = [f"Warning: {sentence.replace(f'{ROOT}/', '')}." for sentence in texts.faults.sentences()]
        lines += [f"{reader}:", "", *said, *([""] if said else []), "```text", *shown, "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
