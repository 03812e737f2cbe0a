"""``convert-vqgan``: a published checkpoint becomes a safetensors file that loads as the discretizer."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.method.discretizer import load_discretizer
from tests.manifests.files.test_archive import Trap, lightning


def test_from_the_command_line(world, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """CompVis' layout with callbacks, hyper-parameters, loss.* and a trap loads the same as it is and converted."""
    weights = load_file(world.vqgan)
    loss = {"loss.discriminator.main.0.weight": torch.zeros(2, 3), "loss.logvar": torch.zeros(())}
    source, out = (
        lightning(tmp_path / "last.ckpt", weights | loss, hook=Trap(tmp_path / "pwned", "call")),
        tmp_path / "vqgan.safetensors",
    )
    config = world.load().discretizer.config
    load_discretizer(config, str(source))
    told = cli("convert-vqgan", source, out)
    assert told.status == 0 and f"{len(weights)} tensors" in told.out and not (tmp_path / "pwned").exists()
    assert load_file(out).keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(out).items())
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images, codes = load_discretizer(config, str(out))(pictures)
        expected = load_discretizer(config, str(world.vqgan))(pictures)
    assert torch.equal(images, expected[0]) and torch.equal(codes, expected[1])
    before = out.read_bytes()
    assert cli("convert-vqgan", source, out).status == 0 and out.read_bytes() == before


def test_what_cannot_be_converted(world, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """No file, no archive, no VQGAN, an output of another kind: one line each, and nothing is written."""
    source = lightning(tmp_path / "other.ckpt", {"model.weight": torch.ones(2)})
    (tmp_path / "page.ckpt").write_text("<html>404")
    out = tmp_path / "out.safetensors"
    for name, target, message in (
        ("other.ckpt", out, "other.ckpt: holds no VQGAN (no quantize.embedding.weight among its 1 tensors)"),
        ("page.ckpt", out, "page.ckpt: not a readable checkpoint"),
        ("missing.ckpt", out, "missing.ckpt"),
        ("other.ckpt", tmp_path / "out.ckpt", "out.ckpt: name the output OUT.safetensors"),
    ):
        assert message in cli("convert-vqgan", tmp_path / name, target).error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.ckpt", "page.ckpt"] and source.exists()
