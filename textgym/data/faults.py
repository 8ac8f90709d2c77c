"""Faults of rows that training would not notice: counted when data is read, said once, refused above a share."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence

from textgym.errors import DataError, DataWarning

CUT_PROMPT = "lose the beginning of their prompt"
NO_END = "lose their end token"
EQUAL_SIDES = "have two sides that are equal to the model"
NOT_RANKED = "have no two texts with different values"
EMPTY_PROMPT = "have an empty prompt"
EMPTY_COMPLETION = "have an empty completion"
REPEATED_PROMPT = "repeat their prompt in the completion"
OTHER_TURNS = "have turns of others than the assistant in a completion"
JOINED = "have no white space between prompt and completion"
DUPLICATE = "are duplicates"
OVERLAP = "share their prompt or text with training rows"

REMEDIES = {
    CUT_PROMPT: "raise max_length, or shorten them",
    NO_END: "raise max_length, or shorten them",
    EQUAL_SIDES: "such pairs teach nothing: leave them out, or raise max_length if it cuts them",
    NOT_RANKED: "they are left out",
    EMPTY_PROMPT: "leave the rows out; texts without a prompt have no column 'prompt' (for SFT {'text': ...})",
    EMPTY_COMPLETION: "leave the rows out",
    REPEATED_PROMPT: "pass whole texts as {'text': ...}, or the completion alone",
    OTHER_TURNS: "the model would learn to write them: end both conversations after the assistant's first new message",
    JOINED: "both are read as one string; begin completions with a space, or pass conversations",
    DUPLICATE: "each counts as often as it is there",
    OVERLAP: "their accuracy is not that on new prompts",
}
TOLERATED = (DUPLICATE, JOINED, OVERLAP, NOT_RANKED)
"""Faults that are never refused: rows are repeated to give them weight, words may go on in the completion, an accuracy
may be asked for on any pairs, and raters may find all texts alike."""
RARELY_MEANT = (DUPLICATE, JOINED)
"""Faults that are said only above the allowed share."""


class Faults:
    """Counts the rows with each fault.

    Args:
        what: What the rows are, such as "examples".
        total: How many there are.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.places: dict[str, list[str]] = {}

    def count(self, fault: str, place: str) -> None:
        """Count a row with a fault of this module."""
        self.places.setdefault(fault, []).append(place)

    def sentences(self, without: Sequence[str] = ()) -> list[str]:
        """Return a sentence for each fault that rows have, but for some."""
        return [
            f"{len(places)} of {self.total} {self.what} {fault} (first: {places[0]}): {REMEDIES[fault]}"
            for fault, places in self.places.items()
            if fault not in without
        ]

    def check(self, allowed: float) -> None:
        """Warn of all faults, once; a few duplicates are none.

        Args:
            allowed: Largest share of rows with a fault.

        Raises:
            DataError: If more rows have a fault that is not one of `TOLERATED`.
        """
        many = {fault for fault, places in self.places.items() if len(places) > allowed * self.total}
        said = "; ".join(self.sentences(without=[fault for fault in RARELY_MEANT if fault not in many]))
        if many - set(TOLERATED):
            raise DataError(
                f"{said}. More than {allowed:.2%} of the rows is refused: mend the data, or allow a larger share with "
                "allow_faulty_rows (1.0 allows all)"
            )
        if said:
            warnings.warn(said, DataWarning, stacklevel=level_of_caller())


def level_of_caller() -> int:
    """Return the `stacklevel` of the first caller outside textgym, from the function that calls this one."""
    frames = inspect.stack(0)[1:]
    names = [str(frame.frame.f_globals.get("__name__", "")) for frame in frames]
    return next((level for level, name in enumerate(names, 1) if name.partition(".")[0] != "textgym"), 1)
