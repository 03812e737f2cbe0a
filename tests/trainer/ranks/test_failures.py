"""Ranks that are killed, frozen, told to stop or in trouble: all end, and one says why. By hand and under torchrun."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainer.checkpoint import LAST, METRICS, StudentDir

from ...patience import PATIENCE, wait_for
from ...processes import launch
from ..conftest import write_run
from .jobs import Ranks, command, free_port, told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machines", "options"),
    [
        (1, ["--standalone", "--nproc-per-node=3"]),
        # The machine whose rank is killed counts a failed start; the other sees it come back, and counts none.
        (2, ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job"]),
    ],
)
def test_a_killed_rank_under_torchrun_restarts_to_the_same_weights(
    tiny_run: Path, tmp_path: Path, ranks: Ranks, alone: dict[str, str], machines: int, options: list[str]
) -> None:
    """The last rank is killed in mid-training: torchrun starts all anew, they resume and end in the same bits."""
    settings, world = ["epochs=15", "checkpoint_minutes=0"], max(machines, 3 if machines == 1 else 2)
    assert told(ranks(world, *command(tiny_run, tmp_path / "whole", *settings))) == ([0] * world, [])
    torchrun = ["-m", "torch.distributed.run", *options, "--max-restarts=1"]
    if machines > 1:
        torchrun.append(f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    with contextlib.ExitStack() as stack:
        jobs = []
        for _ in range(machines):
            job = launch(*torchrun, *command(tiny_run, tmp_path / "killed", *settings), env=alone, stdout=None)
            stack.callback(job.kill)
            jobs.append(job)
        last = tmp_path / "killed" / LAST
        wait_for(last.exists, *jobs)
        first = last.stat().st_mtime_ns
        wait_for(lambda: last.stat().st_mtime_ns != first, *jobs)
        os.kill(child_of_rank([job.pid for job in jobs], world - 1), signal.SIGKILL)
        said = "".join(job.communicate(timeout=PATIENCE)[1] for job in jobs)
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
def test_a_killed_rank_ends_the_job(tiny_run: Path, tmp_path: Path, ranks: Ranks, victim: int) -> None:
    """kill -9 without torchrun to clean up: the other rank says who is missing, and ends long before gloo would."""
    job = ranks(2, *command(tiny_run, tmp_path / "student", "epochs=500"))
    wait_for((tmp_path / "student" / LAST).exists, *job)
    job[victim].kill()
    statuses, lines = told(job)
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == 2
    assert len(lines) == 1 and lines[0].startswith(f"error: rank {victim} has fallen silent"), lines


def test_one_rank_told_to_stop_stops_all_with_a_checkpoint(tiny_run: Path, tmp_path: Path, ranks: Ranks) -> None:
    """SIGTERM to rank 1 alone: both finish a step, rank 0 writes what was learned, nobody speaks of a lost process."""
    processes = ranks(2, *command(tiny_run, tmp_path, "epochs=1000", "checkpoint_minutes=1000"))
    wait_for((tmp_path / METRICS).exists, *processes)
    told_at = time.time()
    processes[1].send_signal(signal.SIGTERM)
    output = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [130, 130]
    assert sum("the same command goes on from there" in text for text in output) == 1 and not any(
        "error:" in text for text in output
    )
    assert (tmp_path / LAST).stat().st_mtime > told_at and StudentDir(tmp_path).load_last() is not None


def hooked(run: Path, out: Path, hooks: str, *overrides: str) -> str:
    """A program that trains as the command line does, with ``hooks`` that it defines itself."""
    given = command(run, out, *overrides)
    named = [override for flag, override in itertools.pairwise(given) if flag == "--set"]
    return f"""
import os, signal, threading, time
import click
from manifests.command import ProjectGroup
from trainer.loop import Hooks, train
from trainer.ranks import distributed
from trainer.recipe import load
{hooks}
@click.group(cls=ProjectGroup)
def main(): pass
@main.command()
def go():
    with distributed.joined():
        train(load("demo", {named}), {str(out)!r}, hooks)
main(["go"])
"""


def test_a_job_that_is_told_to_stop_waits_for_its_checkpoint(tiny_run: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Rank 0 takes four seconds to write it; rank 1, done long before, does not end the job meanwhile."""
    hooks = """
def stop(run, batch):
    if run.steps_done == 2 and distributed.is_first():
        os.kill(os.getpid(), signal.SIGTERM)
def slow(run):
    if run.steps_done > 2 and distributed.is_first():
        time.sleep(4)
hooks = Hooks(before_step=stop, before_save=slow)
"""
    processes = ranks(2, "-c", hooked(tiny_run, tmp_path, hooks, "epochs=1000", "checkpoint_minutes=1000"))
    statuses, lines = told(processes)
    assert (statuses, lines) == ([130, 130], [])
    assert StudentDir(tmp_path).load_last() is not None


def test_a_rank_told_to_stop_while_it_waits_for_a_checkpoint_is_heard(
    tiny_run: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Rank 1 has done the epoch's last step, and rank 0 writes its checkpoint: all stop before the next epoch."""
    hooks = """
def told(run, losses):
    if run.steps_done == 6 and not distributed.is_first():
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
def slow(run):
    if run.at.step == 6:
        time.sleep(4)
hooks = Hooks(after_step=told, before_save=lambda run: distributed.is_first() and slow(run))
"""
    processes = ranks(2, "-c", hooked(tiny_run, tmp_path, hooks, "epochs=4", "checkpoint_minutes=1000"))
    assert told(processes) == ([130, 130], [])
    state = StudentDir(tmp_path).load_last()
    assert state is not None and (state["progress"]["epoch"], state["progress"]["step"]) == (0, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "agent"), [([0], False), ([0], True), ([1], False), ([0, 1], True)])
def test_a_frozen_rank_is_noticed(tiny_run: Path, tmp_path: Path, ranks: Ranks, frozen: list[int], agent: bool) -> None:
    """No connection breaks, as when a machine loses its network. agent: torchrun holds the store in place of rank 0."""
    arguments = command(tiny_run, tmp_path / "student", "epochs=100000")[2:]
    program = (
        "from trainer import __main__; from trainer.ranks import watch; "
        f"watch.SILENCE, watch.DEAF = 4, 6; __main__.main({arguments!r})"
    )
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if agent:
        environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(server.port)}
        program = f"import os; os.environ.update({environment!r}); {program}"
    job = ranks(len(frozen) + 1, "-c", program)
    wait_for((tmp_path / "student" / LAST).exists, *job)
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
    """Rank 0 holds the store and waits for the other; rank 1 waits for the store. Each says at once that it waits."""
    place = {"WORLD_SIZE": "2", "RANK": str(here), "LOCAL_RANK": "0"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = command(tiny_run, tmp_path / "student")[2:]
    program = (
        f"from trainer import __main__; from trainer.ranks import watch; watch.LATE = 0; __main__.main({arguments!r})"
    )
    waiting = launch("-c", program, env=alone | place)
    try:
        assert waiting.stderr is not None and f"rank {1 - here} has not come yet" in waiting.stderr.readline()
        waiting.send_signal(number)
        said = waiting.communicate(timeout=PATIENCE)[1]
    finally:
        waiting.kill()
    assert waiting.returncode == 130 and said.startswith("\ninterrupted; "), said


def test_a_user_error_is_told_once(tiny_run: Path, tmp_path: Path, ranks: Ranks) -> None:
    statuses, lines = told(ranks(2, *command(tiny_run, tmp_path / "student", "student=test_resnt")))
    assert statuses == [2, 2]
    assert len(lines) == 1 and "'test_resnet'" in lines[0]


def test_damage_met_by_one_rank_ends_all(tmp_path: Path, ranks: Ranks) -> None:
    """One sample of one tar is damaged: one rank reads it; the other, waiting for it in a collective, ends too."""
    shards = write_run(tmp_path / "run")
    tar = shards / "dad" / "dad-000001.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    statuses, lines = told(ranks(2, *command(shards, tmp_path / "student", "check_shards=false", "workers=1")))
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
    said = [process.communicate(timeout=PATIENCE)[1] for process in ranks(2, "-c", program)]
    lines = [line for text in said for line in text.splitlines() if "UserError: " in line]
    assert (
        len(lines) == 1 and "a call between the ranks failed, and none is missing (" in lines[0] and "never" in lines[0]
    ), said
