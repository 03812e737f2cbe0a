"""Workers as the tasks of a Slurm array job, through submitit; preempted, timed-out and requeued tasks come back.

Slurm schedules, places and requeues; a task that comes back loads the models and goes on with what is missing. The run
directory says whether the work is done; the job's state does not, because a cluster without accounting forgets it.
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

FOLDER = Path("runs/slurm")  # logs and submitit's files; must be on a disk that every node sees
TASKS = 8
LOOK = 5.0  # seconds between two looks at the queue
DEFAULTS: dict[str, Any] = {
    "time": 240,
    "signal_delay_s": 90,
    "job_name": "dad-shards",
    "setup": [f"export PYTHONPATH={Path(__file__).resolve().parents[2]}:$PYTHONPATH"],
}


@dataclass(frozen=True)
class Task:
    """One task of the array. At Slurm's warning (preemption, time limit) submitit calls `checkpoint` and requeues."""

    work: Path
    index: int
    count: int

    def __call__(self) -> None:
        signal.signal(signal.SIGTERM, _leave)  # without it submitit ignores SIGTERM until Slurm kills
        # safe to unpickle: the command that submitted this task wrote the file, in the user's own folder
        work: Work = pickle.loads(self.work.read_bytes())
        work_through(work, self.index, self.count)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self)


def launch(work: Work, watch: Watch) -> None:
    """Submit the array and wait until no task of it is left in the queue.

    An interrupt cancels the job. If the terminal is lost, the job goes on, and the same command shares its work.
    Raises UserError when Slurm is not there or refuses the options.
    """
    count = min(work.recipe.launch.workers or TASKS, max(len(work.todo), 1))
    FOLDER.mkdir(parents=True, exist_ok=True)
    task_file = (FOLDER / f"work-{secrets.token_hex(4)}.pickle").resolve()
    task_file.write_bytes(pickle.dumps(work))
    try:
        executor = submitit.SlurmExecutor(folder=FOLDER.resolve())
        executor.update_parameters(**DEFAULTS | work.recipe.launch.slurm | {"array_parallelism": count})
        with executor.batch():
            jobs = [executor.submit(Task(task_file, index, count)) for index in range(count)]
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
    task_file.unlink(missing_ok=True)


def _queued(job: str) -> bool:
    """Whether a task of the job is waiting or running. Also True when the controller does not answer: ask again."""
    answer = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    if answer.returncode and "Invalid job id" in answer.stderr:  # the controller has forgotten the finished job
        return False
    return bool(answer.returncode or answer.stdout.strip())


def _reason(error: Exception, options: dict[str, Any]) -> str:
    known = sorted(submitit.SlurmExecutor._valid_parameters())
    if unknown := [name for name in options if name not in known]:
        return f"unknown option {unknown[0]!r}{nearest(unknown[0], known)}"
    return one_line(error, 300)


def _leave(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt  # releases the claimed shards at once
