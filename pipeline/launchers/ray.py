"""Workers as Ray actors, one per GPU, that keep the models loaded; Ray places them, asks for nodes, and restarts dead ones."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import click

from manifests import Unwritable, UserError, one_line

from ..job.worker import Work, work_through
from . import Watch

try:
    import ray
except ImportError as error:
    raise UserError(
        "launch.launcher: ray needs the package ray: pip install 'discrete-adversarial-distillation[ray]'"
    ) from error

RESTARTS = 100  # of one actor, after which Ray gives it up; the shard that kills its workers is given up long before
LOOK = 2.0  # seconds
PROJECT = Path(__file__).resolve().parents[2]


def launch(work: Work, watch: Watch) -> None:
    """Run the actors until all have left. Nodes need the project and the recipe's files at the same paths.

    Joins the cluster of RAY_ADDRESS, or starts Ray on this machine. Raises the complaint of a worker when none of them finished the
    work, and at once when OUT cannot be written.
    """
    here = not ray.is_initialized()
    if here:
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT)}})
    try:
        _run(work, watch)
    finally:
        if here:
            ray.shutdown()


def _run(work: Work, watch: Watch) -> None:
    resources = ray.cluster_resources()
    gpus = 0 if work.recipe.device == "cpu" else int(resources.get("GPU", 0))
    threads = work.recipe.threads or 1
    count = min(
        work.recipe.launch.workers or gpus or max(int(resources.get("CPU", 1)) // threads, 1), max(len(work.todo), 1)
    )
    # Asked for by name, a GPU is waited for: the cluster may have none yet and grow
    device = {"num_gpus": 1} if gpus or work.recipe.device.startswith("cuda") else {"num_cpus": threads}
    told = ray.put(
        replace(work, recipe=replace(work.recipe, threads=threads, codec_threads=work.recipe.codec_threads or threads))
    )
    actor_class = ray.remote(**device, max_restarts=RESTARTS, max_task_retries=RESTARTS)(Worker)
    actors = [actor_class.remote(str(Path.cwd())) for _ in range(count)]
    pending = [actor.work.remote(told, index, count) for index, actor in enumerate(actors)]
    finished, complaint = False, None
    while pending:
        ready, pending = ray.wait(pending, timeout=LOOK)
        watch()
        for reference in ready:
            try:
                ray.get(reference)
                finished = True
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, Unwritable):
                    raise Unwritable(str(error.cause)) from error
                if not isinstance(error.cause, UserError):
                    raise
                complaint = str(error.cause)
                click.echo(f"a worker has left: {complaint}", err=True)
            except (
                ray.exceptions.RayActorError
            ) as error:  # others may finish what it could not; what is missing will be named
                click.echo(f"a worker was lost for good: {one_line(error)}", err=True)
    if complaint is not None and not finished:
        raise UserError(complaint)


class Worker:
    """One device. Ray repeats `work` in a new process when this one dies: it does what is then missing."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)  # the recipe's paths may be relative

    def work(self, work: Work, index: int, count: int) -> None:
        work_through(work, index, count)
