"""`python -m textgym`, which is the `textgym` command."""

from __future__ import annotations

from textgym.cli import main

if __name__ == "__main__":
    main()
