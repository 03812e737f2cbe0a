"""The place of a process in a job of many: what torchrun or srun says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from manifests import UserError


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job."""

    rank: int
    world: int
    local_rank: int  # on its machine


def find_place(environ: MutableMapping[str, str]) -> Place | None:
    """The place that torchrun or srun gave this process; None when it is alone. srun's variables are translated to torchrun's.

    Raises UserError for an environment that is incomplete or senseless.
    """
    if "RANK" not in environ and "SLURM_STEP_NUM_TASKS" in environ:  # the latter is set by srun alone, not by sbatch
        environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], environ["SLURM_STEP_NUM_TASKS"]
        environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
        environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
        # Of each step of each job another one: steps of a job run side by side, and so do jobs of neighbouring numbers.
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
    """The first host of Slurm's list: ``"gpu[007-012,20],cpu1"`` -> ``"gpu007"``."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def own_gpu(local_rank: int, gpus: int) -> int:
    """Which of the GPUs that this process can see is its own; where the launcher shows each process but one, that one."""
    if gpus > 1 and local_rank >= gpus:
        raise UserError(
            f"device: process {local_rank + 1} of this machine has no GPU of its own, there are {gpus}; start fewer processes"
        )
    return local_rank if gpus > 1 else 0
