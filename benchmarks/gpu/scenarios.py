"""Tests of tests/on_cuda: agents, environments, the command and Stable-Baselines3 on a GPU, beside the CPU."""

from __future__ import annotations

from measuring.figures import skip, start
from measuring.tally import run_tests


def main() -> None:
    device = start(__doc__)
    if device.type != "cuda":
        skip("these tests need a GPU; tests/test_pretend_cuda.py runs them on a pretend one")
    run_tests("tests/on_cuda", device)


if __name__ == "__main__":
    main()
