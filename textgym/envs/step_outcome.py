"""StepOutcome: the result of one step of all rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from textgym.envs.episodes import Ends


@dataclass(frozen=True)
class StepOutcome:
    """Result of one step of all rows.

    Attributes:
        rewards: `(B,)` float32, on the task's device.
        ends: Rows that ended by a stop token, and by length.
        ended: Rows that ended, bool `(B,)`, on the host.
        infos: NumPy arrays `(B,)` by key, set for rows that ended, NaN if unknown; empty if no row ended.
    """

    rewards: Tensor
    ends: Ends
    ended: np.ndarray
    infos: dict[str, np.ndarray]

    def known(self, key: str) -> np.ndarray:
        """Return bool `(B,)`: the rows that ended and have this info; success is unknown without a score."""
        known = self.ended & ~np.isnan(self.infos[key])
        return known & self.infos["scored"] if key == "is_success" else known
