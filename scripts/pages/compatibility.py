"""Write docs/compatibility.md: models and tokenizers that textgym supports exactly, and those that it rejects.

    python scripts/pages/compatibility.py           # every part
    python scripts/pages/compatibility.py models    # one part

Each part is a module `compatibility_<part>.py` in this folder. Its `section()` runs the checks and returns the part's
section of the page.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import compatibility_models
import compatibility_tokenizers

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
PARTS: dict[str, Callable[[], str]] = {
    "models": compatibility_models.section,
    "tokenizers": compatibility_tokenizers.section,
}


def with_section(page: str, part: str, section: str) -> str:
    """Return the page with the section of one part replaced, or added at the end."""
    text = f"## {part.capitalize()}\n\n{section.strip()}\n"
    pattern = rf"## {part.capitalize()}\n.*?(?=\n## |\Z)"
    if re.search(pattern, page, re.DOTALL) is None:
        return f"{page.rstrip()}\n\n{text}"
    return re.sub(pattern, lambda _: text, page, flags=re.DOTALL)


def main() -> None:
    """Run the checks of the given parts, print their sections and write them into the page."""
    parser = argparse.ArgumentParser(description="Check models and tokenizers, and write docs/compatibility.md.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; all if none is given")
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"there is no part called {', '.join(unknown)}: choose from {', '.join(PARTS)}")

    for part in chosen:
        section = PARTS[part]()
        print(section)
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), part, section), encoding="utf-8")


if __name__ == "__main__":
    main()
