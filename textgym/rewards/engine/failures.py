"""RecentFailures: the share of rows in which reward functions failed lately, and an error when it is too large."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from textgym.rewards.engine.completions_to_score import RewardError

FEWEST_ROWS, FEWEST_CALLS = 1000, 20
"""The share is that of the last 1,000 rows, or of the last 20 calls if they have more: one lost batch is no outage."""
FIRST_ROWS = 50
"""Rows before which no share is judged: of few, one is a large share."""


class RecentFailures:
    """Counts failed rows, and raises an error if they are too large a share of the recent ones.

    Args:
        limit: The largest share.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._calls: deque[tuple[int, int]] = deque()  # rows and failed rows of each
        self.rows = self.failed = 0

    @property
    def share(self) -> float:
        """Share of the recent rows in which a function failed."""
        return self.failed / self.rows if self.rows else 0.0

    def count(self, failed: np.ndarray, errors: Mapping[str, int]) -> None:
        """Count the rows of a call.

        Args:
            failed: Bool `(N,)`, the rows in which a function failed.
            errors: Failures of each function so far, for the error message.

        Raises:
            RewardError: If the share is above the limit.
        """
        self._calls.append((len(failed), int(failed.sum())))
        self.rows += len(failed)
        self.failed += int(failed.sum())
        while len(self._calls) > FEWEST_CALLS and self.rows - self._calls[0][0] >= FEWEST_ROWS:
            rows, lost = self._calls.popleft()
            self.rows -= rows
            self.failed -= lost
        if self.rows >= FIRST_ROWS and self.share > self.limit:
            counts = ", ".join(f"{name!r} {number:,}" for name, number in errors.items() if number)
            raise RewardError(
                f"reward functions failed in {self.failed:,} of the last {self.rows:,} rows, {self.share:.0%}, and "
                f"max_reward_failures={self.limit:g} allows {self.limit:.0%} (rows in all: {counts}). Look at the "
                "warning of the first failure: is a service down, or a time limit too short? With a larger "
                "max_reward_failures the run goes on"
            )
