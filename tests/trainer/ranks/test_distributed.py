"""Several processes, one student: real ranks over gloo on loopback, by hand and under torchrun."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainer.checkpoint import LAST, METRICS, StudentDir
from trainer.evaluation.score import score_set
from trainer.evaluation.sets import image_set
from trainer.loop import Hooks, train
from trainer.recipe import load
from trainer.run import open_reader

from ...chaos.slurm_cluster import slurm, why_not
from ..conftest import NAMES, SIDE, write_image_set, write_run

PROJECT = Path(__file__).resolve().parents[3]
LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
Ranks = Callable[..., list[subprocess.Popen[str]]]


def command(run: Path, out: Path, *overrides: str) -> list[str]:
    base = [
        f"shards={run}",
        "student=test_resnet",
        "validation=null",
        "precision=fp32",
        "threads=1",
        "device=cpu",
        "epochs=2",
        "batch=8",
    ]
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
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(world):
            environment = alone | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=PROJECT,
                    env=environment,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        return processes[-world:]

    yield launch
    for process in processes:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def told(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit statuses, and every line with ``error:``, a stack trace or a Python warning that any rank wrote."""
    lines = [line for process in processes for line in process.communicate(timeout=120)[1].splitlines()]
    lines = [line for line in lines if line.startswith(("error:", "Traceback")) or "Warning: " in line]
    return [process.returncode for process in processes], lines


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.01)


def metrics(out: Path) -> list[dict[str, float]]:
    with open(out / METRICS) as file:
        return [
            {name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["forward=separate", "accumulate=2"]])
def test_two_ranks_learn_what_one_does(
    tiny_run: Path, tmp_path: Path, ranks: Ranks, alone: dict[str, str], how: list[str]
) -> None:
    """The same global batch on one and on two ranks: the same losses up to rounding, slices of unequal size included; and the accuracy
    is that of all 21 images, counted exactly."""
    validation = write_image_set(tmp_path / "val", 21)
    # A student without batch norm, whose statistics would be those of a slice; a rate at which rounding errors do not multiply.
    settings = [
        "student=test_convnext",
        f"validation={validation}",
        "batch=7",
        "optimizer.name=sgd",
        "optimizer.lr=0.01",
        "ema=0.5",
        *how,
    ]
    done = subprocess.run(
        [sys.executable, *command(tiny_run, tmp_path / "1", *settings)], cwd=PROJECT, env=alone, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert told(ranks(2, *command(tiny_run, tmp_path / "2", *settings, "workers=1"))) == ([0, 0], [])
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) == 2 and one[1]["loss"] < one[0]["loss"]
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=1e-4)
    student = StudentDir(tmp_path / "2").load_student()
    score = score_set(student, image_set(validation, NAMES), SIDE, torch.device("cpu"), bf16=False)
    assert score.images == 21 and max(row["val_top1"] for row in two) == pytest.approx(score.top1, rel=1e-5)
    assert [path.name for path in (tmp_path / "2").iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.slow
def test_a_run_goes_on_over_another_number_of_ranks(tiny_run: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Stopped in the middle of its first epoch on one rank, gone on with on two: the weights of a run on one, up to rounding."""
    base = [
        f"shards={tiny_run}",
        "student=test_convnext",
        "validation=null",
        "precision=fp32",
        "threads=1",
        "device=cpu",
    ]
    settings = ["epochs=2", "batch=7", "optimizer.name=sgd", "optimizer.lr=0.01", "checkpoint_minutes=0"]
    recipe = load("demo", [*base, *settings])
    train(recipe, str(tmp_path / "whole"))
    steps = iter(range(4))

    def stop(*_: Any) -> None:
        if next(steps, None) is None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(recipe, str(tmp_path / "moved"), Hooks(before_step=stop))
    stopped = StudentDir(tmp_path / "moved").load_last()
    assert stopped is not None and (stopped["progress"]["epoch"], stopped["progress"]["step"]) == (0, 4)
    assert told(ranks(2, *command(tiny_run, tmp_path / "moved", *base, *settings))) == ([0, 0], [])
    whole, moved = (StudentDir(tmp_path / name).load_last() for name in ("whole", "moved"))
    assert whole is not None and moved is not None and whole["progress"]["images"] == moved["progress"]["images"]
    ended, other, before = (
        torch.cat([value.flatten() for value in state["student"].values()]) for state in (whole, moved, stopped)
    )
    assert (ended - other).norm() < 1e-4 * (ended - before).norm()  # which is what it has learned since it was moved


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_sample_once_over_ranks(tmp_path: Path, ranks: Ranks, world: int) -> None:
    """51 samples in three shards, which no number of ranks divides: equal steps, and together the batches that one process would read."""
    run = write_run(tmp_path / "run")
    overrides = [f"shards={run}", "batch=7", "workers=1"]
    program = f"""
import json
from trainer.ranks import distributed
from trainer.run import open_reader
from trainer.recipe import load
with distributed.joined():
    distributed.start("cpu")
    reader = open_reader(load("demo", {overrides}))
    mine = [{{name: half.keys for name, half in batch.items()}} for batch in reader.batches(1, workers=1)]
    read = distributed.gather(mine)
    if distributed.is_first():
        print(json.dumps(read))
"""
    job = ranks(world, "-c", program)
    read = json.loads(job[0].communicate(timeout=120)[0])
    assert told(job[1:]) == ([0] * (world - 1), [])
    alone = list(open_reader(load("demo", overrides)).batches(1))
    assert [len(steps) for steps in read] == [len(alone)] * world == [7] * world
    for stream in ("clean", "dad"):
        keys = [[key for mine in read for key in mine[step][stream]] for step in range(len(alone))]
        assert keys == [batch[stream].keys for batch in alone]
        every = [key for batch in keys for key in batch]
        assert len(every) == len(set(every)) == {"clean": 49, "dad": 33}[stream]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machines", "options"),
    [
        (1, ["--standalone", "--nproc-per-node=3"]),
        # Of two machines, the one whose rank is killed counts a failed start; the other sees it come back, and counts none.
        (2, ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job"]),
    ],
)
def test_a_killed_rank_under_torchrun_restarts_to_the_same_weights(
    tiny_run: Path, tmp_path: Path, ranks: Ranks, alone: dict[str, str], machines: int, options: list[str]
) -> None:
    """The last rank is killed in mid-training: torchrun starts all anew, they go on from the checkpoint and end in the same bits."""
    settings, world = ["epochs=15", "checkpoint_minutes=0"], max(machines, 3 if machines == 1 else 2)
    assert told(ranks(world, *command(tiny_run, tmp_path / "whole", *settings))) == ([0] * world, [])
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options, "--max-restarts=1"]
    if machines > 1:
        torchrun.append(f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    with contextlib.ExitStack() as stack:
        jobs = []
        for _ in range(machines):
            job = subprocess.Popen(
                [*torchrun, *command(tiny_run, tmp_path / "killed", *settings)],
                cwd=PROJECT,
                env=alone,
                text=True,
                stderr=subprocess.PIPE,
            )
            stack.callback(job.kill)
            jobs.append(job)
        last = tmp_path / "killed" / LAST
        wait_for(last.exists)
        first = last.stat().st_mtime_ns
        wait_for(lambda: last.stat().st_mtime_ns != first)
        os.kill(child_of_rank([job.pid for job in jobs], world - 1), signal.SIGKILL)
        said = "".join(job.communicate(timeout=120)[1] for job in jobs)
    assert [job.returncode for job in jobs] == [0] * machines, said
    assert said.count(f"error: rank {world - 1} has fallen silent") == 1
    states = [StudentDir(tmp_path / name).load_last() for name in ("whole", "killed")]
    assert states[0] is not None and states[1] is not None
    for part in ("student", "average"):
        left, right = states[0][part], states[1][part]
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def child_of_rank(parents: list[int], rank: int) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ours = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) in parents
            if ours and f"\0RANK={rank}\0".encode() in b"\0" + (entry / "environ").read_bytes():
                return int(entry.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError(f"no rank {rank} below the processes {parents}")


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
    assert len(lines) == 1 and lines[0].startswith(f"error: rank {victim} has fallen silent"), lines


def test_one_rank_told_to_stop_stops_all_with_a_checkpoint(tiny_run: Path, tmp_path: Path, ranks: Ranks) -> None:
    """SIGTERM to rank 1 alone: both finish a step, rank 0 writes what was learned, nobody speaks of a lost process."""
    processes = ranks(2, *command(tiny_run, tmp_path, "epochs=1000", "checkpoint_minutes=1000"))
    wait_for((tmp_path / METRICS).exists)
    told_at = time.time()
    processes[1].send_signal(signal.SIGTERM)
    output = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [130, 130]
    assert sum("the same command goes on from there" in text for text in output) == 1 and not any(
        "error:" in text for text in output
    )
    assert (tmp_path / LAST).stat().st_mtime > told_at and StudentDir(tmp_path).load_last() is not None


def test_a_job_that_is_told_to_stop_waits_for_its_checkpoint(tiny_run: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Rank 0 takes four seconds to write it; rank 1, done long before, does not end the job meanwhile."""
    given = command(tiny_run, tmp_path, "epochs=1000", "checkpoint_minutes=1000")
    overrides = [override for flag, override in itertools.pairwise(given) if flag == "--set"]
    program = f"""
import os, signal, time
import click
from manifests.command import ProjectGroup
from trainer.loop import Hooks, train
from trainer.ranks import distributed
from trainer.recipe import load
def stop(run, batch):
    if run.steps_done == 2 and distributed.is_first():
        os.kill(os.getpid(), signal.SIGTERM)
def slow(run):
    if run.steps_done > 2 and distributed.is_first():
        time.sleep(4)
@click.group(cls=ProjectGroup)
def main(): pass
@main.command()
def go():
    with distributed.joined():
        train(load("demo", {overrides}), {str(tmp_path)!r}, Hooks(before_step=stop, before_save=slow))
main(["go"])
"""
    processes = ranks(2, "-c", program)
    statuses, lines = told(processes)
    assert (statuses, lines) == ([130, 130], [])
    assert StudentDir(tmp_path).load_last() is not None


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "agent"), [([0], False), ([0], True), ([1], False), ([0, 1], True)])
def test_a_frozen_rank_is_noticed(tiny_run: Path, tmp_path: Path, ranks: Ranks, frozen: list[int], agent: bool) -> None:
    """As on a machine that has lost its network, no connection breaks; whoever (agent: torchrun) holds the store of the ranks."""
    arguments = command(tiny_run, tmp_path / "student", "epochs=100000")[2:]
    program = f"from trainer import __main__; from trainer.ranks import watch; watch.SILENCE, watch.DEAF = 4, 6; __main__.main({arguments!r})"
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if agent:
        environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(server.port)}
        program = f"import os; os.environ.update({environment!r}); {program}"
    job = ranks(len(frozen) + 1, "-c", program)
    wait_for((tmp_path / "student" / LAST).exists)
    for rank in frozen:
        job[rank].send_signal(signal.SIGSTOP)
    statuses, lines = told([process for rank, process in enumerate(job) if rank not in frozen])
    assert statuses == [2]
    assert len(lines) == 1 and lines[0].startswith(f"error: rank {frozen[0]} has fallen silent"), lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("here", [0, 1])
def test_a_rank_that_waits_for_the_others_can_be_ended(
    tiny_run: Path, tmp_path: Path, alone: dict[str, str], here: int, number: signal.Signals
) -> None:
    place = {
        "WORLD_SIZE": "2",
        "RANK": str(here),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    arguments = command(tiny_run, tmp_path / "student")[2:]
    program = f"from trainer import __main__; print('coming', flush=True); __main__.main({arguments!r})"
    waiting = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env=alone | place,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert waiting.stdout is not None and waiting.stdout.readline() == "coming\n"
        time.sleep(1)
        waiting.send_signal(number)
        said = waiting.communicate(timeout=10)[1]
    finally:
        waiting.kill()
    assert waiting.returncode == 130 and said.startswith("\ninterrupted; "), said


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_two_nodes_under_srun(
    tiny_run: Path, tmp_path: Path, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real Slurm of two nodes on this machine: one process of the job on each, one student."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # the nodes' names are known to this Slurm alone
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    with slurm(tmp_path):
        job = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", f"--chdir={PROJECT}", sys.executable]
        done = subprocess.run(
            [*job, *command(tiny_run, tmp_path / "student")], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student: done") == 1 and len(metrics(tmp_path / "student")) == 2


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
from trainer.ranks import distributed
with distributed.joined():
    distributed.start("cpu")
    distributed._watch.group_store.wait(["never"], timedelta(seconds=1))
"""
    said = [process.communicate(timeout=60)[1] for process in ranks(2, "-c", program)]
    lines = [line for text in said for line in text.splitlines() if "UserError: " in line]
    assert (
        len(lines) == 1 and "a call between the ranks failed, and none is missing (" in lines[0] and "never" in lines[0]
    ), said
