"""Loading both models as a recipe says."""

from __future__ import annotations

import pytest
import torch

from manifests import UserError
from pipeline.job.models import fingerprints, load_models
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


def test_fingerprints_tell_the_models_apart(world, models) -> None:  # type: ignore[no-untyped-def]
    """They are those of the weights, whether the models are in use or only read for them."""
    classes = load_classes(world.clip / "prompts.yaml")
    prints = fingerprints(world.load(), classes, models)
    assert set(prints) == {"teacher", "discretizer"} and len(set(prints.values())) == 2
    assert fingerprints(world.load(), classes) == prints
