"""Run parts of `make gpu` in one process, one after another, so that torch and other libraries are imported once.

It reads requests from stdin, each a line of JSON with `script` and `device`, and prints `{"ended": code}` after each.
"""

from __future__ import annotations

import gc
import json
import runpy
import sys
import traceback
from pathlib import Path


def run(script: str, device: str) -> int:
    """Run a script as `python script --device device` does, and return its exit code."""
    sys.argv = [script, "--device", device]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def free_memory() -> None:
    """Return a part's memory to the GPU, so that the next one, or a process beside it, finds all of it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main() -> None:
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # with PYTHONSAFEPATH it is not there
    while line := sys.stdin.readline():
        code = run(**json.loads(line))
        free_memory()
        sys.stderr.flush()
        print("\n" + json.dumps({"ended": code}), flush=True)


if __name__ == "__main__":
    main()
