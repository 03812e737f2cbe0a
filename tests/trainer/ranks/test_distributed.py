"""Several processes, one student: real ranks over gloo on loopback, by hand and under srun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import StudentDir
from trainer.evaluation.score import score_set
from trainer.evaluation.sets import image_set
from trainer.loop import Hooks, train
from trainer.recipe import load
from trainer.run import open_reader

from ...chaos.slurm_cluster import slurm, why_not
from ...patience import PATIENCE
from ...processes import ROOT, run
from ..conftest import NAMES, SIDE, write_image_set, write_run
from .jobs import LAUNCHERS, Ranks, command, metrics, told


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["forward=separate", "accumulate=2"]])
def test_two_ranks_learn_what_one_does(
    tiny_run: Path, tmp_path: Path, ranks: Ranks, alone: dict[str, str], how: list[str]
) -> None:
    """The same global batch on one and on two ranks: the same losses up to rounding, also from slices of unequal size.

    The accuracy is that of all 21 images, counted exactly.
    """
    validation = write_image_set(tmp_path / "val", 21)
    # Batch norm would use the statistics of a slice: the student has none. At this rate rounding errors do not grow.
    settings = [
        "student=test_convnext",
        f"validation={validation}",
        "batch=7",
        "optimizer.name=sgd",
        "optimizer.lr=0.01",
        "ema=0.5",
        *how,
    ]
    done = run(*command(tiny_run, tmp_path / "1", *settings), env=alone)
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
    """Stopped in its first epoch on one rank and resumed on two, a run ends in the weights of one, up to rounding."""
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
    """No number of ranks divides the 51 samples: equal steps all the same, and together the batches of one process."""
    shards = write_run(tmp_path / "run")
    overrides = [f"shards={shards}", "batch=7", "workers=1"]
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
    read = json.loads(job[0].communicate(timeout=PATIENCE)[0])
    assert told(job[1:]) == ([0] * (world - 1), [])
    alone = list(open_reader(load("demo", overrides)).batches(1))
    assert [len(steps) for steps in read] == [len(alone)] * world == [7] * world
    for stream in ("clean", "dad"):
        keys = [[key for mine in read for key in mine[step][stream]] for step in range(len(alone))]
        assert keys == [batch[stream].keys for batch in alone]
        every = [key for batch in keys for key in batch]
        assert len(every) == len(set(every)) == {"clean": 49, "dad": 33}[stream]


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
        job = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", f"--chdir={ROOT}", sys.executable]
        done = subprocess.run(
            [*job, *command(tiny_run, tmp_path / "student")], capture_output=True, text=True, timeout=PATIENCE
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student: done") == 1 and len(metrics(tmp_path / "student")) == 2


def test_batch_norm_over_ranks_needs_gpus(tiny_run: Path, tmp_path: Path, ranks: Ranks) -> None:
    statuses, lines = told(ranks(2, *command(tiny_run, tmp_path / "student", "sync_bn=true")))
    assert statuses == [2, 2]
    assert lines == ["error: sync_bn: works on GPUs only, this is cpu; set sync_bn=false"]
