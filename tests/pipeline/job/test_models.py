"""Loading both models as a recipe says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manifests import RunDir, UserError
from manifests.devices import use_bf16
from pipeline.generate import make_shards, prepare_job
from pipeline.job.models import fingerprints, load_models, resolve_precision
from shards.sources.classes import load_classes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["canvas=33"], r"canvas: 33 is not a multiple of the VQGAN's 2 pixels per code"),
        (["device=toaster"], r"device: 'toaster'"),
        (["device=cuda:99"], r"device: 'cuda:99'"),
        (["discretizer.weights=gone.pt"], r"discretizer\.weights: gone\.pt"),
        (["teacher.model=local-dir:gone"], r"teacher\.model: gone"),
    ],
)
def test_refusals_name_the_field(world, overrides: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message) as caught:
        load_models(world.load(*overrides), load_classes(world.clip / "prompts.yaml"))
    assert "\n" not in str(caught.value)


def test_precision(world, models) -> None:  # type: ignore[no-untyped-def]
    """bf16 changes the numbers a little and nothing else: images and logits come out as float32, images in [0, 1]."""
    low = load_models(world.load("precision=bf16"), load_classes(world.clip / "prompts.yaml"))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, (discrete, codes) = low.teacher(images), low.discretizer(images)
        full = models.teacher(images)
    assert logits.dtype == discrete.dtype == torch.float32 and codes.shape == (2, 16, 16)
    assert discrete.min() >= 0 and discrete.max() <= 1
    assert 0 < (logits - full).abs().max() < 0.1 * full.abs().max()


def test_precision_auto_is_settled_when_the_run_begins(
    world, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    """`auto` becomes the device's format, in recipe and identity; a run that began with the other format keeps it."""
    here, other = ("bf16", "fp32") if use_bf16("auto", torch.device("cpu")) else ("fp32", "bf16")
    out = tmp_path / "run"
    make_shards(world.load("precision=auto"), str(out))
    info = RunDir(out).info()
    assert info.recipe["precision"] == info.identity["precision"] == here
    assert "bf16 in hardware" not in capsys.readouterr().err
    same = prepare_job(world.load(f"precision={here}"), str(out))
    same.out.begin(same.info)
    with pytest.raises(UserError, match=f"precision was '{here}', now '{other}'"):
        job = prepare_job(world.load(f"precision={other}"), str(out))
        job.out.begin(job.info)
    old = prepare_job(world.load(f"precision={other}"), str(tmp_path / "old"))
    old.out.begin(old.info)
    resumed = prepare_job(world.load("precision=auto"), str(tmp_path / "old"))
    resumed.out.begin(resumed.info)
    assert resumed.recipe.precision == other and resumed.models is not None
    assert resumed.models.bf16 == (other == "bf16") and resumed.info.fingerprint == old.info.fingerprint


def test_precision_auto_needs_the_device(world, finished_run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Workers elsewhere may have other hardware: a new run is refused with the fix, an existing run says its format."""
    recipe = world.load("precision=auto")
    with pytest.raises(UserError, match=r"precision: auto depends on the device, .*; set it to bf16 or fp32"):
        resolve_precision(recipe, RunDir(tmp_path / "new"), None)
    assert resolve_precision(recipe, RunDir(finished_run), None).precision == "fp32"
    explicit = world.load("precision=bf16")
    assert resolve_precision(explicit, RunDir(finished_run), None) is explicit


def test_fingerprints_tell_the_models_apart(world, models) -> None:  # type: ignore[no-untyped-def]
    """They are those of the weights, whether the models are in use or only read for them."""
    classes = load_classes(world.clip / "prompts.yaml")
    prints = fingerprints(world.load(), classes, models)
    assert set(prints) == {"teacher", "discretizer"} and len(set(prints.values())) == 2
    assert fingerprints(world.load(), classes) == prints
