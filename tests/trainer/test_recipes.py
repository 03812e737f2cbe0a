"""The recipes that come with the project: they load, their students exist, their settings train, and they say what to expect."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from trainer.loop import train
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
    small = [f"shards={tiny_run}", f"student={student}", "pretrained=null", "epochs=2", "batch=8", "accumulate=2", "workers=0"]
    run = train(load(name, [*small, "optimizer.warmup=0.5", "validation=null", "precision=fp32", "threads=1"]), str(tmp_path / "student"))
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
