"""Workers as the tasks of a Slurm array job, through submitit; preempted, timed-out and requeued tasks come back.

Slurm schedules, places and requeues; a task that comes back loads the models and goes on with what is missing. Whether the work
is done the run directory tells, not the state of the job, which a cluster without accounting does not know.
"""

from __future__ import annotations

import pickle
import secrets
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from manifests import UserError, one_line
from manifests.recipe import nearest

from ..job.worker import Work, work_through
from . import Watch

try:
    import submitit
except ImportError as error:
    raise UserError(
        "launch.launcher: slurm needs the package submitit: pip install 'discrete-adversarial-distillation[slurm]'"
    ) from error

FOLDER = Path("runs/slurm")  # logs, and what submitit keeps; on a disk that every node sees
TASKS = 8
LOOK = 5.0  # seconds
DEFAULTS: dict[str, Any] = {
    "time": 240,
    "signal_delay_s": 90,
    "job_name": "dad-shards",
    "setup": [f"export PYTHONPATH={Path(__file__).resolve().parents[2]}:$PYTHONPATH"],
}


@dataclass(frozen=True)
class Task:
    """One task of the array. Slurm's warning (preemption, time limit) makes submitit call `checkpoint` and requeue it."""

    work: Path
    index: int
    count: int

    def __call__(self) -> None:
        signal.signal(signal.SIGTERM, _leave)  # submitit would ignore it until Slurm kills
        work: Work = pickle.loads(
            self.work.read_bytes()
        )  # written by the command that submitted this task, in the user's own folder
        work_through(work, self.index, self.count)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self)


def launch(work: Work, watch: Watch) -> None:
    """Submit the array and wait until no task of it is left in the queue.

    Interrupting this cancels the job. When the terminal is lost the job goes on, and the same command joins it.
    Raises UserError when Slurm is not there or refuses the options.
    """
    count = min(work.recipe.launch.workers or TASKS, max(len(work.todo), 1))
    FOLDER.mkdir(parents=True, exist_ok=True)
    told = (FOLDER / f"work-{secrets.token_hex(4)}.pickle").resolve()
    told.write_bytes(pickle.dumps(work))
    try:
        executor = submitit.SlurmExecutor(folder=FOLDER.resolve())
        executor.update_parameters(**DEFAULTS | work.recipe.launch.slurm | {"array_parallelism": count})
        with executor.batch():
            jobs = [executor.submit(Task(told, index, count)) for index in range(count)]
    except (RuntimeError, ValueError, TypeError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"launch.slurm: {_reason(error, work.recipe.launch.slurm)}") from error
    job = jobs[0].job_id.partition("_")[0]
    click.echo(
        f"{work.out}: Slurm job {job}, {count} tasks, logs in {FOLDER}/{job}_*; it goes on if this terminal is lost",
        err=True,
    )
    try:
        while _queued(job):
            time.sleep(LOOK)
            watch()
    except KeyboardInterrupt:
        subprocess.run(["scancel", job], check=False)
        raise
    told.unlink(missing_ok=True)


def _queued(job: str) -> bool:
    """Whether a task of the job is waiting or running. A controller that does not answer is asked again."""
    told = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    if told.returncode and "Invalid job id" in told.stderr:  # it has left the controller's memory
        return False
    return bool(told.returncode or told.stdout.strip())


def _reason(error: Exception, options: dict[str, Any]) -> str:
    known = sorted(submitit.SlurmExecutor._valid_parameters())
    if unknown := [name for name in options if name not in known]:
        return f"unknown option {unknown[0]!r}{nearest(unknown[0], known)}"
    return one_line(error, 300)


def _leave(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt  # gives the shard back at once
