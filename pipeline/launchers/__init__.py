"""Launchers, which run the workers: `local` processes, a `slurm` array job, or `ray` actors.

A launcher starts workers (`pipeline.job.worker.work_through`), restarts dead ones by its engine's means, and returns
when all have ended. It schedules nothing: workers share the shards among themselves, and the run directory says what is
done.
"""

from __future__ import annotations

from collections.abc import Callable

from ..job.worker import Work

Watch = Callable[[], int]
"""Looks at the run directory, moves the progress bar, and returns the number of shards that are done."""
Launcher = Callable[[Work, Watch], None]


def find_launcher(name: str) -> Launcher:
    """Find the launcher that ``launch.launcher`` names. Raises UserError when its package is not installed."""
    if name == "slurm":
        from .slurm import launch
    elif name == "ray":
        from .ray import launch
    else:
        from .local import launch
    return launch
