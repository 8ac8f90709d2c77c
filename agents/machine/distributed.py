"""Data-parallel training: each process collects its own episodes, and all take the same optimiser steps.

    accelerate launch --multi_gpu --num_processes 8 -m textgym train --output-dir runs/ppo

Sums and means are over the rollouts of all processes, and a minibatch is sampled from the episodes
of all. So n processes train as one process with all episodes, up to rounding, also if n does not divide their number.
Gradients are summed over processes once per optimiser step.
Under FSDP2 (fully sharded data parallel; Zhao et al., 2023) each process holds a shard of the trained weights, of their
gradients and of the optimiser state.

In a single process the functions of this module return their arguments unchanged.
"""

from __future__ import annotations

import copy
import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from textgym.errors import TextgymError
from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import is_twin
from textgym.models.machine.transfer import to_host

T = TypeVar("T")
BUCKET = 2**25
"""Number of gradient elements in one all-reduce: 128 MB in float32."""
LOST_PROCESS_MESSAGES = ("gloo", "nccl", "connection", "timed out")
"""Words in the messages of failed collective operations. torch raises no common exception class for them."""


class ProcessLostError(TextgymError, ConnectionError):
    """Another process of the run has ended or does not respond."""


def join() -> None:
    """Initialise the process group if a launcher started several processes."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        warnings.warn(
            f"the launcher asks for mixed_precision={precision}, which agents that collect episodes do not read: set "
            "bf16=True in the agent's config (--bf16), and mixed_precision: no for the launcher",
            stacklevel=2,
        )
    if distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    PartialState(cpu=not torch.accelerator.is_available())


def count() -> int:
    """Return the number of processes of the run (the world size)."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; the first one has rank 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def device() -> torch.device | None:
    """Return the device that the launcher assigned to this process; `None` in a single process: the user chooses."""
    return PartialState().device if count() > 1 else None


def sharded_by_fsdp() -> bool:
    """Return whether the launcher asks for FSDP, which takes several processes."""
    return count() > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def shares_of(number: int) -> list[int]:
    """Return how many of `number` items each process does, by rank; they differ by at most one."""
    ends = [number * process // count() for process in range(count() + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def process_seed(seed: int) -> int:
    """Return a different seed for each process; rank 0 has the seed of the run."""
    return seed + 1_000_003 * rank()  # a prime far larger than the seeds that users try one after another


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the elementwise sum over all processes; the shapes must be equal."""
    if count() == 1:
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values


def everyone(value: T) -> list[T]:
    """Return the values of all processes, ordered by rank."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def by_first(write: Callable[[], None]) -> None:
    """Let the first process write files: none begins before all have arrived or continues before the files exist.

    All processes must call it. Without the barrier before it, the first one could replace what another still reads.

    Raises:
        Exception: The error of the first process; in the others an `OSError` that quotes it, so that none waits.
    """
    everyone(None)
    error: Exception | None = None
    if rank() == 0:
        try:
            write()
        except Exception as caught:
            error = caught
    reason = everyone(None if error is None else f"{type(error).__name__}: {error}")[0]
    if error is not None:
        raise error
    if reason is not None:
        raise OSError(f"process 0, which writes for all, could not: {reason}")


def gather_columns(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate columns `(N,)` of all processes on the CPU; NaN for the rows of a process without that column."""
    columns = dict(zip(columns, to_host(*columns.values()), strict=True))
    if count() == 1:
        return columns
    parts = everyone(columns)
    missing = [torch.full_like(next(iter(part.values())), torch.nan, dtype=torch.float64) for part in parts]
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: torch.cat([part.get(name, nothing) for part, nothing in zip(parts, missing, strict=True)])
        for name in names
    }


def concatenated(values: Tensor) -> Tensor:
    """Concatenate `(N, ...)` of all processes by rank; N may differ."""
    if count() == 1:
        return values
    return torch.cat(everyone(values.cpu())).to(values.device)


def column_total(values: Tensor) -> Tensor:
    """Return the sum of `(..., T)` over all processes; T may differ, and the result has the T of this process."""
    width = values.shape[-1]
    widest = max(everyone(width))
    return sum_over_processes(nn.functional.pad(values, (0, widest - width)))[..., :width]


def pad_micro_batches(parts: Sequence[T], spare: T) -> list[tuple[T, bool]]:
    """Pad a list of micro-batches to the length of the longest list of any process.

    Forward and backward passes with sharded weights are collective operations, so every process must make the same
    number of them. A process with fewer micro-batches runs `spare` instead, and its loss does not count.

    Returns:
        Micro-batches, and whether each counts.
    """
    missing = max(everyone(len(parts))) - len(parts)
    return [*((part, True) for part in parts), *[(spare, False)] * missing]


def broadcast_weights(module: nn.Module) -> None:
    """Broadcast the weights of rank 0 to all processes, in place."""
    if count() > 1:
        with torch.no_grad():
            for weight in module.parameters():
                distributed.broadcast(weight, 0)


def sum_gradients(weights: Iterable[Tensor]) -> None:
    """Replace gradients by their sums over all processes; FSDP has already summed the gradients of sharded weights."""
    if count() == 1:
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None and not isinstance(weight, DTensor)]
    for bucket in _buckets(gradients):
        summed = sum_over_processes(torch.cat([gradient.flatten() for gradient in bucket]))
        for gradient, part in zip(bucket, summed.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def gather_shards(values: Any) -> Any:
    """Gather a tensor that may be sharded, or all tensors in nested dicts and lists."""
    if isinstance(values, dict):
        return {key: gather_shards(value) for key, value in values.items()}
    if isinstance(values, list):
        return [gather_shards(value) for value in values]
    return values.full_tensor() if isinstance(values, DTensor) else values


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state that `gather_shards(optimizer.state_dict())` returned; each process keeps its shards."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def shard(weight: Tensor, value: Any) -> Any:
        if not isinstance(weight, DTensor) or value.shape != weight.shape:  # not sharded, such as Adam's step count
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)

    moments = {i: {name: shard(weights[i], x) for name, x in saved.items()} for i, saved in state["state"].items()}
    optimizer.load_state_dict({**state, "state": moments})


class Learner(nn.Module):
    """The module that the optimiser trains: the policy itself or, under FSDP2, a sharded copy of it.

    The sharded copy evaluates and trains on whole sequences. The unsharded policy generates responses, because sharded
    weights would have to be gathered for every token. `refresh` copies the trained weights to it after each update.

    Args:
        policy: The unsharded policy, the same on every process.

    Raises:
        ValueError: If the launcher is configured for DeepSpeed or for the first version of FSDP.
    """

    def __init__(self, policy: ActorCritic) -> None:
        super().__init__()
        self.sharded = sharded_by_fsdp()
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError("DeepSpeed works only with SFT and DPO: use FSDP2, examples/accelerate/fsdp2.yaml")
        if self.sharded and os.environ.get("FSDP_VERSION") != "2":
            raise ValueError("only FSDP2 is supported: set fsdp_version: 2, as examples/accelerate/fsdp2.yaml does")
        self.__dict__["unsharded"] = policy  # not as an attribute: torch would register it, and FSDP would shard it
        self.policy = _copied(policy) if self.sharded else policy
        if self.sharded:
            _shard(self)

    def forward(self, work: Callable[[ActorCritic], T]) -> T:
        """Return `work(policy)` for the policy that is trained; all processes must call it at the same time.

        FSDP's hooks gather and free the weights around `forward`, so passes through the trained policy go through here.
        """
        return work(self.policy)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the trained weights to the unsharded policy."""
        if self.sharded:
            unsharded: ActorCritic = self.__dict__["unsharded"]
            targets, shards = ([x for x in p.parameters() if x.requires_grad] for p in (unsharded, self.policy))
            for weight, shard in zip(targets, shards, strict=True):
                weight.copy_(gather_shards(shard.detach()))
            unsharded.reset_cache()

    @torch.no_grad()
    def take_value_head(self) -> None:
        """Copy the value head of the unsharded policy, whose scale has changed, to the sharded copy."""
        if self.sharded:
            head, copied = self.__dict__["unsharded"].value_head, self.policy.value_head
            shards: Any = copied.parameters()
            for weight, shard in zip(head.parameters(), shards, strict=True):
                shard.copy_(distribute_tensor(weight.detach(), shard.device_mesh, shard.placements))
            for moment, other in zip(head.buffers(), copied.buffers(), strict=True):
                other.copy_(moment)


def _copied(policy: ActorCritic) -> ActorCritic:
    """Return a copy of the policy that shares no weights between actor and critic, which FSDP would shard twice."""
    generator, policy.generator = policy.generator, None  # `deepcopy` cannot copy it, and the copy does not sample
    try:
        new = copy.deepcopy(policy)
    finally:
        policy.generator = generator
    if new.critic is not None and is_twin(new.critic, new.lm):
        new.critic = copy.deepcopy(new.critic)
    return new


def _shard(learner: Learner) -> None:
    """Shard each layer by itself and the remaining weights together, by the `fsdp_*` settings of the launcher."""
    plugin: Any = FullyShardedDataParallelPlugin()
    offload = plugin.cpu_offload if isinstance(plugin.cpu_offload, OffloadPolicy) else OffloadPolicy()
    trunks = [trunk for trunk in (learner.policy.lm, learner.policy.critic) if trunk is not None]
    layers = {name for trunk in trunks for name in trunk._no_split_modules or ()}
    for module in [module for module in learner.modules() if type(module).__name__ in layers]:
        fully_shard(module, reshard_after_forward=bool(plugin.reshard_after_forward), offload_policy=offload)
    fully_shard(learner, offload_policy=offload)
    for module in learner.modules():
        if isinstance(module, FSDPModule):  # sum, not average: each process's loss is already divided by the total
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group gradients, because a few large all-reduces take less time than many small ones."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(other.numel() for other in bucket) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Explain errors of collective operations that fail because another process is gone.

    Raises:
        ProcessLostError: If another process has ended or does not respond.
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not any(words in str(error).lower() for words in LOST_PROCESS_MESSAGES):
            raise
        raise ProcessLostError(_lost_process()) from error


def raise_on_termination() -> None:
    """Raise `ProcessLostError` on SIGTERM, which launchers send to the other processes when one has ended."""
    if count() > 1:
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(*_: object) -> None:
    raise ProcessLostError(_lost_process())


def _lost_process() -> str:
    return (
        f"process {rank()} of {count()} has lost another one, which ended or does not respond: read the last output of "
        "that process, then launch all processes again; they resume from the last checkpoint"
    )
