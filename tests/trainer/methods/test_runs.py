"""Every method, by name alone: it trains, is stopped in mid-epoch, resumes to the bit, is exported, and has its row.

The run has a real tiny CLIP and a real tiny VQGAN, which methods that need them load from where run.json says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manifests import RunDir, UserError
from shards import Batch
from shards.codec import decode_array
from shards.views import ViewSettings, soft_label_members
from trainer.export import CARD, export
from trainer.loop import Hooks, train
from trainer.methods import METHODS, NAMES, Method, rank_of, title_of
from trainer.methods.parts.frozen import load_frozen
from trainer.recipe import Recipe, load
from trainer.run import Training, open_reader
from trainer.tables.compare import compare
from trainer.tables.methods import methods_table

from ...world import World
from ..conftest import CLASSES, SIDE, write_image_set

CPU = torch.device("cpu")


def recipe(run: Path, name: str, *overrides: str) -> Recipe:
    base = [f"shards={run}", "student=test_resnet", f"method.name={name}", "epochs=2", "batch=10", "validation=null"]
    return load("demo", [*base, "precision=fp32", "threads=1", "device=cpu", "checkpoint_minutes=0", *overrides])


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """A checkpoint's values by their path; times are left out."""
    if isinstance(state, dict):
        return {name: leaf for key, value in state.items() for name, leaf in flat(value, f"{prefix}/{key}").items()}
    return {} if prefix.endswith(("/seconds", "/waited", "/validated", "/rows")) else {prefix: state}


@pytest.mark.parametrize("kind", METHODS, ids=NAMES)
def test_a_method_trains_resumes_and_is_published(
    kind: type[Method], finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs at once, or stopped before the fifth of six steps: the same weights, averages and optimizer."""
    name = kind().name
    settings = recipe(finished_run, name)
    steps: list[int] = []

    def stop(run: Training, _batch: Batch) -> None:
        steps.append(run.steps_done)
        if len(steps) == 5:
            raise InterruptedError

    whole = train(settings, str(tmp_path / "whole"))
    with pytest.raises(InterruptedError):
        train(settings, str(tmp_path / "students" / "stopped"), Hooks(before_step=stop))
    stopped = train(settings, str(tmp_path / "students" / "stopped"), Hooks(before_step=stop))
    assert steps == [0, 1, 2, 3, 4, 4, 5]  # of two epochs of three
    left, right = (flat(run.load_last()) for run in (whole, stopped))
    assert left.keys() == right.keys()
    for path, value in left.items():
        assert torch.equal(value, right[path]) if isinstance(value, torch.Tensor) else value == right[path], path

    export(stopped, str(tmp_path / "out"))
    card = (tmp_path / "out" / CARD).read_text()
    assert f"# test_resnet, {title_of(name)}\n" in card and f"method.name: {name}\n" in card
    write_image_set(tmp_path / "data" / "val")
    compare([str(tmp_path / "students")], str(tmp_path / "data"), str(tmp_path / "reports"))
    assert f"| test_resnet {name} | 1 |" in (tmp_path / "reports" / "report.md").read_text()
    assert f"test_resnet {name}, 2 epochs of 3 steps" in capsys.readouterr().out


def test_the_list_of_methods_has_a_row_for_each() -> None:
    lines = methods_table().splitlines()
    for name, line in zip(NAMES, lines[1:], strict=False):
        assert line.startswith(f"{name} ") and title_of(name) in line
    assert [rank_of(name) for name in NAMES] == list(range(len(NAMES))) and rank_of("of later") == len(NAMES)


def test_where_models_lie_is_for_a_recipe_to_say(finished_run: Path, world: World) -> None:
    """`models` is laid over run.json field by field, for teacher and discretizer alike."""
    info, x = RunDir(finished_run).info(), torch.rand(3, 3, SIDE, SIDE)
    moved = {
        **info.recipe,
        "teacher": info.recipe["teacher"] | {"model": "local-dir:/nowhere"},
        "discretizer": info.recipe["discretizer"] | {"weights": "/nowhere.safetensors"},
    }
    elsewhere = replace(info, recipe=moved)
    over = {"teacher": {"model": f"local-dir:{world.clip}"}, "discretizer": {"weights": str(world.vqgan)}}
    names = ("teacher", "discretizer")
    here, there = load_frozen(info, names, CPU), load_frozen(elsewhere, names, CPU, over)
    assert torch.equal(here["teacher"](x), there["teacher"](x))
    assert torch.equal(here["discretizer"](x)[0], there["discretizer"](x)[0])
    for name in names:
        with pytest.raises(UserError, match=rf"nowhere.*--set models\.{name}\.") as caught:
            load_frozen(elsewhere, [name], CPU)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "override", "field"),
    [
        ("kd_live", "models.teacher.model=local-dir:/nowhere", r"models\.teacher\."),
        ("dat", "models.discretizer.weights=/nowhere.safetensors", r"models\.discretizer\."),
    ],
)
def test_models_that_are_missing_are_told_before_anything_is_spent(
    finished_run: Path, tmp_path: Path, name: str, override: str, field: str
) -> None:
    """One line; no directory, no step. Methods that ask no model do not look for it."""
    with pytest.raises(UserError, match=f"nowhere.*{field}") as caught:
        train(recipe(finished_run, name, override), str(tmp_path / "student"))
    assert "\n" not in str(caught.value) and not (tmp_path / "student").exists()
    train(recipe(finished_run, "plain", override, "epochs=1"), str(tmp_path / "student"))


def test_a_misspelt_field_of_a_model_is_refused(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"modl.*did you mean 'model'\?"):
        train(recipe(finished_run, "kd_live", "models.teacher.modl=x"), str(tmp_path / "student"))
    assert not (tmp_path / "student").exists()


def test_too_few_clean_images_for_a_method_are_told_at_once(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^batch: 8: fast_advprop needs 10 clean images at a time, and gets 8; .* 10 or"
    ):
        train(recipe(tiny_run, "fast_advprop", "batch=8"), str(tmp_path / "student"))
    assert not (tmp_path / "student").exists()


def test_shortened_soft_labels_serve_every_method_that_can_use_them(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """A method without a temperature takes the stored one; RSLAD needs 1, which this run does not hold."""
    settings = ViewSettings(topk=2, temperatures=(4.0,))

    def shortened(_stream: str, _key: str, members: dict[str, bytes]) -> dict[str, bytes]:
        logits = decode_array(members.pop("logits.npy"), np.float16, "logits")
        return members | soft_label_members(logits[None], None, settings)

    run = make_run(tmp_path / "run", edit=shortened)
    for name in NAMES:
        reader = open_reader(recipe(run, name))
        if name == "rslad":
            with pytest.raises(
                UserError, match=r"for temperature 4 only, not 1; set method.temperature to it, or make"
            ):
                next(iter(reader.batches(0)))
        else:
            assert next(iter(reader.batches(0)))["clean"].logits.shape == (10, CLASSES)


def test_an_input_that_the_discretizer_cannot_return_is_refused(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^input: 31: the run's discretizer makes \d+ pixels of it; set input=\d+$"):
        train(recipe(finished_run, "dat", "input=31"), str(tmp_path / "student"))
