"""Many processes, one student: joining the job, what its ranks share and agree on, and ending all of them when one does.

Alone, every function here does nothing. Gradients and numbers travel by gloo on CPU, by NCCL on CUDA.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from manifests import UserError, one_line
from manifests.command import INTERRUPTED, USER_ERROR
from manifests.devices import choose_device

from .place import find_place, own_gpu
from .watch import GO_ON, Watch, obituary

TIMEOUT = timedelta(hours=2)  # of a collective; dead ranks are found long before
T = TypeVar("T")

_watch: Watch | None = None  # of the job that this process is in


def rank() -> int:
    return 0 if _watch is None else _watch.place.rank


def world() -> int:
    return 1 if _watch is None else _watch.place.world


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Be part of the job while the block runs. An error of one rank ends all ranks, and only one of them reports it."""
    global _watch
    place = find_place(os.environ)
    if place is None:
        yield
        return
    _watch = watch = Watch(place)
    try:
        yield
        if dist.is_initialized():
            # Before torch 2.8 (pytorch#154976) this never ends while a thread of gloo still lets go of the last call's tensors.
            time.sleep(0.1)
            dist.destroy_process_group()
        watch.leave()
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once; there are seconds left to say why
        # An interrupt may come from the user, to all, or from torchrun, to those who are left.
        broken, interrupted = is_broken_connection(error), isinstance(error, KeyboardInterrupt)
        missing = watch.roll_call() if broken or interrupted else []
        if watch.speaks_first(str(error)):
            if missing or broken:
                why = one_line(error, 300)  # NCCL says what is wrong, such as two ranks on one GPU, at the end
                raise UserError(
                    obituary(missing)
                    if missing
                    else f"a call between the ranks failed, and none is missing ({why}); {GO_ON}"
                ) from error
            raise
        sys.exit(INTERRUPTED if interrupted and not missing else USER_ERROR)
    finally:
        _watch = None


def start(name: str) -> torch.device:
    """Connect the ranks, one process per device, and return the device of this one: of the kind that the recipe names.

    Raises UserError when there is none for this process.
    """
    if _watch is None:
        return choose_device(name)
    if (
        name.startswith(("auto", "cuda")) and torch.cuda.is_available()
    ):  # its own before it touches any: a context on GPU 0 takes memory
        name = f"cuda:{own_gpu(_watch.place.local_rank, torch.cuda.device_count())}"
        torch.cuda.set_device(name)
    device = choose_device(name)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_watch.group_store, rank=rank(), world_size=world(), timeout=TIMEOUT)
    return device


def replicate(student: nn.Module, device: torch.device) -> nn.Module:
    """What to call instead of the student so that backward averages gradients over the ranks. Its weights become those of rank 0.

    Buffers stay each rank's own: `share_buffers` before they are used.
    """
    if _watch is None:
        return student
    devices = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.15 on
        replica = DistributedDataParallel(
            student, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    # Strides of a dimension of 1, in 1 x 1 and depthwise convolutions, name the same places in memory (pytorch#157862).
    warnings.filterwarnings(
        "ignore", message=r"(?s)Grad strides do not match .*grad\.sizes\(\) = \[\d+, (1,|\d+, 1, 1\])"
    )
    if device.type == "cpu":
        replica.register_comm_hook(None, average_in_rank_order)
    return replica


def average_in_rank_order(_state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    """DDP's averaging, to the bit whatever the bucket: a communication hook.

    Gloo's ring adds in an order that depends on where in its bucket a gradient lies, and DDP arranges its buckets anew after the first
    step of every start: a resumed run would differ in the last bit from an uninterrupted one.
    """
    parts = [torch.empty_like(bucket.buffer()) for _ in range(world())]
    work = dist.all_gather(parts, bucket.buffer(), async_op=True)

    def average(_done: object) -> torch.Tensor:
        for part in parts[1:]:
            parts[0] += part
        return parts[0].div_(len(parts))

    return work.get_future().then(average)


def share_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0 (running statistics of batch norm)."""
    if _watch is not None:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def unshared(forward: Any) -> AbstractContextManager[None]:
    """Gradients of a backward inside stay on this rank: for all parts of an accumulated batch but the last."""
    return nullcontext() if _watch is None else forward.no_sync()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, of integers exactly."""
    if _watch is not None:
        values = values.clone()
        dist.all_reduce(values)
    return values


def agree(flag: bool) -> bool:
    """What rank 0 says: clocks differ."""
    return any_rank(flag and is_first())


def any_rank(flag: bool) -> bool:
    """Whether any of them says so."""
    return bool(sum_over_ranks(torch.tensor(flag, dtype=torch.int64)))


def gather(value: T) -> list[T]:
    """The values of all ranks, in order."""
    if _watch is None:
        return [value]
    values: list[T] = [value] * world()
    dist.all_gather_object(values, value)
    return values


def is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone; gloo has no class of its own for that."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
