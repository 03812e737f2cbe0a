"""The discretizer against brute force and against taming's own modules; checkpoints that may come from anywhere."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manifests import UserError
from pipeline import discretizer
from pipeline.discretizer import VQGAN, VQGANConfig, load_discretizer, nearest_code


@pytest.fixture(scope="module")
def config(world) -> VQGANConfig:  # type: ignore[no-untyped-def]
    shape: VQGANConfig = world.load().discretizer.config
    return shape


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunk", [1, 7, 100, 8192])
def test_nearest_code_is_the_argmin(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of the smallest Euclidean distance, computed the obvious way, whatever the chunk."""
    monkeypatch.setattr(discretizer, "NEAREST_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    tokens, codebook = torch.randn(100, 4, generator=generator), torch.randn(64, 4, generator=generator)
    distances = (tokens.double()[:, None] - codebook.double()[None]).square().sum(-1)
    assert torch.equal(nearest_code(tokens, codebook), distances.argmin(1))


def test_nearest_code_is_exact_under_autocast() -> None:
    """Codebook entries closer together than bf16 can tell are still told apart."""
    codebook = torch.tensor([[1.0, 0.0], [1.001, 0.0], [1.002, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_code(codebook + 0.0002, codebook).tolist() == [0, 1, 2]


def test_equals_taming(world, config: VQGANConfig, pictures: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """Q is 2x - 1, Encoder, quant_conv, VectorQuantizer, post_quant_conv, Decoder, (x + 1) / 2, clamp: composed of taming's own modules."""
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import VectorQuantizer

    shape: dict[str, Any] = {
        "ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [16], "in_channels": 3, "resolution": 32,
        "z_channels": 4, "double_z": False,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        encoder, decoder = Encoder(**shape), Decoder(**shape)
    quantizer = VectorQuantizer(64, 3, beta=0.25)
    before, after = torch.nn.Conv2d(4, 3, 1), torch.nn.Conv2d(3, 4, 1)
    weights = load_file(world.vqgan)
    modules = {"encoder": encoder, "decoder": decoder, "quantize": quantizer, "quant_conv": before, "post_quant_conv": after}
    for name, module in modules.items():
        module.load_state_dict({key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")})
        module.eval()
    with torch.no_grad():
        quantized, _, (_, _, indices) = quantizer(before(encoder(2 * pictures - 1)))
        expected = ((decoder(after(quantized)) + 1) / 2).clamp(0, 1)
        images, codes = load_discretizer(config, str(world.vqgan))(pictures)
    assert torch.equal(codes, indices.view(3, 16, 16)) and len(codes.unique()) > 20
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-4)
    assert images.min() >= 0 and images.max() <= 1


def test_published_layouts_load_alike(world, config: VQGANConfig, pictures: torch.Tensor, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A torch checkpoint, with ``state_dict`` and a discriminator below ``loss.``, is the same discretizer as the safetensors file."""
    weights = load_file(world.vqgan)
    extra = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": weights | extra, "epoch": 3}, tmp_path / "last.ckpt")
    torch.save(weights, tmp_path / "bare.pt")
    save_file(weights | extra, tmp_path / "loss.safetensors")
    with torch.no_grad():
        expected = load_discretizer(config, str(world.vqgan))(pictures)[0]
        for name in ("last.ckpt", "bare.pt", "loss.safetensors"):
            assert torch.equal(load_discretizer(config, str(tmp_path / name))(pictures)[0], expected)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_pickled_code_is_refused_and_not_run(world, config: VQGANConfig, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A checkpoint that carries an object besides its tensors is refused by name, and the object's code does not run."""
    target, path = tmp_path / "pwned", tmp_path / "evil.ckpt"
    torch.save({"state_dict": load_file(world.vqgan), "callbacks": Trap(target)}, path)
    with pytest.raises(UserError, match=r"evil\.ckpt.*pickled code"):
        load_discretizer(config, str(path))
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # the trap works: what held it was the loader


@pytest.mark.parametrize("change", [{"n_embed": 32}, {"ch_mult": (1, 2, 4)}, {"embed_dim": 4}, {"num_res_blocks": 2}])
def test_unfitting_weights(world, config: VQGANConfig, change: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    """Weights of another shape are refused, naming the file and the field that must fit."""
    from dataclasses import asdict

    with pytest.raises(UserError, match=r"discretizer\.weights: .*vqgan\.safetensors: does not fit discretizer\.config") as caught:
        load_discretizer(VQGANConfig(**{**asdict(config), **change}), str(world.vqgan))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"ch": 20}, {"ch_mult": ()}, {"n_embed": 0}, {"n_embed": -1}, {"embed_dim": -2}, {"num_res_blocks": -1}]
)
def test_impossible_shape(world, config: VQGANConfig, change: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    """A VQGAN that cannot be built (GroupNorm needs multiples of 32 channels; sizes are positive) is the user's error, in one line."""
    from pipeline.recipe import load

    overrides = [f"discretizer.config.{name}={list(value) if isinstance(value, tuple) else value}" for name, value in change.items()]
    with pytest.raises(UserError, match="discretizer"):
        recipe = load(str(world.recipe), overrides)
        load_discretizer(recipe.discretizer.config, str(world.vqgan))


def test_missing_or_unreadable_files(config: VQGANConfig, world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """No file named, a missing one, and files that are no checkpoint or only half of one: each refused by name, in one line."""
    with pytest.raises(UserError, match=r"discretizer\.weights: name a checkpoint"):
        load_discretizer(config, None)
    with pytest.raises(UserError, match=r"discretizer\.weights: nowhere\.ckpt: no such file"):
        load_discretizer(config, "nowhere.ckpt")
    torch.save(load_file(world.vqgan), tmp_path / "whole.pt")
    halves = {f"half{path.suffix}": path.read_bytes()[: path.stat().st_size // 2] for path in (tmp_path / "whole.pt", world.vqgan)}
    contents = {
        "empty.ckpt": b"",
        "empty.safetensors": b"",
        "text.ckpt": b"<!doctype html>\n<p>404 not found",
        "zeros.pt": bytes(5000),
        **halves,
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name) as caught:
            load_discretizer(config, str(tmp_path / name))
        assert "\n" not in str(caught.value)
    torch.save([1, 2, 3], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list\.pt: expected a state dict"):
        load_discretizer(config, str(tmp_path / "list.pt"))


def test_identity_changes_nothing(config: VQGANConfig, pictures: torch.Tensor) -> None:
    """kind: identity needs no weights and gives plain adversarial examples."""
    images, codes = load_discretizer(config, None, "identity")(pictures)
    assert torch.equal(images, pictures) and codes.shape == (3, 0, 0)


def test_decode_is_the_second_half_of_q(world, config: VQGANConfig, pictures: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """Stored codes give back the discretized image: decode(encode(x)) = Q(x)."""
    vqgan = load_discretizer(config, str(world.vqgan))
    assert isinstance(vqgan, VQGAN)
    with torch.no_grad():
        images, codes = vqgan(pictures)
        assert torch.equal(vqgan.decode(vqgan.encode(pictures)), images) and torch.equal(vqgan.encode(pictures), codes)
