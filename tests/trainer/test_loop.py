"""Training: one step does what eq. 9 says, an interrupted run ends in the same weights, damage stops it by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from manifests import UserError
from shards import Batch, TrainingReader
from trainer.checkpoint import BEST, LAST, STUDENT_INFO, StudentDir
from trainer.evaluation.score import score_set
from trainer.evaluation.sets import image_set
from trainer.loop import Hooks, train
from trainer.methods.method import Images, total
from trainer.methods.parts.losses import cross_entropy, distillation_kl
from trainer.recipe import Recipe, load
from trainer.run import Training
from trainer.step import Learner, Losses, train_step
from trainer.student import create_student

from .conftest import CLASSES, NAMES, PER_SHARD, SHARDS, SIDE, write_image_set, write_run

STUDENT = "test_resnet"  # timm's smallest
PROJECT = Path(__file__).resolve().parents[2]
COMPILER = pytest.mark.skipif(
    "TEST_INDUCTOR" not in os.environ, reason="a minute of a C++ compiler; TEST_INDUCTOR=1 runs it"
)


def recipe(run: Path, *overrides: str) -> Recipe:
    base = [
        f"shards={run}",
        f"student={STUDENT}",
        "epochs=2",
        "batch=8",
        "validation=null",
        "precision=fp32",
        "threads=1",
    ]
    return load("demo", [*base, *overrides])


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    state = StudentDir(folder).load_last()
    assert state is not None
    return state["student"] | {f"average.{name}": value for name, value in state["average"].items()}


def assert_equal_runs(a: Path, b: Path) -> None:
    left, right = last_weights(a), last_weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def step_once(
    student: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, settings: Recipe, totals: dict[str, int]
) -> Losses:
    learner = Learner(student, student, optimizer, torch.device("cpu"), bf16=False)
    return train_step(learner, batch, settings, totals=totals, rate=0.1, step=0)


def test_one_step_is_one_update_by_the_dad_loss(tiny_run: Path) -> None:
    """The step's new weights equal those of SGD on the pure loss function."""
    settings = recipe(
        tiny_run, "optimizer.name=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.clip=null"
    )
    reader = TrainingReader(str(tiny_run), batch_size=8)
    batch = next(iter(reader.batches(0)))
    students = []
    for _ in range(2):
        torch.manual_seed(0)
        students.append(create_student(STUDENT, CLASSES, SIDE).train())
    optimizer = torch.optim.SGD(students[0].parameters(), lr=0.1)
    values = step_once(students[0], optimizer, batch, settings, reader.sizes(0))

    clean, dad = batch["clean"], batch["dad"]
    logits = students[1](torch.cat([clean.images, dad.images]).float() / 255)
    outputs = logits.split([len(clean.images), len(dad.images)])
    groups = [
        Images(x=half.images, labels=half.labels, logits=half.logits, stream=stream)
        for stream, half in (("clean", clean), ("dad", dad))
    ]
    terms = {"ce": cross_entropy(outputs[0], groups[0])}
    for output, images in zip(outputs, groups, strict=True):
        terms[f"kl_{images.stream}"] = 0.5 * distillation_kl(output, images.logits, images, 4.0)
    loss = total(terms, reader.sizes(0))
    loss.backward()
    assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for mine, theirs in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad)


def test_own_images_give_the_same_student(tiny_run: Path, tmp_path: Path) -> None:
    """A run of labels only, with the images in the user's own tars, gives the student of the run that holds them."""
    labels_only = write_run(tmp_path / "labels", clean_images=False)
    with pytest.raises(UserError, match="hold labels only, without images; name the folder or URL of your own"):
        train(recipe(labels_only, "epochs=1"), str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    train(recipe(labels_only, "epochs=1", f"images={tiny_run / 'clean'}", "workers=1"), str(tmp_path / "joined"))
    train(recipe(tiny_run, "epochs=1"), str(tmp_path / "stored"))
    assert_equal_runs(tmp_path / "joined", tmp_path / "stored")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=COMPILER)])
def test_a_compiled_student_learns_the_same(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """compile=true, forward and backward: the same names in checkpoints and, up to rounding, weights; it resumes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    same = ["epochs=1", "drop_path=0.2", "optimizer.name=sgd"]
    train(recipe(tiny_run, *same), str(tmp_path / "eager"))
    stop = Hooks(before_step=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tiny_run, *same, "compile=true"), str(tmp_path / "compiled"), stop)
    state = StudentDir(tmp_path / "compiled").load_last()
    assert state is not None and state["progress"]["step"] == 1
    train(recipe(tiny_run, *same, "compile=true"), str(tmp_path / "compiled"))
    eager, compiled = last_weights(tmp_path / "eager"), last_weights(tmp_path / "compiled")
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)
    StudentDir(tmp_path / "compiled").load_student()


def test_training_learns_the_colours(tiny_run: Path, tmp_path: Path) -> None:
    run = train(recipe(tiny_run, "epochs=12", "optimizer.lr=0.003"), str(tmp_path / "student"))
    rows = (tmp_path / "student" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 13
    first, last = (float(rows[i].split(",")[1]) for i in (1, -1))
    assert last < 0.5 * first
    score = score_set(run.load_student(), image_set(tiny_run / "clean", NAMES), SIDE, torch.device("cpu"), bf16=False)
    assert score.images == SHARDS * PER_SHARD and score.top1 > 70  # the commonest class is a third


def test_killed_and_resumed_ends_in_the_same_weights(tiny_run: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of an epoch, three times, each time going on from the last checkpoint."""
    settings = ["epochs=4", "checkpoint_minutes=0", "batch=4", "accumulate=2", "drop_path=0.2", "method.smoothing=0.1"]
    settings += [
        "augmentation.mixup=0.4",
        "augmentation.cutmix=1",
        "augmentation.randaugment=1",
        "augmentation.erase=0.3",
    ]
    train(recipe(tiny_run, *settings), str(tmp_path / "whole"))
    command = [sys.executable, "-m", "trainer", "train", "--out", str(tmp_path / "killed")]
    base = [f"shards={tiny_run}", f"student={STUDENT}", "validation=null", "precision=fp32", "threads=1", *settings]
    for override in base:
        command += ["--set", override]
    kills = 0
    for _ in range(3):
        before = (tmp_path / "killed" / LAST).stat().st_mtime_ns if (tmp_path / "killed" / LAST).exists() else 0
        process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            path = tmp_path / "killed" / LAST
            if path.exists() and path.stat().st_mtime_ns != before:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    assert kills > 0
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    assert load_file(tmp_path / "whole" / BEST).keys() == load_file(tmp_path / "killed" / BEST).keys()
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "killed")]
    without_time = [[line.rsplit(",", 1)[0] for line in lines] for lines in rows]  # the last column is seconds
    assert without_time[0] == without_time[1]


def test_loader_workers_do_not_change_the_result(tiny_run: Path, tmp_path: Path) -> None:
    train(recipe(tiny_run), str(tmp_path / "none"))
    train(recipe(tiny_run, "workers=2"), str(tmp_path / "two"))
    assert_equal_runs(tmp_path / "none", tmp_path / "two")


def test_student_loads_into_timm_with_the_documented_line(tiny_run: Path, tmp_path: Path) -> None:
    run = train(recipe(tiny_run, "epochs=1"), str(tmp_path / "student"))
    model = timm.create_model(STUDENT, num_classes=CLASSES, checkpoint_path=str(tmp_path / "student" / BEST)).eval()
    images = torch.rand(2, 3, SIDE, SIDE)
    info = run.info()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (info.mean, info.std))
    torch.testing.assert_close(model((images - mean) / std), run.load_student()(images))


def test_best_checkpoint_is_chosen_by_validation(tiny_run: Path, tmp_path: Path) -> None:
    validation = write_image_set(tmp_path / "val")
    train(recipe(tiny_run, f"validation={validation}"), str(tmp_path / "student"))
    header = (tmp_path / "student" / "metrics.csv").read_text().splitlines()[0]
    assert "val_top1" in header


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_damaged_shards_stop_training_by_name(tmp_path: Path, harm: str) -> None:
    run = write_run(tmp_path / "run")
    tar = run / "dad" / "dad-000001.tar"
    data = bytearray(tar.read_bytes())
    if harm == "flip":
        data[700] ^= 1
        tar.write_bytes(data)
    elif harm == "truncate":
        tar.write_bytes(data[: len(data) // 1024 * 512])
    else:
        tar.unlink()
    with pytest.raises(UserError, match=r"dad-000001\.tar"):
        train(recipe(run), str(tmp_path / "student"))
    # The same without the check at the start: the read itself finds out.
    with pytest.raises(UserError, match=r"dad-000001\.tar"):
        train(recipe(run, "check_shards=false"), str(tmp_path / "student"))


def test_another_recipe_or_class_list_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    train(recipe(tiny_run, "epochs=1"), str(tmp_path / "student"))
    with pytest.raises(UserError, match=r"method\.temperature was 4\.0, now 2\.0"):
        train(recipe(tiny_run, "epochs=1", "method.temperature=2"), str(tmp_path / "student"))
    kept = tmp_path / "student" / STUDENT_INFO
    with_more = json.loads(kept.read_text())
    with_more["identity"]["method.margin"] = 0.1  # as a later version may have
    kept.write_text(json.dumps(with_more))
    with pytest.raises(UserError, match=r"method\.margin was 0\.1, now None"):
        train(recipe(tiny_run, "epochs=1"), str(tmp_path / "student"))
    other = write_run(tmp_path / "other", classes=7)
    with pytest.raises(UserError, match="another class list"):
        train(recipe(other, "epochs=1"), str(tmp_path / "student"))


def test_unknown_student_gets_near_names(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'resnet18'"):
        train(recipe(tiny_run, "student=resnet_18"), str(tmp_path / "student"))


def test_label_outside_the_class_list_is_named(tiny_run: Path, tmp_path: Path) -> None:
    validation = write_image_set(tmp_path / "val", classes=9)
    with pytest.raises(UserError, match=r"label 5 is outside the class list \(0 to 4\)"):
        train(recipe(tiny_run, f"validation={validation}"), str(tmp_path / "student"))


def test_validation_set_of_another_class_list_is_refused_before_the_first_step(tiny_run: Path, tmp_path: Path) -> None:
    validation = write_image_set(tmp_path / "sets" / "val")
    (tmp_path / "sets" / "classes.json").write_text('["some", "other", "names"]')
    with pytest.raises(
        UserError, match=r"^validation: .*/val: is of another class list .*; set another, or validation=null"
    ):
        train(recipe(tiny_run, f"validation={validation}"), str(tmp_path / "student"))
    with pytest.raises(
        UserError, match=r"^validation: .*/nowhere: no such file or folder; .*; set another, or validation=null"
    ):
        train(recipe(tiny_run, f"validation={tmp_path / 'nowhere'}"), str(tmp_path / "student"))


def interrupted(_run: Training) -> None:
    raise InterruptedError


def test_a_run_says_what_it_cost(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """6 steps of 8 clean and 5 or 6 DAD images: 1.69 times plain training; two epochs see 162 images."""
    train(recipe(tiny_run), str(tmp_path / "student"))
    told = capsys.readouterr().out
    assert "8 clean + 5.5 dad images a step, 1.69 times the passes of plain training" in told
    assert "what it cost: 162 images, 1.69 times the passes of plain training" in told and "images/s" in told
    assert (tmp_path / "student" / "metrics.csv").read_text().splitlines()[-1].split(",")[-2] == "162"


def test_more_parts_than_samples_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accumulate: 6 parts"):
        train(recipe(tiny_run, "accumulate=6"), str(tmp_path / "student"))


def test_the_cost_counts_validation(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(recipe(tiny_run, f"validation={write_image_set(tmp_path / 'val')}"), str(tmp_path / "student"))
    assert "minutes of validation" in capsys.readouterr().out
    state = run.load_last()
    assert state is not None and state["progress"]["validated"] > 0
