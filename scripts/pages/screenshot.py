"""Draw what a command shows on a terminal, as an SVG for the documentation.

    pip install pyte
    python scripts/pages/screenshot.py --command "textgym train --total-episodes 1024" --output train.svg

The command runs in a terminal of its own. Its screen is drawn at the end, or when `--wait-for` is on it for the first
time.
"""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyte
import tyro
from rich.console import Console
from rich.style import Style
from rich.text import Text


@dataclass
class Args:
    command: str
    """The command; `textgym` is the one of this Python."""
    output: Path
    """The SVG file."""
    wait_for: str | None = None
    """A text; the screen is drawn, and the command ended, when it shows the text."""
    columns: int = 110
    lines: int = 40


def shown(args: Args) -> pyte.Screen:
    """Run the command, and return its screen."""
    screen = pyte.Screen(args.columns, args.lines)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": str(args.columns),
        "LINES": str(args.lines),
        "TERM": "xterm-256color",
    }
    command, streams = shlex.split(args.command), {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, env=environment, **streams) as run:
        os.close(theirs)
        while True:
            try:
                stream.feed(os.read(ours, 65_536))
            except OSError:  # the command has ended
                return screen
            if args.wait_for is not None and any(args.wait_for in line for line in screen.display):
                run.terminate()
                return screen


def lines_of(screen: pyte.Screen) -> list[Text]:
    """Return the lines of a screen with their colours, without the empty ones at the end."""
    lines = []
    for row in range(screen.lines):
        line = Text()
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        for style, same in itertools.groupby(cells, style_of):
            line.append("".join(cell.data for cell in same), style)
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def style_of(cell: pyte.screens.Char) -> Style:
    """Return the style of a cell."""
    return Style(color=colour_of(cell.fg), bold=cell.bold, italic=cell.italics)


def colour_of(name: str) -> str | None:
    """Return the name that rich has for a colour of pyte."""
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return None if name == "default" else name.replace("bright", "bright_").replace("brown", "yellow")


def main(args: Args) -> None:
    screen = shown(args)
    console = Console(record=True, width=args.columns, file=io.StringIO())
    for line in lines_of(screen):
        console.print(line, soft_wrap=True)
    console.save_svg(str(args.output), title=args.command)


if __name__ == "__main__":
    main(tyro.cli(Args))
