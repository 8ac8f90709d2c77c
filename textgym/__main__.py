"""The `textgym` command, before torch is imported: `python -m textgym` does the same."""

from __future__ import annotations

import os
import sys

from textgym.models.machine.determinism import deterministic_environment


def main() -> None:
    """Set what a bit-for-bit run needs from the environment, then run the command line."""
    if "--deterministic" in sys.argv[1:]:
        os.environ.update(deterministic_environment())

    from textgym.cli import main as run  # imports torch, which reads the environment

    run()


if __name__ == "__main__":
    main()
