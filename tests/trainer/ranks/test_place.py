"""Where a process stands: torchrun's and srun's environments."""

from __future__ import annotations

import pytest

from manifests import UserError
from trainer.ranks.place import find_place, first_host, own_gpu


def test_places() -> None:
    """torchrun's and srun's environments; alone in all others."""
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    place = find_place(dict(torchrun))
    assert place is not None and (place.rank, place.world, place.local_rank) == (3, 8, 1)
    srun = {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5", "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    place = find_place(srun)
    assert place is not None and (place.rank, place.world, place.local_rank) == (5, 16, 5)
    assert srun["MASTER_ADDR"] == "gpu03" and int(srun["MASTER_PORT"]) == 20_077
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "77"}
    for environment in (
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        batch_script,
        srun | {"SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "1"},
    ):
        assert find_place(environment) is None
    with pytest.raises(UserError, match="MASTER_ADDR"):
        find_place({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


def test_steps_of_one_job_meet_on_ports_of_their_own() -> None:
    """As do the steps of the jobs before and after it; and every port is one that a user may open."""
    ports = set()
    for job in range(70_000, 70_010):
        for step in range(50):
            srun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n1"}
            srun |= {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
            find_place(srun)
            ports.add(int(srun["MASTER_PORT"]))
    assert len(ports) == 500 and min(ports) >= 20_000 and max(ports) < 40_000


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", ""), ("RANK", "x"), ("LOCAL_RANK", "-1"), ("MASTER_PORT", "tcp")]
)
def test_what_is_no_number_is_named(name: str, value: str) -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    with pytest.raises(UserError, match=f"^{name} is '{value}', which is no number"):
        find_place(torchrun | {name: value})


@pytest.mark.parametrize("nodes", ["gpu007", "gpu007,cpu1", "gpu[007-012,20],cpu1", "gpu[007,9]"])
def test_first_host(nodes: str) -> None:
    assert first_host(nodes) == "gpu007"


def test_one_process_per_gpu() -> None:
    assert [own_gpu(local, 4) for local in range(4)] == [0, 1, 2, 3]
    assert own_gpu(3, 1) == 0  # srun --gpus-per-task=1 shows each process its own GPU as the only one
    with pytest.raises(UserError, match="there are 2"):
        own_gpu(2, 2)
