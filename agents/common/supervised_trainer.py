"""SupervisedTrainer: `transformers.Trainer` for SFT and DPO, without output and files, with metrics of every update."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from textgym.models.actor_critic import ActorCritic
from textgym.models.machine.changes import ChangedWeights
from textgym.models.machine.finite import FiniteGradients
from textgym.models.machine.schedules import Decay, warmup_and_decay
from textgym.models.machine.shared_batches import SharedBatches, SharedLoader, Shuffled
from textgym.models.machine.training_arguments import OneDeviceArguments
from textgym.models.sequences import Sequences
from textgym.rewards.models.pairwise import SILENT

from ..callbacks import Callback
from ..machine.distributed import count, everyone, join, rank, sharded_by_fsdp
from .optimizer import adamw, warn_of_lost_updates


class Trained(Protocol):
    """Attributes and methods of an agent that the trainer needs; `SupervisedAgent` has them."""

    policy: ActorCritic
    config: Any
    updates: int

    def __len__(self) -> int: ...

    def collate(self, items: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch of items."""

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the weight of a batch in the mean of several."""

    def loss(self, log_probs: Tensor, entropies: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and metrics."""


class SupervisedTrainer(Trainer):
    """Trains the language model of an agent's policy on the agent's loss.

    Args:
        agent: The agent, with items, batches and the loss.
        folder: Folder with the progress to resume from, if there is any; the trainer writes nothing into it.
        callback: Called after every update.
    """

    def __init__(self, agent: Trained, folder: str, callback: Callback) -> None:
        join()
        if sharded_by_fsdp():
            raise ValueError(
                "SFT and DPO do not shard weights by FSDP: use examples/accelerate/ddp.yaml, or deepspeed.yaml, which "
                "shards gradients and the optimiser's state"
            )
        config = agent.config
        order = Shuffled(len(agent), config.seed)
        self.batches = SharedBatches(order, config.batch_size, config.micro_batch_size, count(), rank())
        arguments = OneDeviceArguments(
            output_dir=folder,
            num_train_epochs=config.epochs,
            max_steps=-1 if config.max_steps is None else config.max_steps,
            per_device_train_batch_size=config.micro_batch_size or config.batch_size,
            gradient_accumulation_steps=self.batches.parts_per_batch,
            learning_rate=config.learning_rate,
            weight_decay=0.0,
            max_grad_norm=config.max_grad_norm,
            bf16=config.bf16,
            model_device=str(agent.policy.device),
            seed=config.seed,
            logging_steps=1,
            **SILENT,
        )
        gradients = FiniteGradients(config.on_nonfinite)
        super().__init__(
            model=_Scored(agent.policy),
            args=arguments,
            train_dataset=range(len(agent)),  # indices of the agent's items
            callbacks=[_Report(self, callback), gradients, ChangedWeights()],
        )
        self.finite_steps = gradients.steps
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by the weight of the whole batch itself
        self.agent = agent
        self.metrics: dict[str, float] = {}

    def get_train_dataloader(self) -> SharedLoader:
        """Return the micro-batches of this process, each item of the data once an epoch over all processes."""
        return SharedLoader(self.batches, self.agent.collate)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make transformers' optimiser, or ours with `adam_8bit`: transformers' keeps 32-bit moments of embeddings."""
        if not self.agent.config.adam_8bit:
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
            warn_of_lost_updates(optimizer)
            return optimizer
        trained: nn.Module = self.model if model is None else model  # type: ignore[assignment]
        arguments = self.args
        self.optimizer = adamw(trained.parameters(), arguments.learning_rate, arguments.adam_epsilon, eight_bit=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make a schedule of linear warm-up and linear decay."""
        config = self.agent.config
        chosen: Any = self.optimizer if optimizer is None else optimizer
        decay: Decay = "linear" if config.anneal_learning_rate else "none"
        self.lr_scheduler = warmup_and_decay(chosen, num_training_steps, config.warmup, decay)
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of an update, and their total weight over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = torch.stack([self._weight(batch) for batch in batches]).sum().to(device)
        return batches, self.accelerator.gather(total).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the share of a micro-batch in the mean loss of the update, so that gradients add up."""
        log_probs, entropies = model(inputs["input_ids"], inputs["prompt_lengths"], inputs["response_lengths"])
        loss, metrics = self.agent.loss(log_probs, entropies, inputs)
        assert num_items_in_batch is not None  # from `get_batch_samples`
        share = self._weight(inputs) / num_items_in_batch
        for name, value in {"loss": loss.detach(), **metrics}.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + float(share * value)
        return share * loss * self.accelerator.num_processes  # because gradients are averaged over processes

    def _weight(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the weight of a micro-batch, 0 for one that stands in for an empty one."""
        return self.agent.weight(batch) * batch["counts"]

    def write_progress(self, folder: Path) -> None:
        """Write the trainer's part of a checkpoint: progress, optimiser and schedule."""
        self.state.save_to_json(str(folder / "trainer_state.json"))
        self._save_optimizer_and_scheduler(str(folder))

    def _load_from_checkpoint(self, *arguments: Any, **kwargs: Any) -> None:
        """Load nothing: the policy already has the weights."""


class _Scored(nn.Module):
    """The language model of a policy as a module for `Trainer`: it takes sequences and returns log-probs."""

    def __init__(self, policy: ActorCritic) -> None:
        super().__init__()
        self.lm = policy.lm
        self.__dict__["policy"] = policy  # not a submodule, because the critic is not trained

    def forward(self, input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies `(N, T)`."""
        policy: ActorCritic = self.__dict__["policy"]
        start = policy.decoder_start_ids
        return policy.score_sequences(Sequences(input_ids, prompt_lengths, response_lengths, decoder_start=start))


class _Report(TrainerCallback):
    """Calls the agent's callback after every update, and stops the training if it returns `False`."""

    def __init__(self, trainer: SupervisedTrainer, callback: Callback) -> None:
        self.trainer, self.callback = trainer, callback
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report an update; transformers also calls this at the end with a summary, which is ignored."""
        state.log_history.clear()  # callbacks store metrics if they need them
        if "loss" not in logs:
            return
        trainer, now = self.trainer, time.perf_counter()
        shares = everyone(trainer.metrics)
        metrics = {
            **{name: sum(share[name] for share in shares) for name in trainer.metrics},
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": float(logs["learning_rate"]),
            "epoch": trainer.batches.epochs(state.global_step),
            "updates": state.global_step,
            "time/update_s": now - self.started,
        }
        if trainer.agent.config.on_nonfinite == "skip":  # the figures of a skipped step are NaN
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
            metrics["val/skipped_steps"] = trainer.finite_steps.skipped
        trainer.metrics, self.started = {}, now
        trainer.agent.updates = state.global_step
        stop = self.callback.on_update_end(trainer.agent, metrics) is False
        if any(everyone(stop)):
            control.should_training_stop = True
