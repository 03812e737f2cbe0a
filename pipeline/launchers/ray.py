"""Workers as Ray actors, one per GPU. Ray places them, asks for nodes, and restarts dead ones."""

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

RESTARTS = 100  # restarts of one actor before Ray gives it up; a shard that kills its workers is given up long before
LOOK = 2.0  # seconds between two looks at the run directory
PROJECT = Path(__file__).resolve().parents[2]


def launch(work: Work, watch: Watch) -> None:
    """Run the actors until all have ended. Nodes need the project and the recipe's files at the same paths.

    Connects to the cluster of RAY_ADDRESS, or starts Ray on this machine. Raises a worker's UserError when no worker
    finished the work, and at once when OUT cannot be written.
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
    # if the recipe names cuda, wait for a GPU: the cluster may have none yet and grow
    device = {"num_gpus": 1} if gpus or work.recipe.device.startswith("cuda") else {"num_cpus": threads}
    shared = ray.put(
        replace(work, recipe=replace(work.recipe, threads=threads, codec_threads=work.recipe.codec_threads or threads))
    )
    actor_class = ray.remote(**device, max_restarts=RESTARTS, max_task_retries=RESTARTS)(Worker)
    actors = [actor_class.remote(str(Path.cwd())) for _ in range(count)]
    pending = [actor.work.remote(shared, index, count) for index, actor in enumerate(actors)]
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
            except ray.exceptions.RayActorError as error:  # other workers may still finish its shards
                click.echo(f"a worker was lost for good: {one_line(error)}", err=True)
    if complaint is not None and not finished:
        raise UserError(complaint)


class Worker:
    """An actor on one device. If its process dies, Ray calls `work` again in a new one, which makes what is missing."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)  # the recipe's paths may be relative

    def work(self, work: Work, index: int, count: int) -> None:
        work_through(work, index, count)
