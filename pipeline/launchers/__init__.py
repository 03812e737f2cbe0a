"""Who runs the workers: `local` processes, a `slurm` array job, or `ray` actors.

A launcher starts workers (`pipeline.job.worker.work_through`), keeps them alive by its engine's own means, and returns when all have
left. It schedules nothing: the workers share the shards among themselves, and what is done the run directory tells.
"""

from __future__ import annotations

from collections.abc import Callable

from ..job.worker import Work

Watch = Callable[[], int]
"""Looks at the run directory, moves the progress bar, and returns how many shards of the launch are done."""
Launcher = Callable[[Work, Watch], None]


def find_launcher(name: str) -> Launcher:
    """The launcher of a recipe's ``launch.launcher``. Raises UserError when its package is not installed."""
    if name == "slurm":
        from .slurm import launch
    elif name == "ray":
        from .ray import launch
    else:
        from .local import launch
    return launch
