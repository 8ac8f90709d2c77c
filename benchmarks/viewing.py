"""What the page of a large run costs: CPU time to write it, to write it again, and to add a record, and bytes.

    python benchmarks/viewing.py                            # 10 million tokens in records of 64 rows of 20 tokens
    python benchmarks/viewing.py --tokens 1000000 --length 160

Records are synthetic: random numbers and pieces, which compress worse than those of a run. The first page reads and
writes everything; `textgym view` of a page that is there, and each look of `textgym view --follow`, the new records.
"""

from __future__ import annotations

import gzip
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from textgym.data import manifests
from textgym.data.manifests import RUN, RUN_KIND
from textgym.viewer.page import Page
from textgym.viewer.records import FORMAT, Record, record_path, write_record

DEVIATIONS = {"log_prob": 2.0, "kl": 0.1, "value": 1.0, "return": 1.0, "advantage": 1.0, "entropy": 1.0, "ratio": 0.1}
EACH = 5


@dataclass
class Args:
    tokens: int = 10_000_000
    """Recorded tokens of the run."""
    rows: int = 64
    """Rows of a record."""
    length: int = 20
    """Tokens of a response."""
    folder: Path | None = None
    """Where the run and its page stay; by default they are removed."""


def synthetic(args: Args) -> Record:
    """Return a record of random numbers."""
    generator = random.Random(0)
    tokens, pieces = args.rows * args.length, 400

    def normal(deviation: float, number: int = tokens) -> list[float]:
        return [generator.gauss(0, deviation) for _ in range(number)]

    def alternatives() -> dict[str, Any]:
        return {
            "piece": [generator.randrange(pieces) for _ in range(EACH * tokens)],
            "percent": [generator.randrange(100) for _ in range(EACH * tokens)],
        }

    return {
        "format": FORMAT,
        "textgym": "0.2.0",
        "agent": "PPO",
        "update": 0,
        "episodes": 0,
        "kl_coef": 0.05,
        "clip": [0.8, 1.2],
        "num_rows": args.rows,
        "pieces": [f" piece{number}" for number in range(pieces)],
        "prompts": [f"The beginning of review {number} of a film" for number in range(args.rows)],
        "rows": {
            "prompt": list(range(args.rows)),
            "length": [args.length] * args.rows,
            "score": normal(1.0, args.rows),
            "stopped": [True] * args.rows,
            "judge": normal(1.0, args.rows),
        },
        "judges": ["judge"],
        "texts": {},
        "tokens": {"piece": [generator.randrange(pieces) for _ in range(tokens)], "reward": normal(1.0)},
        "numbers": {
            **{name: normal(deviation) for name, deviation in DEVIATIONS.items()},
            "clipped": [float(generator.random() < 0.1) for _ in range(tokens)],
        },
        "each": EACH,
        "alternatives": {"policy": alternatives(), "reference": alternatives()},
    }


def write_run(run: Path, args: Args) -> int:
    """Write a run with so many recorded tokens, and return the number of its records."""
    run.mkdir(parents=True)
    (run / RUN).write_text(json.dumps({"kind": RUN_KIND, "format": manifests.FORMAT}))
    packed = json.loads(gzip.decompress(write_record(run, synthetic(args)).read_bytes()))
    record_path(run, 0).unlink()
    number = -(-args.tokens // (args.rows * args.length))
    with (run / "metrics.jsonl").open("w") as metrics:
        for update in range(1, number + 1):
            add_record(run, packed, update)
            metrics.write(json.dumps({"objective/scores": update / number, "episodes": args.rows * update}) + "\n")
    return number


def add_record(run: Path, packed: Record, update: int) -> None:
    """Write a record of an update, packed as it is in its file."""
    text = json.dumps({**packed, "update": update, "episodes": packed["num_rows"] * update}, ensure_ascii=False)
    record_path(run, update).write_bytes(gzip.compress(text.encode(), compresslevel=1))


def timed(title: str, work: Callable[[], Any]) -> None:
    """Print the CPU seconds of a piece of work."""
    started = time.process_time()
    work()
    print(f"{title}: {time.process_time() - started:.2f} CPU s", flush=True)


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        run = (Path(temporary) if args.folder is None else args.folder) / "run"
        number = write_run(run, args)
        print(f"{number * args.rows * args.length / 1e6:.1f} million tokens in {number} records")
        timed("first page", Page([run]).write)
        page = Page([run])
        timed("the same page, in a new process", page.write)
        add_record(run, json.loads(gzip.decompress(record_path(run, 1).read_bytes())), number + 1)
        timed("one more record, with --follow", page.write)
        for name, folder in (("run folder", run / "records"), ("page", run / "viewer")):
            print(f"{name}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.0f} MB")
        print(f"index of the page: {(run / 'viewer' / 'data' / 'index.js').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args))
