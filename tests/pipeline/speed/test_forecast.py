"""``plan``: a run then takes what the forecast says; missing things come with a fix; nothing is written."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from manifests import RunDir
from manifests.devices import use_bf16
from pipeline.job.models import Models
from pipeline.job.shard import run_shard
from pipeline.speed import batch_size
from pipeline.speed.batch_size import ON_CPU, resolve_batch
from pipeline.speed.measure import TrialBatch, count_flops, covered, model_parts
from shards.sources import find_source
from shards.sources.classes import load_classes


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def line(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).strip()


def number(text: str) -> float:
    """``8,237 kB`` -> 8237000."""
    value, unit = re.fullmatch(r"([\d,.]+) (B|kB|MB)", text).groups()  # type: ignore[union-attr]
    return float(value.replace(",", "")) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("output.codes=false", "views.count=3"),
        ("output.clean_images=false", "views.topk=2"),
        ("output.image.format=png",),
    ],
)
def test_bytes_are_what_a_run_takes(world, models: Models, cli, tmp_path: Path, options: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    """Within 15 % of a real run of the same recipe, scaled from the samples that were stored to all."""
    from pipeline.generate import make_shards

    out, recipe = tmp_path / "run", world.load(*options)
    sets = [part for option in options for part in ("--set", option)]
    said = line(cli("plan", "--recipe", world.recipe, "--out", out, *sets).out, "output")
    clean, dad = re.match(r"clean (.+?), DAD up to (.+?) \(", said).groups()  # type: ignore[union-attr]
    make_shards(recipe, str(out))
    rows = RunDir(out).manifest()[0].to_pylist()
    for forecast, stream in ((clean, "clean"), (dad, "dad")):
        sizes = [row[f"{stream}_size"] for row in rows if row[f"{stream}_size"] is not None]
        assert number(forecast) == pytest.approx(36 * sum(sizes) / len(sizes), rel=0.15), stream


def test_right_numbers(world, models: Models, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Images, shards, classes, and the work of every part as torch's counter measures it; nothing is written."""
    recipe = world.load()
    before = snapshot(world.folder), snapshot(tmp_path)
    told = cli("plan", "--recipe", world.recipe, "--out", tmp_path / "run", "--set", "max_errors=0.1")
    assert (snapshot(world.folder), snapshot(tmp_path)) == before
    # one image of the world is broken, and plan decodes the first 32
    assert (
        told.status == 2
        and "source.data: 1 of the first 32 samples cannot be used" in told.out
        and "img_017" in told.out
    )
    assert line(told.out, "classes").startswith("5 (") and line(told.out, "source").startswith(
        "36 images in 3 shards (WebDataset"
    )
    x = torch.rand(1, 3, 32, 32)
    with FlopCounterMode(display=False) as q, torch.no_grad():
        models.discretizer_model(x)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        models.teacher_model(x)
    work = line(told.out, "work")
    total, parts = work.split(" GFLOP an image: ")
    assert (
        f"Q x2 {2 * q.get_total_flops() / 1e9:,.1f}" in parts
        and "teacher forward x3" in parts
        and "teacher gradient x1" in parts
    )
    counted = {
        part.name: count_flops(part.call)
        for part in model_parts(TrialBatch.of((255 * x).byte(), recipe, models), recipe, models)
    }
    assert counted["Q"] == q.get_total_flops() and counted["teacher forward"] == forward.get_total_flops()
    assert float(total) == pytest.approx(
        (2 * counted["Q"] + 3 * counted["teacher forward"] + counted["teacher gradient"]) / 1e9, abs=0.06
    )
    speed = float(line(told.out, "speed").split(" images/s")[0].replace(",", ""))
    hours, minutes, seconds = map(int, line(told.out, "time").split(" for ")[0].split(":"))
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(36 / speed, abs=0.6)


@pytest.mark.parametrize(
    "options", [(), ("views.count=3",), ("output.attacked_loss=false", "attack.steps=3"), ("attack.steps=0",)]
)
def test_the_job_makes_the_calls_that_are_counted(
    world, models: Models, tmp_path: Path, options: tuple[str, ...]
) -> None:  # type: ignore[no-untyped-def]
    """Calls of each model in a real shard, counted in images per image of the shard, are those of `model_parts`."""
    recipe, classes = world.load(*options), load_classes(world.clip / "prompts.yaml")
    seen = {"teacher": 0, "Q": 0}
    hooks = [
        model.register_forward_hook(
            lambda _module, inputs, _out, name=name: seen.update({name: seen[name] + len(inputs[0])})
        )
        for name, model in (("teacher", models.teacher_model), ("Q", models.discretizer_model))
    ]
    piece = find_source(str(world.tars), classes, 12).pieces[0]
    rows = run_shard(0, piece, recipe, classes, models, RunDir(tmp_path), "run", lambda new: None)
    for hook in hooks:
        hook.remove()
    times = {
        part.name: part.times
        for part in model_parts(TrialBatch.of(torch.zeros(1, 3, 32, 32).byte(), recipe, models), recipe, models)
    }
    assert seen == {
        "teacher": len(rows) * (times["teacher forward"] + times["teacher gradient"]),
        "Q": len(rows) * times["Q"],
    }


def test_flops_by_hand() -> None:
    """A multiply-add is two operations: a convolution and a linear layer, counted by hand."""
    conv, linear = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Linear(8, 5, bias=False)
    x = torch.rand(2, 3, 16, 16)
    expected = 2 * 2 * (16 * 16 * 8 * 3 * 9) + 2 * 2 * (8 * 5)
    assert count_flops(lambda: linear(conv(x).mean((2, 3)))) == expected


def test_ready(world, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """With nothing in the way: status 0, and what to do next; over an existing run it says that one is there."""
    good = [world.images / "n09", world.images / "n01"]
    for folder in good:
        (tmp_path / "images" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:2]:
            if "017" not in path.name:
                (tmp_path / "images" / folder.name / path.name).write_bytes(path.read_bytes())
    told = cli("plan", "--recipe", world.recipe, "--data", tmp_path / "images", "--out", tmp_path / "run")
    assert (
        told.status == 0 and told.out.splitlines()[-1].startswith("ready: `make shards`") and "MISSING" not in told.out
    )
    cli("generate", "--recipe", world.recipe, "--data", tmp_path / "images", "--out", tmp_path / "run")
    before = snapshot(tmp_path)
    told = cli("plan", "--recipe", world.recipe, "--data", tmp_path / "images", "--out", tmp_path / "run")
    assert told.status == 0 and "a run is there already" in told.out and snapshot(tmp_path) == before


def test_everything_missing_is_listed_at_once(world, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Teacher, discretizer and source missing: one line each with its fix, speed of random weights, status 2."""
    tree = yaml.safe_load(world.recipe.read_text())
    tree["teacher"] = {"kind": "timm", "model": "test_vit", "weights": "gone/teacher.pth"}
    tree["discretizer"]["weights"] = "gone/vqgan.safetensors"
    tree["source"]["data"] = "gone/images"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    before = snapshot(tmp_path)
    told = cli("plan", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert told.status == 2 and told.err.splitlines()[-1] == "error: not ready: 3 things are missing (see above)"
    missing = [text for text in told.out.splitlines() if text.startswith("MISSING")]
    for field, fix in (
        ("source.data: gone/images", "set DATA="),
        ("discretizer.weights: gone/vqgan.safetensors", "--set discretizer.weights=PATH"),
        ("teacher.weights: gone/teacher.pth", "--set teacher.weights=PATH"),
    ):
        assert any(field in text and fix in text for text in missing), field
    assert "random weights stand in for what is missing" in line(told.out, "speed") and snapshot(tmp_path) == before
    told = cli("plan", "--recipe", tmp_path / "recipe.yaml", "--set", "source.classes=gone.yaml")
    assert told.status == 2 and "MISSING     source.classes: gone.yaml: no such file" in told.out


def test_batch(world, models: Models, finished_run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A recipe's batch stays; 0 becomes the size found here, or that of the existing run, as it decides last bits."""
    recipe, automatic = world.load(), world.load("batch=0")
    assert resolve_batch(recipe, RunDir(finished_run), models) is recipe
    assert resolve_batch(automatic, RunDir(tmp_path / "new"), models) == replace(automatic, batch=ON_CPU)
    assert resolve_batch(automatic, RunDir(finished_run), models).batch == 5
    assert not (tmp_path / "new").exists()


def test_precision(world, cli, finished_run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """`auto` is forecast in the format that a run would use: the device's, or that of the existing run."""
    here = "bf16" if use_bf16("auto", torch.device("cpu")) else "fp32"
    for out, expected in ((tmp_path / "new", here), (finished_run, "fp32")):
        answer = cli("plan", "--recipe", world.recipe, "--out", out, "--set", "precision=auto")
        assert line(answer.out, "speed").endswith(f", batch 5, {expected}")


def test_the_search_for_a_batch_compiles_nothing(world, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Graphs compiled by the search would also serve the run, and a resumed process, without them, give other bits."""

    def compiled(images: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"asked to compile for {len(images)} images")

    monkeypatch.setattr(batch_size, "LARGEST", 4)
    assert batch_size.smallest_that_pays(world.load("batch=0"), replace(models, compiled=(compiled, compiled))) in (
        1,
        2,
        4,
    )


def test_covered() -> None:
    """The length of a union: gaps do not count, overlaps count once, an interval inside another not at all."""
    assert covered([]) == 0
    assert covered([(0, 2), (1, 3), (5, 6)]) == 4
    assert covered([(0, 10), (1, 2), (3, 4), (9, 12)]) == 12
