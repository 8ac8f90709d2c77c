"""`python -m textgym`, which is the `textgym` command."""

from __future__ import annotations

import sys

from textgym.announce import announce


def main() -> None:
    """Runs the command line of this process."""
    announce(sys.argv[1:])
    from textgym.cli import main as run  # after the first line, since it takes a while

    run()


if __name__ == "__main__":
    main()
