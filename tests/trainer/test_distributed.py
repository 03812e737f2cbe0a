"""Several processes, one student: real ranks over gloo on loopback, by hand and under torchrun."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from manifests import UserError
from trainer.checkpoint import LAST, METRICS, StudentDir
from trainer.distributed import find_place, first_host, own_gpu
from trainer.evaluate import score_set

from .conftest import CLASSES, SIDE, write_image_set, write_run

PROJECT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
Ranks = Callable[..., list[subprocess.Popen[str]]]


def command(run: Path, out: Path, *overrides: str) -> list[str]:
    base = [f"shards={run}", "student=test_resnet", "validation=null", "precision=fp32", "threads=1", "device=cpu", "epochs=2", "batch=8"]
    return ["-m", "trainer", "train", "--out", str(out), *(part for o in (*base, *overrides) for part in ("--set", o))]


@pytest.fixture
def alone() -> dict[str, str]:
    """The environment without traces of a launcher."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS}


@pytest.fixture
def ranks(alone: dict[str, str]) -> Iterator[Ranks]:
    """Start the ranks of a job as a launcher would; all are ended with the test."""
    processes: list[subprocess.Popen[str]] = []

    def launch(world: int, *arguments: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for rank in range(world):
            environment = alone | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments], cwd=PROJECT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
            )
        return processes[-world:]

    yield launch
    for process in processes:
        process.kill()
        process.communicate()


def told(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit statuses, and every line with ``error:`` or a stack trace that any rank wrote."""
    output = [process.communicate(timeout=120)[1] for process in processes]
    lines = [line for text in output for line in text.splitlines() if line.startswith(("error:", "Traceback"))]
    return [process.returncode for process in processes], lines


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.01)


def metrics(out: Path) -> list[dict[str, float]]:
    with open(out / METRICS) as file:
        return [{name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(tiny_run: Path, tmp_path: Path, ranks: Ranks, alone: dict[str, str]) -> None:
    """The same global batch on one and on two ranks: the same losses up to rounding, slices of unequal size included; and the accuracy
    is that of all 21 images, counted exactly."""
    validation = write_image_set(tmp_path / "val", 21)
    # A student without batch norm, whose statistics would be those of a slice; a rate at which rounding errors do not multiply.
    settings = ["student=test_convnext", f"validation={validation}", "batch=7", "optimizer.name=sgd", "optimizer.lr=0.01", "ema=0.5"]
    done = subprocess.run([sys.executable, *command(tiny_run, tmp_path / "1", *settings)], cwd=PROJECT, env=alone, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert told(ranks(2, *command(tiny_run, tmp_path / "2", *settings, "workers=1"))) == ([0, 0], [])
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) == 2 and one[1]["loss"] < one[0]["loss"]
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=1e-4)
    student = StudentDir(tmp_path / "2").load_student()
    score = score_set(student, validation, CLASSES, SIDE, torch.device("cpu"), bf16=False)
    assert score.images == 21 and max(row["val_top1"] for row in two) == pytest.approx(score.top1, rel=1e-5)
    assert [path.name for path in (tmp_path / "2").iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.slow
def test_a_killed_rank_under_torchrun_restarts_to_the_same_weights(
    tiny_run: Path, tmp_path: Path, ranks: Ranks, alone: dict[str, str]
) -> None:
    """Three ranks, one killed in mid-training: torchrun starts all anew, they go on from the checkpoint and end in the same bits."""
    settings = ["epochs=15", "checkpoint_minutes=0"]
    assert told(ranks(3, *command(tiny_run, tmp_path / "whole", *settings))) == ([0, 0, 0], [])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--max-restarts=1"]
    job = subprocess.Popen(
        [*torchrun, *command(tiny_run, tmp_path / "killed", *settings)], cwd=PROJECT, env=alone, text=True, stderr=subprocess.PIPE
    )
    try:
        last = tmp_path / "killed" / LAST
        wait_for(last.exists)
        first = last.stat().st_mtime_ns
        wait_for(lambda: last.stat().st_mtime_ns != first)
        os.kill(child_of_rank(job.pid, 2), signal.SIGKILL)
        said = job.communicate(timeout=120)[1]
    finally:
        job.kill()
    assert job.returncode == 0, said
    assert said.count("error: rank 2 has ended without a word") == 1
    states = [StudentDir(tmp_path / name).load_last() for name in ("whole", "killed")]
    assert states[0] is not None and states[1] is not None
    for part in ("student", "average"):
        left, right = states[0][part], states[1][part]
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def child_of_rank(parent: int, rank: int) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ours = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent
            if ours and f"\0RANK={rank}\0".encode() in b"\0" + (entry / "environ").read_bytes():
                return int(entry.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError(f"no rank {rank} below process {parent}")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_in_seconds(tiny_run: Path, tmp_path: Path, ranks: Ranks, victim: int) -> None:
    """kill -9 without torchrun to clean up: the other rank says who is missing and ends by itself."""
    job = ranks(2, *command(tiny_run, tmp_path / "student", "epochs=500"))
    wait_for((tmp_path / "student" / LAST).exists)
    job[victim].kill()
    killed = time.monotonic()
    statuses, lines = told(job)
    assert time.monotonic() - killed < 30
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == 2
    assert len(lines) == 1 and lines[0].startswith(f"error: rank {victim} has ended without a word"), lines


def test_a_user_error_is_told_once(tiny_run: Path, tmp_path: Path, ranks: Ranks) -> None:
    statuses, lines = told(ranks(2, *command(tiny_run, tmp_path / "student", "student=test_resnt")))
    assert statuses == [2, 2]
    assert len(lines) == 1 and "'test_resnet'" in lines[0]


def test_batch_norm_over_ranks_needs_gpus(tiny_run: Path, tmp_path: Path, ranks: Ranks) -> None:
    statuses, lines = told(ranks(2, *command(tiny_run, tmp_path / "student", "sync_bn=true")))
    assert statuses == [2, 2]
    assert lines == ["error: sync_bn: works on GPUs only, this is cpu; set sync_bn=false"]


def test_damage_met_by_one_rank_ends_all(tmp_path: Path, ranks: Ranks) -> None:
    """One sample of one tar is damaged: one rank reads it; the other, waiting for it in a collective, ends too."""
    run = write_run(tmp_path / "run")
    tar = run / "dad" / "dad-000001.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    statuses, lines = told(ranks(2, *command(run, tmp_path / "student", "check_shards=false", "workers=1")))
    assert statuses == [2, 2]
    assert len(lines) == 1 and lines[0].startswith(f"error: {tar}: "), lines


def test_a_distributed_error_of_living_ranks_says_why(ranks: Ranks) -> None:
    """Nobody is missing, so that the error itself is all there is to go by: here, word that never comes."""
    program = """
from datetime import timedelta
from trainer import distributed
with distributed.joined():
    distributed.start("cpu")
    distributed._watch.group_store.wait(["never"], timedelta(seconds=1))
"""
    said = [process.communicate(timeout=60)[1] for process in ranks(2, "-c", program)]
    lines = [line for text in said for line in text.splitlines() if "UserError: " in line]
    assert len(lines) == 1 and "a call between the ranks failed, and none is missing (" in lines[0] and "never" in lines[0], said


def test_places() -> None:
    """torchrun's and srun's environments; alone in all others."""
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    place = find_place(dict(torchrun))
    assert place is not None and (place.rank, place.world, place.local_rank) == (3, 8, 1)
    srun = {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "77",
    }  # fmt: skip
    place = find_place(srun)
    assert place is not None and (place.rank, place.world, place.local_rank) == (5, 16, 5)
    assert srun["MASTER_ADDR"] == "gpu03" and int(srun["MASTER_PORT"]) == 20_077
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "77"}
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1"}, batch_script, srun | {"SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "1"}):
        assert find_place(environment) is None
    with pytest.raises(UserError, match="MASTER_ADDR"):
        find_place({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


@pytest.mark.parametrize("nodes", ["gpu007", "gpu007,cpu1", "gpu[007-012,20],cpu1", "gpu[007,9]"])
def test_first_host(nodes: str) -> None:
    assert first_host(nodes) == "gpu007"


def test_one_process_per_gpu() -> None:
    assert [own_gpu(local, 4) for local in range(4)] == [0, 1, 2, 3]
    assert own_gpu(3, 1) == 0  # srun --gpus-per-task=1 shows each process its own GPU as the only one
    with pytest.raises(UserError, match="there are 2"):
        own_gpu(2, 2)
