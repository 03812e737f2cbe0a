"""The project's own recipes load, their students exist, their settings train, and they say what to expect."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from manifests import RunDir, UserError
from trainer import recipe
from trainer.loop import train
from trainer.options import choose
from trainer.recipe import FOLDER, load

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_the_students_of_the_paper_are_there() -> None:
    assert {"demo", "resnet34", "resnet50", "vit_base", "vit_base_in21k", "vit_small"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_names_a_student_and_a_tag_that_timm_knows(name: str) -> None:
    recipe = load(name)
    assert timm.is_model(recipe.student)
    assert recipe.pretrained is None or f"{recipe.student}.{recipe.pretrained}" in timm.list_pretrained()


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_with_its_own_settings(name: str, tiny_run: Path, tmp_path: Path) -> None:
    """Everything as written, but for what needs a large machine: student, data, batch. It learns, and the best
    weights are the averaged ones where the recipe averages."""
    student = "test_vit" if "vit" in name else "test_resnet"
    small = [
        f"shards={tiny_run}",
        f"student={student}",
        "pretrained=null",
        "epochs=2",
        "batch=8",
        "accumulate=2",
        "workers=0",
    ]
    run = train(
        load(name, [*small, "optimizer.warmup=0.5", "validation=null", "precision=fp32", "threads=1"]),
        str(tmp_path / "student"),
    )
    state, best = run.load_last(), run.load_student().state_dict()
    assert state is not None
    first, second = (row["loss"] for row in state["progress"]["rows"])
    assert second < first
    kept = state["average" if load(name).ema else "student"]
    assert best.keys() == kept.keys() and all(torch.equal(best[key], value) for key, value in kept.items())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "demo"])
def test_header_says_command_hardware_time_and_the_papers_number(name: str) -> None:
    header = "\n".join(line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#"))
    assert f"make train RECIPE={name} " in header
    for word in ("Hardware:", "hours", "estimate, not a measurement", "GFLOP", "The paper's numbers"):
        assert word in header, word


@pytest.mark.parametrize(
    ("named", "student", "chosen"),
    [
        (None, "resnet50", ("resnet50", None)),
        (None, "vit_base", ("vit_base", None)),
        (None, "vit_base_in21k", ("vit_base_in21k", None)),
        (None, "vit_base_patch16_224", ("vit_base", None)),
        (None, "vit_small_patch16_224", ("vit_small", None)),
        ("vit_small", "convnext_tiny", ("vit_small", "convnext_tiny")),
        ("resnet50", "vit_small", ("resnet50", "vit_small_patch16_224")),
        ("mine.yaml", None, ("mine.yaml", None)),
    ],
)
def test_a_student_finds_its_recipe(
    tiny_run: Path, named: str | None, student: str | None, chosen: tuple[str, str | None]
) -> None:
    assert choose(named, student, str(tiny_run)) == chosen


def test_the_demos_shards_are_learned_from_as_in_the_demo(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At their place, and elsewhere."""
    assert choose(None, "resnet50", None) == choose(None, "resnet50", "data/demo/") == ("demo", "resnet50")
    assert choose(None, "vit_base", "data/demo") == ("demo", "vit_base_patch16_224")
    with pytest.raises(
        UserError,
        match=r"--recipe: resnet18 has no recipe for .*; name one to take settings from: demo, resnet34, ",
    ):
        choose(None, "resnet18", str(tiny_run))
    demo = replace(load("demo"), validation=str(tmp_path / "val"))
    (tmp_path / "classes.json").write_text(json.dumps(RunDir(tiny_run).info().classes))
    monkeypatch.setattr(recipe, "load", lambda name: demo if name == "demo" else load(name))
    assert choose(None, "resnet18", str(tiny_run)) == ("demo", "resnet18")
    with pytest.raises(UserError, match="no run directory here"):
        choose(None, "resnet18", str(tmp_path / "nowhere"))


def test_make_leaves_the_choice_to_the_command() -> None:
    """`make train STUDENT=vit_base SHARDS=…`: one place decides on the student's name and its recipe."""
    for given, words in {
        "STUDENT=vit_base SHARDS=/data/dad": "--student vit_base --shards /data/dad",
        "STUDENT=resnet50": "--student resnet50",
        "RECIPE=resnet50 OUT=/data/dad": "--recipe resnet50 --shards /data/dad",
        "STUDENT=resnet18 SEED=3": "--student resnet18 --seed 3",
        "STUDENT=resnet18 'SHARDS=my shards'": "--student resnet18 --shards 'my shards'",
    }.items():
        planned = subprocess.run(
            ["make", "-n", "train", *shlex.split(given)],
            cwd=FOLDER.parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        (line,) = [line for line in planned.stdout.splitlines() if "trainer train" in line]
        assert shlex.split(line.partition("trainer train")[2]) == shlex.split(words)
