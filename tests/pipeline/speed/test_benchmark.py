"""The benchmark of stage 1 runs anywhere and prints every figure; its reference is the official algorithm."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pipeline.job.models import Models
from pipeline.speed.benchmark import made_up_piece, main
from pipeline.speed.reference import reference_batch
from shards import decode_image
from shards.sources.classes import load_classes


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["recipe", "random"])
def test_every_figure(world, weights: str) -> None:  # type: ignore[no-untyped-def]
    """With the recipe's files and without any: images/s (bare, whole, official loop), TFLOP/s, shares, agreement."""
    options = ["--recipe", str(world.recipe), "--weights", weights, "--images", "8", "--repeats", "1", "--agreement"]
    told = CliRunner().invoke(main, [*options, "--set", "batch=4"])
    assert told.exit_code == 0, told.output
    number = r"\s*[\d,]+\.\d+"
    for pattern in (
        rf"bare model calls:{number} images/s",
        rf"whole job:{number} images/s ={number} of the bare calls",
        rf"{number} TFLOP/s ={number} of this device's matrix rate",
        rf"matrix rate:{number} TFLOP/s \(fp32\);{number} GFLOP an image",
        rf"official loop:{number} images/s; the whole job is{number} times as fast",
        rf"Q, 2 times\s+{number} ms an image",
        rf"teacher forward, 3 times\s+{number} ms an image",
        rf"teacher gradient, 1 times\s+{number} ms an image",
        rf"on CPU threads: canvas, codec, noise{number} ms an image",
        rf"on CPU threads: codec of x''\s+{number} ms an image",
        rf"bf16 and fp32 agree on{number}% of 8 verdicts, and on{number}% of the codes",
    ):
        assert re.search(pattern, told.output), pattern


def test_made_up_images(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Photographs' size, keys of their own though files repeat, the same every time."""
    classes = load_classes(world.clip / "prompts.yaml")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (list(made_up_piece(tmp_path / name, 3, 7).samples(classes)) for name in ("a", "b"))
    assert [sample.data for sample in first] == [sample.data for sample in second]
    assert len({sample.key for sample in first}) == 7 and len({sample.data for sample in first}) == 3
    assert all(100_000 < len(sample.data) < 120_000 for sample in first)


def test_the_reference_loop_makes_the_same_images(
    world, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """Without the random start it is the method in another order of operations: the same images, written as files."""
    from pipeline.method.attack import AttackSettings, attack

    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2])
    monkeypatch.setattr(torch, "rand", lambda *size: torch.ones(()))  # no random start
    reference_batch(x, y, models.teacher_model, models.discretizer_model, tmp_path)
    settings = AttackSettings(eps=0.1, alpha=0.1, steps=1, random_start=0)
    expected = attack(x, y, models.teacher, models.discretizer, settings, torch.zeros_like(x)).adversarial
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    for path, image in zip(files, expected, strict=True):
        close = (decode_image(path.read_bytes()).float() / 255 - image).abs() < 1.5 / 255
        assert close.float().mean() > 0.99  # a code that is nearly tied may fall the other way
