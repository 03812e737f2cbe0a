"""Workers as processes of this machine: one per GPU, or ``launch.workers`` on the CPU."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import click
import torch

from manifests import Unwritable, UserError
from manifests.devices import usable_cores

from ..job.worker import Work, work_through
from ..recipe import Recipe
from . import Watch

HOPELESS = 2  # exit status of a worker: no worker can go on
LEFT = 3  # exit status of a worker: this one cannot go on
LEAVE = 10.0  # seconds that a worker has to finish or abandon its batch


def devices(recipe: Recipe) -> list[str]:
    """The name of each worker's device."""
    names = [recipe.device]
    if recipe.device in ("auto", "cuda") and torch.cuda.is_available():
        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [names[index % len(names)] for index in range(recipe.launch.workers or len(names))]


@dataclass
class _Slot:
    """The place of one worker, and the process that holds it now."""

    process: SpawnProcess
    complaint: Connection  # gives the worker's error, if it ends with a UserError
    done_before: int  # number of shards that were done when the process started
    strikes: int = 0  # number of processes in a row that died in this slot without any progress


def launch(work: Work, watch: Watch) -> None:
    """Run the workers until all have ended. A worker that dies is replaced, unless it keeps dying without progress.

    A worker that ends with a UserError (about its device, for example) leaves the work to the others. Raises that error
    when no worker finished the work, and at once when OUT cannot be written.
    """
    names = devices(work.recipe)
    threads = work.recipe.threads or max(usable_cores() // len(names), 1)
    codec_threads = work.recipe.codec_threads or min(max(usable_cores() // 2 // len(names), 1), 16)
    recipes = [replace(work.recipe, device=name, threads=threads, codec_threads=codec_threads) for name in names]
    works = [replace(work, recipe=recipe) for recipe in recipes]
    slots = {index: _start(works[index], index, len(names), 0) for index in range(len(names))}
    finished, complaint = False, None
    try:
        while slots:
            wait([slot.process.sentinel for slot in slots.values()], timeout=1.0)
            done = watch()
            for index, slot in list(slots.items()):
                if slot.process.is_alive():
                    continue
                slot.process.join()
                status = slot.process.exitcode
                if status in (HOPELESS, LEFT) and slot.complaint.poll():
                    complaint = str(slot.complaint.recv())
                    if status == HOPELESS:
                        raise Unwritable(complaint)
                    click.echo(f"a worker has left: {complaint}", err=True)
                strikes = slot.strikes + 1 if done == slot.done_before else 0
                finished |= status == 0
                if status in (0, LEFT) or strikes > work.recipe.launch.retries:
                    del slots[index]
                else:
                    slots[index] = replace(_start(works[index], index, len(names), done), strikes=strikes)
    finally:
        _end([slot.process for slot in slots.values()])
    if complaint is not None and not finished:
        raise UserError(complaint)


def _start(work: Work, index: int, count: int, done: int) -> _Slot:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(work, index, count, sending), daemon=True)
    resource_tracker.ensure_running()  # before the block below: starting it unblocks signals
    # a terminal sends Ctrl-C to every process; workers ignore it and wait for the parent's SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sending.close()
    return _Slot(process, receiving, done)


def _end(processes: list[SpawnProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(LEAVE)
        process.kill()


def _worker(work: Work, index: int, count: int, complaint: Connection) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        work_through(work, index, count)
    except UserError as error:
        complaint.send(str(error))
        sys.exit(HOPELESS if isinstance(error, Unwritable) else LEFT)
    except KeyboardInterrupt:
        sys.exit(0)


def _interrupt(_signal: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _leave_with_parent() -> None:
    """End this process with its parent, even after kill -9. That is safe: no half-made file has its final name."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            wait([parent.sentinel])
        os._exit(1)
