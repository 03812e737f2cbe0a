"""Many processes, one student: who is in the job, what they agree on, and how all of them end when one does.

A process learns its place from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) or from srun's. Alone, every
function here does nothing. Gradients and numbers travel by gloo on CPU, by NCCL on CUDA.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from manifests import UserError
from manifests.command import INTERRUPTED, USER_ERROR
from manifests.devices import choose_device

BEAT = 1.0  # seconds between signs of life
SILENCE = 10.0  # seconds without one, after which a rank is taken for dead
ROLL_CALL = 3.0  # seconds in which the living answer after a connection broke
TIMEOUT = timedelta(hours=2)  # of a collective; dead ranks are found long before
GO_ON = "the others have stopped too; the same command goes on from the last checkpoint"
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job."""

    rank: int
    world: int
    local_rank: int  # on its machine


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
            dist.destroy_process_group()
        watch.leave()
    except (Exception, KeyboardInterrupt) as error:
        # An interrupt may come from the user, to all, or from torchrun, to those who are left.
        broken, interrupted = is_broken_connection(error), isinstance(error, KeyboardInterrupt)
        missing = watch.roll_call() if broken or interrupted else []
        if watch.speaks_first(str(error)):
            if missing or broken:
                why = " ".join(str(error).split())[:300]  # NCCL says what is wrong, such as two ranks on one GPU, at the end
                raise UserError(
                    _obituary(missing) if missing else f"a call between the ranks failed, and none is missing ({why}); {GO_ON}"
                ) from error
            raise
        sys.exit(INTERRUPTED if interrupted and not missing else USER_ERROR)
    finally:
        _watch = None


def find_place(environ: MutableMapping[str, str]) -> Place | None:
    """The place that torchrun or srun gave this process; None when it is alone. srun's variables are translated to torchrun's.

    Raises UserError for an environment that is incomplete.
    """
    if "RANK" not in environ and "SLURM_STEP_NUM_TASKS" in environ:  # the latter is set by srun alone, not by sbatch
        environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], environ["SLURM_STEP_NUM_TASKS"]
        environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
        environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
        environ.setdefault("MASTER_PORT", str(20_000 + int(environ["SLURM_JOB_ID"]) % 20_000))
    if int(environ.get("WORLD_SIZE", 1)) == 1:
        return None
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]:
        raise UserError(f"WORLD_SIZE is set and {missing[0]} is not; start with torchrun or srun, or unset WORLD_SIZE")
    return Place(int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ["LOCAL_RANK"]))


def first_host(nodes: str) -> str:
    """The first host of Slurm's list: ``"gpu[007-012,20],cpu1"`` -> ``"gpu007"``."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def start(name: str) -> torch.device:
    """Connect the ranks, one process per device, and return the device of this one: of the kind that the recipe names.

    Raises UserError when there is none for this process.
    """
    if _watch is None:
        return choose_device(name)
    if name.startswith(("auto", "cuda")) and torch.cuda.is_available():  # its own before it touches any: a context on GPU 0 takes memory
        name = f"cuda:{own_gpu(_watch.place.local_rank, torch.cuda.device_count())}"
        torch.cuda.set_device(name)
    device = choose_device(name)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_watch.group_store, rank=rank(), world_size=world(), timeout=TIMEOUT)
    return device


def own_gpu(local_rank: int, gpus: int) -> int:
    """Which of the GPUs that this process can see is its own; where the launcher shows each process but one, that one."""
    if gpus > 1 and local_rank >= gpus:
        raise UserError(f"device: process {local_rank + 1} of this machine has no GPU of its own, there are {gpus}; start fewer processes")
    return local_rank if gpus > 1 else 0


def replicate(student: nn.Module, device: torch.device) -> nn.Module:
    """What to call instead of the student so that backward averages gradients over the ranks. Its weights become those of rank 0.

    Buffers stay each rank's own: `share_buffers` before they are used.
    """
    if _watch is None:
        return student
    devices = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.15 on
        replica = DistributedDataParallel(student, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
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
    return bool(sum_over_ranks(torch.tensor(flag and is_first(), dtype=torch.int64)))


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


class Watch:
    """Signs of life of all ranks, and word of the first error, in a store that a thread of each looks at every second."""

    def __init__(self, place: Place) -> None:
        self.place = place
        try:
            store, _, _ = next(rendezvous("env://"))
        except (dist.DistError, RuntimeError) as error:
            raise UserError(f"rank {place.rank}: not all {place.world} ranks have come ({' '.join(str(error).split())[:120]})") from error
        # A connection of its own: a call of the group that waits would hold up the other one.
        own = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
        # torchrun's store outlives a restart, with all that the ranks before have left there.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.group_store, self._store = PrefixStore(f"group/{attempt}", store), PrefixStore(f"watch/{attempt}", own)
        self._lock = threading.Lock()
        self._over = threading.Event()  # this rank is leaving
        self._heard = False  # that another rank has reported an error
        self._store.set(f"beat/{place.rank}", "0")  # of a rank that dies before the thread's first one, silence is noticed too
        threading.Thread(target=self._keep_watch, daemon=True).start()

    def leave(self) -> None:
        """Leave in good order. Rank 0, which may hold the store, goes last."""
        self._over.set()
        with self._lock:
            self._store.set(f"left/{self.place.rank}", "")
            if self.place.rank == 0:
                self._store.wait([f"left/{other}" for other in range(self.place.world)], timedelta(seconds=60))

    def speaks_first(self, message: str) -> bool:
        """Whether this rank is the first to meet an error, and so the one to report it; the others end without a word."""
        self._over.set()
        hanging = threading.Timer(SILENCE, os._exit, [USER_ERROR])  # a process group may not let the interpreter end
        hanging.daemon = True
        hanging.start()
        if self._heard:
            return False
        try:
            with self._lock:
                first: bool = self._store.add("errors", 1) == 1
                if first:
                    self._store.set("ended", message)
        except RuntimeError:  # rank 0 held the store, and is gone
            return self.place.rank == 1
        if self.place.rank == 0:
            time.sleep(2 * BEAT)  # the store goes with this process; let the others hear first
        return first

    def roll_call(self) -> list[int]:
        """Ranks that do not answer any more, after a connection broke or an interrupt came."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once; there are seconds left to say why
        missing = list(range(self.place.world))
        started = time.monotonic()
        try:
            with self._lock:
                self._store.set(f"here/{self.place.rank}", "")
            while missing and time.monotonic() - started < ROLL_CALL:
                time.sleep(0.1)
                with self._lock:
                    missing = [other for other in missing if not self._store.check([f"here/{other}"])]
        except RuntimeError:
            return [0]
        return missing

    def _keep_watch(self) -> None:
        """The thread: show life, listen for an error; on rank 0 also look for ranks that fell silent."""
        beats: dict[int, tuple[bytes, float]] = {}
        count = 0
        while not self._over.wait(BEAT):
            count += 1
            try:
                with self._lock:
                    self._store.set(f"beat/{self.place.rank}", str(count))
                    self._heard = self._store.check(["ended"])
                    silent = self._silent(beats) if self.place.rank == 0 else []
            except RuntimeError:  # the store is gone, and rank 0 with it; the main thread may have met that already
                if not self._over.wait(ROLL_CALL):
                    _end(_obituary([0]) if self.place.rank == 1 else None)
                return
            if self._heard:
                if not self._over.wait(BEAT / 2):  # the main thread hangs in a collective
                    _end(None)
                return
            if silent:
                message = _obituary(silent)
                _end(message if self.speaks_first(message) else None)

    def _silent(self, beats: dict[int, tuple[bytes, float]]) -> list[int]:
        """Ranks that have shown no life for long. ``beats``: the last sign of each, and when it was new."""
        now = time.monotonic()
        for other in range(self.place.world):
            key = f"beat/{other}"
            value = self._store.get(key) if self._store.check([key]) else b""
            if other not in beats or beats[other][0] != value or self._store.check([f"left/{other}"]):
                beats[other] = (value, now)
        return [other for other, (value, since) in beats.items() if value and now - since > SILENCE]


def _obituary(missing: list[int]) -> str:
    who = f"rank {missing[0]} has" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} have"
    return f"{who} ended without a word (killed, out of memory, or the machine is gone); {GO_ON}"


def _end(message: str | None) -> NoReturn:
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(USER_ERROR)
