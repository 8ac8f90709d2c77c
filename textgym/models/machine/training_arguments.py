"""OneDeviceArguments: `transformers.TrainingArguments` for training where the model is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from textgym.models.machine.devices import resolve_device


@dataclass
class OneDeviceArguments(TrainingArguments):
    """Trains a model on the device that it is on, and on no other.

    `TrainingArguments` takes every GPU that a single process sees: it moves the model to the first one, wraps it in
    `DataParallel` and multiplies the batch by their number. Several processes each have a device already, which stays.
    The device becomes the current one, so whoever trains does so within `on_device`.
    """

    model_device: str = "cpu"
    """Where the model is."""

    def __post_init__(self) -> None:
        self.use_cpu = self.model_device == "cpu"  # without it bf16 is refused on a CPU
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # accelerate moves to the current GPU, which was made the first one

    @property
    def device(self) -> torch.device:
        """Where batches go, and the model, if it were elsewhere."""
        found: torch.device = super().device
        return found if self.parallel_mode == ParallelMode.DISTRIBUTED else resolve_device(self.model_device)

    @property
    def n_gpu(self) -> int:
        """GPUs that this process trains on."""
        return min(super().n_gpu, 1)
