"""The `textgym` command, before torch is imported: `python -m textgym` does the same."""

from __future__ import annotations

import sys

from textgym.models.machine.determinism import prepare_environment


def main() -> None:
    """Set what a bit-for-bit run needs from the environment, then run the command line."""
    words = sys.argv[1:]
    prepare_environment(words)
    if words[:1] in (["train"], ["resume"], ["demo"], ["reward-model"]) and not {"--quiet", "--help", "-h"} & {*words}:
        print("textgym: loading torch and transformers", file=sys.stderr, flush=True)  # which takes seconds

    from textgym.cli import main as run  # imports torch, which reads the environment

    run()


if __name__ == "__main__":
    main()
