"""Device of both sides of a benchmark against another library, which takes a GPU if there is one."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UPS = 2 if DEVICE == "cuda" else 1
"""Updates before the timed ones; on a GPU the second one captures steps."""
