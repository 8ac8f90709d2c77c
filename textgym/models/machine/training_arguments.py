"""OneDeviceArguments: `transformers.TrainingArguments` for training on the device of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from textgym.models.machine.devices import resolve_device


@dataclass
class OneDeviceArguments(TrainingArguments):
    """Training arguments that use only the device of the model.

    `TrainingArguments` uses every GPU that a single process sees: it moves the model to the first one, wraps it in
    `DataParallel` and multiplies the batch size by the number of GPUs. In a run of several processes the launcher's
    device of each process stays. The device becomes the current one, so train within `on_device`, which restores it.
    """

    model_device: str = "cpu"
    """The device of the model."""

    def __post_init__(self) -> None:
        self.use_cpu = self.model_device == "cpu"  # otherwise `TrainingArguments` rejects bf16 on a CPU
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.device.type == "cuda":
            # `TrainingArguments` made the first GPU the current one, and accelerate moves the model to the current one.
            torch.cuda.set_device(self.device)

    @property
    def device(self) -> torch.device:
        """The device of batches and of the model."""
        found: torch.device = super().device
        return found if self.parallel_mode == ParallelMode.DISTRIBUTED else resolve_device(self.model_device)

    @property
    def n_gpu(self) -> int:
        """Number of GPUs that this process trains on."""
        return min(super().n_gpu, 1)
