"""The processes of one run: each plays episodes of its own, and all take the same step of the optimiser.

    accelerate launch --multi_gpu --num_processes 8 -m textgym.cli train --output-dir runs/ppo

What one process sums over its rollout, several sum over the rollouts of all of them, so that n processes with an n-th
of the episodes each learn what one would from all. Gradients are added up once for each step of the optimiser; under
FSDP2 (Zhao et al., 2023) a process holds a share of the weights, gradients and moments of what is trained.

Where nobody launched several processes, every function here hands back what it is given.
"""

from __future__ import annotations

import copy
import os
import signal
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
"""Gradients that are added up at once: 128 MB in float32."""
SIGNS_OF_LOSS = ("gloo", "nccl", "connection", "timed out")
"""What errors of a collective say, which have no class in common."""


class ProcessLostError(TextgymError, ConnectionError):
    """Another process of the run has ended, or does not answer."""


def join() -> None:
    """Meets the processes that a launcher has started beside this one, if any."""
    if distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    PartialState(cpu=not torch.accelerator.is_available())


def count() -> int:
    """Processes of the run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def device() -> torch.device | None:
    """Where this process computes, if it is one of several; `None` leaves it to the user."""
    return PartialState().device if count() > 1 else None


def share_of(number: int, name: str) -> int:
    """This process's share of a number that is meant for all of them.

    Raises:
        ValueError: it cannot be divided evenly.
    """
    if number % count():
        raise ValueError(f"{name}={number} must be a multiple of the {count()} processes, which share it")
    return number // count()


def own_seed(seed: int) -> int:
    """A seed for each process; that of the first is the run's."""
    return seed + 1_000_003 * rank()


def total(values: Tensor) -> Tensor:
    """The sum over all processes, elementwise; shapes must agree."""
    if count() == 1:
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values


def everyone(value: T) -> list[T]:
    """What each process has, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def gathered(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Columns `(N,)` of each process as columns of all of them, on the host; NaN where one has none of that name."""
    columns = dict(zip(columns, to_host(*columns.values()), strict=True))
    if count() == 1:
        return columns
    unknown = torch.full_like(next(iter(columns.values())), torch.nan, dtype=torch.float64)
    parts = everyone(columns)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part.get(name, unknown) for part in parts]) for name in names}


def column_total(values: Tensor) -> Tensor:
    """The sum over all processes of `(..., T)`, where T may differ; as wide as this process's own."""
    width = values.shape[-1]
    widest = max(everyone(width))
    return total(nn.functional.pad(values, (0, widest - width)))[..., :width]


def evenly(parts: Sequence[T], spare: T) -> list[tuple[T, bool]]:
    """Parts of a batch and whether they count, as many as the process with the most of them has.

    A process that runs out goes through `spare` instead, since whoever computes with sharded weights needs the others.
    """
    missing = max(everyone(len(parts))) - len(parts)
    return [*((part, True) for part in parts), *[(spare, False)] * missing]


def same_weights(module: nn.Module) -> None:
    """Gives all processes the first one's weights, in place."""
    if count() > 1:
        with torch.no_grad():
            for weight in module.parameters():
                distributed.broadcast(weight, 0)


def add_up_gradients(weights: Iterable[Tensor]) -> None:
    """Replaces gradients by their sums over all processes; FSDP has done so already with those that it shards."""
    if count() == 1:
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None and not isinstance(weight, DTensor)]
    for bucket in _buckets(gradients):
        summed = total(torch.cat([gradient.flatten() for gradient in bucket]))
        for gradient, part in zip(bucket, summed.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def full(values: Any) -> Any:
    """The whole of a tensor that may be sharded; of a nest of dicts and lists, the whole of all of them."""
    if isinstance(values, dict):
        return {key: full(value) for key, value in values.items()}
    if isinstance(values, list):
        return [full(value) for value in values]
    return values.full_tensor() if isinstance(values, DTensor) else values


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads `full(optimizer.state_dict())`, of which each process keeps its share."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def own(weight: Tensor, value: Any) -> Any:
        if not isinstance(weight, DTensor) or value.shape != weight.shape:
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)

    moments = {i: {name: own(weights[i], x) for name, x in kept.items()} for i, kept in state["state"].items()}
    optimizer.load_state_dict({**state, "state": moments})


class Learner(nn.Module):
    """What the optimiser trains: the policy itself or, under FSDP2, a sharded copy, which the policy follows.

    Whole sequences are scored by the copy. The policy itself writes, and is brought up to date once after an update, so
    that no token costs a gather.

    Args:
        policy: the whole of it, on every process.

    Raises:
        ValueError: the launcher was told to use DeepSpeed or the first FSDP.
    """

    def __init__(self, policy: ActorCritic) -> None:
        super().__init__()
        self.sharded = count() > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError("DeepSpeed trains SFT and DPO alone: use FSDP2, examples/accelerate/fsdp2.yaml")
        if self.sharded and os.environ.get("FSDP_VERSION") != "2":
            raise ValueError("only FSDP2 is supported: set fsdp_version: 2, as examples/accelerate/fsdp2.yaml does")
        self.__dict__["whole"] = policy
        self.policy = _copied(policy) if self.sharded else policy
        if self.sharded:
            _shard(self)

    def forward(self, work: Callable[[ActorCritic], T]) -> T:
        """What `work` makes of the policy that is trained; all processes must come along."""
        return work(self.policy)

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the policy up to date with what was trained."""
        if self.sharded:
            whole: ActorCritic = self.__dict__["whole"]
            mine, sharded = ([x for x in p.parameters() if x.requires_grad] for p in (whole, self.policy))
            for weight, trained in zip(mine, sharded, strict=True):
                weight.copy_(full(trained.detach()))
            whole.reset_cache()


def _copied(policy: ActorCritic) -> ActorCritic:
    generator, policy.generator = policy.generator, None  # which nobody can copy, and only whoever samples needs
    try:
        new = copy.deepcopy(policy)
    finally:
        policy.generator = generator
    if new.critic is not None and is_twin(new.critic, new.lm):
        new.critic = copy.deepcopy(new.critic)  # FSDP shards no weight twice
    return new


def _shard(learner: Learner) -> None:
    """Shards each layer by itself and the rest together, as `fsdp_*` of the launcher's settings ask for."""
    plugin: Any = FullyShardedDataParallelPlugin()
    offload = plugin.cpu_offload if isinstance(plugin.cpu_offload, OffloadPolicy) else OffloadPolicy()
    trunks = [trunk for trunk in (learner.policy.lm, learner.policy.critic) if trunk is not None]
    layers = {name for trunk in trunks for name in trunk._no_split_modules or ()}
    for module in [module for module in learner.modules() if type(module).__name__ in layers]:
        fully_shard(module, reshard_after_forward=bool(plugin.reshard_after_forward), offload_policy=offload)
    fully_shard(learner, offload_policy=offload)
    for module in learner.modules():
        if isinstance(module, FSDPModule):  # losses are shares of one mean, so that gradients add up
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(other.numel() for other in bucket) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def explained() -> Iterator[None]:
    """Says what it means when processes cannot reach each other.

    Raises:
        ProcessLostError: another process has ended, or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not any(sign in str(error).lower() for sign in SIGNS_OF_LOSS):
            raise
        raise ProcessLostError(_farewell()) from error


def end_with_a_message() -> None:
    """Where a launcher ends this process, as it does when it has lost another one: the same error, and not silence."""
    if count() > 1:
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(*_: object) -> None:
    raise ProcessLostError(_farewell())


def _farewell() -> str:
    return (
        f"process {rank()} of {count()} has lost another one, which ended or does not answer: look for what that one "
        "said last, then launch all of them again, to go on from the last checkpoint"
    )
