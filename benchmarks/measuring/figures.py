"""Output of a part of `make gpu`: for each metric a line of text, and a JSON object for scripts/gpu/gpu.py."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

import torch

from measuring.peers import say
from textgym.models.machine.devices import resolve_device


def start(description: str | None) -> torch.device:
    """Read the command line of a part, which has only `--device`, and disable TF32, which is less precise than float32.

    Exits with one line if there is no such device.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    name = parser.parse_args().device
    try:
        device = resolve_device(name)
    except ValueError as error:
        say({"no device": str(error)})
        sys.exit(0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        torch.set_num_threads(1)
    return device


def tell(
    name: str,
    value: float | str,
    unit: str = "",
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    judged: bool = True,
    note: str = "",
) -> None:
    """Print a metric with its goal; if not `judged`, as at toy size, the goal is shown but not checked."""
    figure: dict[str, Any] = {"name": name, "value": value, "unit": unit, "note": note}
    if at_most is not None or at_least is not None:
        figure["goal"] = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}"
        met = value <= at_most if at_most is not None else value >= at_least
        figure["met"] = met if judged else None
    say({"figure": figure})


def note(text: str) -> None:
    """Print a line for the page of results, such as a size that had to be smaller."""
    say({"note": text})


def skip(why: str) -> NoReturn:
    """End the part and print the reason."""
    say({"skipped": why})
    sys.exit(0)


def need_bf16(device: torch.device) -> None:
    """Skip the part on a GPU without bfloat16, which torch would emulate."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        skip(f"{torch.cuda.get_device_name(device)} has no bfloat16")
