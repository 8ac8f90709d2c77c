"""The first line of commands that take long: it is printed before anything is loaded that takes time."""

from __future__ import annotations

import sys
from collections.abc import Sequence

LONG = ("train", "resume", "demo", "reward-model")
"""Commands that load torch and transformers, which takes seconds, and then compute."""


def announce(words: Sequence[str]) -> None:
    """Print a first line if a command line asks for a long command, and neither for help nor for silence."""
    if words[:1] and words[0] in LONG and not {"--quiet", "--help", "-h"} & set(words):
        print("textgym: loading torch and transformers", file=sys.stderr, flush=True)
