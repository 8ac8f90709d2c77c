"""Tests of tests/gpu: float32 without TF32 equals the CPU up to rounding; bfloat16 is in its band."""

from __future__ import annotations

from measuring.figures import start
from measuring.tally import run_tests


def main() -> None:
    run_tests("tests/gpu", start(__doc__))


if __name__ == "__main__":
    main()
