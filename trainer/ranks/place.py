"""The rank of a process in its job, as torchrun or srun sets it in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from manifests import UserError


@dataclass(frozen=True)
class Place:
    """The rank of this process in its job."""

    rank: int
    world: int
    local_rank: int  # number of the process on its machine


def find_place(environ: MutableMapping[str, str]) -> Place | None:
    """Read the place from the environment; None for a single process. Translates srun's variables to torchrun's.

    Raises UserError when a variable is missing or no number.
    """
    if "RANK" not in environ and "SLURM_STEP_NUM_TASKS" in environ:  # only srun sets the latter, sbatch does not
        environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], environ["SLURM_STEP_NUM_TASKS"]
        environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
        environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
        # a port per step of every job: steps, and jobs with adjacent ids, may share a machine
        number = int(environ["SLURM_JOB_ID"]) + 7_919 * int(environ["SLURM_STEP_ID"])
        environ.setdefault("MASTER_PORT", str(20_000 + number % 20_000))
    if "WORLD_SIZE" not in environ or (world := _number(environ, "WORLD_SIZE")) == 1:
        return None
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]:
        raise UserError(f"WORLD_SIZE is set and {missing[0]} is not; start with torchrun or srun, or unset WORLD_SIZE")
    _number(environ, "MASTER_PORT")
    return Place(_number(environ, "RANK"), world, _number(environ, "LOCAL_RANK"))


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise UserError(
            f"{name} is {environ[name]!r}, which is no number; start with torchrun or srun, or unset WORLD_SIZE"
        )
    return int(environ[name])


def first_host(nodes: str) -> str:
    """The first host in Slurm's notation: ``"gpu[007-012,20],cpu1"`` -> ``"gpu007"``."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def own_gpu(local_rank: int, gpus: int) -> int:
    """Index of this process's GPU among the visible ones. A launcher may show each process one GPU only: then 0.

    Raises UserError when there are more processes than GPUs.
    """
    if gpus > 1 and local_rank >= gpus:
        raise UserError(
            f"device: process {local_rank + 1} of this machine has no GPU of its own, there are {gpus}; "
            "start fewer processes"
        )
    return local_rank if gpus > 1 else 0
