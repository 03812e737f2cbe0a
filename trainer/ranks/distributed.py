"""Join a job of ranks, exchange gradients and decisions with them, and end all ranks when one ends.

In a single process every function here does nothing. The backend is gloo on CPU and NCCL on CUDA.
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

TIMEOUT = timedelta(hours=2)  # for a collective; `watch` notices dead ranks long before
T = TypeVar("T")

_watch: Watch | None = None  # None: this process is not part of a job


def rank() -> int:
    return 0 if _watch is None else _watch.place.rank


def world() -> int:
    return 1 if _watch is None else _watch.place.world


def is_first() -> bool:
    """Whether this is rank 0, which writes files and messages."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the job for the time of the block. An error of one rank ends all ranks, and only one of them reports it."""
    global _watch
    place = find_place(os.environ)
    if place is None:
        yield
        return
    _watch = watch = Watch(place)
    try:
        yield
        if dist.is_initialized():
            # before torch 2.8 (pytorch#154976), this hangs while gloo's thread still frees the last call's tensors
            time.sleep(0.1)
            dist.destroy_process_group()
        watch.leave()
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once; use the seconds left to report why
        # an interrupt comes from the user, to all ranks, or from torchrun, to the rest after one died
        broken, interrupted = is_broken_connection(error), isinstance(error, KeyboardInterrupt)
        missing = watch.roll_call() if broken or interrupted else []
        if watch.speaks_first(str(error)):
            if missing or broken:
                # long, because NCCL names the cause, such as two ranks on one GPU, at the end
                why = one_line(error, 300)
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
    """Connect the ranks, and return the device of this process. name: `Recipe.device`.

    Raises UserError when there is no device for this process.
    """
    if _watch is None:
        return choose_device(name)
    # choose the GPU before using any, because a context on GPU 0 would take memory there
    if name.startswith(("auto", "cuda")) and torch.cuda.is_available():
        name = f"cuda:{own_gpu(_watch.place.local_rank, torch.cuda.device_count())}"
        torch.cuda.set_device(name)
    device = choose_device(name)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_watch.group_store, rank=rank(), world_size=world(), timeout=TIMEOUT)
    return device


def replicate(student: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the student so that backward averages gradients over ranks. All ranks get rank 0's weights.

    Buffers are not exchanged: call `share_buffers` before using them.
    """
    if _watch is None:
        return student
    devices = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 renames broadcast_buffers
        replica = DistributedDataParallel(
            student, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    # harmless: in 1 x 1 and depthwise convolutions, both strides address the same memory (pytorch#157862)
    warnings.filterwarnings(
        "ignore", message=r"(?s)Grad strides do not match .*grad\.sizes\(\) = \[\d+, (1,|\d+, 1, 1\])"
    )
    if device.type == "cpu":
        replica.register_comm_hook(None, average_in_rank_order)
    return replica


def average_in_rank_order(_state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses string annotations
    """A communication hook for DDP that adds gradients in the order of ranks.

    Gloo's order depends on a gradient's place in its bucket, and DDP rebuilds the buckets after the first step of every
    start. With gloo's order, a resumed run would differ from an uninterrupted one in the last bit.
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
    if _watch is None:
        return
    floats = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if floats:
        flat = torch.cat([buffer.flatten() for buffer in floats])  # one broadcast: some methods share in every step
        dist.broadcast(flat, 0)
        for buffer, part in zip(floats, flat.split([buffer.numel() for buffer in floats]), strict=True):
            buffer.copy_(part.view_as(buffer))
    for buffer in module.buffers():
        if not buffer.is_floating_point():
            dist.broadcast(buffer, 0)


def unshared(forward: Any) -> AbstractContextManager[None]:
    """Keep the gradients of a backward inside on this rank. Used for all but the last part of an accumulated batch."""
    return nullcontext() if _watch is None else forward.no_sync()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks; exact for integers."""
    if _watch is not None:
        values = values.clone()
        dist.all_reduce(values)
    return values


def agree(flag: bool) -> bool:
    """Rank 0's flag, on all ranks. For decisions by the clock, which differs between machines."""
    return any_rank(flag and is_first())


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(sum_over_ranks(torch.tensor(flag, dtype=torch.int64)))


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks."""
    if _watch is None:
        return [value]
    values: list[T] = [value] * world()
    dist.all_gather_object(values, value)
    return values


def is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone. Gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
