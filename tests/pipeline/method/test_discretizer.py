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
from pipeline.method import discretizer
from pipeline.method.discretizer import VQGAN, VQGANConfig, load_discretizer, named_config, nearest_code


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
    """Codebook entries closer together than bf16 resolves are still kept apart."""
    codebook = torch.tensor([[1.0, 0.0], [1.001, 0.0], [1.002, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_code(codebook + 0.0002, codebook).tolist() == [0, 1, 2]


def test_equals_taming(world, config: VQGANConfig, pictures: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """Q composed of taming's modules: Encoder, quant_conv, VectorQuantizer, post_quant_conv, Decoder."""
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import VectorQuantizer

    shape: dict[str, Any] = {
        "ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [16], "in_channels": 3,
        "resolution": 32, "z_channels": 4, "double_z": False,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        encoder, decoder = Encoder(**shape), Decoder(**shape)
    quantizer = VectorQuantizer(64, 3, beta=0.25)
    before, after = torch.nn.Conv2d(4, 3, 1), torch.nn.Conv2d(3, 4, 1)
    weights = load_file(world.vqgan)
    modules = {
        "encoder": encoder,
        "decoder": decoder,
        "quantize": quantizer,
        "quant_conv": before,
        "post_quant_conv": after,
    }
    for name, module in modules.items():
        module.load_state_dict(
            {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
        )
        module.eval()
    with torch.no_grad():
        quantized, _, (_, _, indices) = quantizer(before(encoder(2 * pictures - 1)))
        expected = ((decoder(after(quantized)) + 1) / 2).clamp(0, 1)
        images, codes = load_discretizer(config, str(world.vqgan))(pictures)
    assert torch.equal(codes, indices.view(3, 16, 16)) and len(codes.unique()) > 20
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-4)
    assert images.min() >= 0 and images.max() <= 1


def test_published_layouts_load_alike(world, config: VQGANConfig, pictures: torch.Tensor, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A torch checkpoint with ``state_dict`` and a discriminator (``loss.``) is the safetensors file's discretizer."""
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


def test_pickled_code_is_not_run(world, config: VQGANConfig, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A checkpoint that carries an object besides its tensors gives its tensors, and the object's code does not run."""
    target, path = tmp_path / "pwned", tmp_path / "evil.ckpt"
    torch.save({"state_dict": load_file(world.vqgan), "callbacks": Trap(target)}, path)
    load_discretizer(config, str(path))
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # the trap works: what held it was the loader


@pytest.mark.parametrize("change", [{"n_embed": 32}, {"ch_mult": (1, 2, 4)}, {"embed_dim": 4}, {"num_res_blocks": 2}])
def test_unfitting_weights(world, config: VQGANConfig, change: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    """Weights of another shape are refused, naming the file and the field that must fit."""
    from dataclasses import asdict

    with pytest.raises(
        UserError, match=r"discretizer\.weights: .*vqgan\.safetensors: does not fit discretizer\.config"
    ) as caught:
        load_discretizer(VQGANConfig(**{**asdict(config), **change}), str(world.vqgan))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"ch": 20}, {"ch_mult": ()}, {"n_embed": 0}, {"n_embed": -1}, {"embed_dim": -2}, {"num_res_blocks": -1}]
)
def test_impossible_shape(world, config: VQGANConfig, change: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    """A shape that no VQGAN has (channels not a multiple of 32, sizes not positive) is a user error in one line."""
    from pipeline.recipe import load

    overrides = [
        f"discretizer.config.{name}={list(value) if isinstance(value, tuple) else value}"
        for name, value in change.items()
    ]
    with pytest.raises(UserError, match="discretizer"):
        recipe = load(str(world.recipe), overrides)
        load_discretizer(recipe.discretizer.config, str(world.vqgan))


def test_missing_or_unreadable_files(config: VQGANConfig, world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """No file, a missing file, no checkpoint, half a checkpoint: each refused by name, in one line."""
    with pytest.raises(UserError, match=r"discretizer\.weights: name a checkpoint"):
        load_discretizer(config, None)
    with pytest.raises(UserError, match=r"discretizer\.weights: nowhere\.ckpt: no such file"):
        load_discretizer(config, "nowhere.ckpt")
    torch.save(load_file(world.vqgan), tmp_path / "whole.pt")
    halves = {
        f"half{path.suffix}": path.read_bytes()[: path.stat().st_size // 2]
        for path in (tmp_path / "whole.pt", world.vqgan)
    }
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


TAMING_F16 = """
model:
  base_learning_rate: 4.5e-06
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 256
    n_embed: 16384
    monitor: val/rec_loss
    ddconfig:
      double_z: false
      z_channels: 256
      resolution: 256
      in_channels: 3
      out_ch: 3
      ch: 128
      ch_mult: [1, 1, 2, 2, 4]
      num_res_blocks: 2
      attn_resolutions: [16]
      dropout: 0.0
    lossconfig:
      target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator
      params: {disc_conditional: false, disc_in_channels: 3, disc_start: 0, disc_weight: 0.75,
        disc_num_layers: 2, codebook_weight: 1.0}
"""  # vqgan_imagenet_f16_16384/configs/model.yaml, as published


@pytest.mark.parametrize(
    ("name", "millions", "downsampling", "codes"),
    [
        ("f8-16384", 67.7, 8, 16384),
        ("f8-256", 67.7, 8, 256),
        ("f16-16384", 76.1, 16, 16384),
        ("f16-1024", 72.1, 16, 1024),
    ],
)
def test_known_shapes(name: str, millions: float, downsampling: int, codes: int) -> None:
    """By name: encoder, decoder and codebook of the known sizes (f8: 27.4, 40.25 and 0.07 million parameters)."""
    config = VQGANConfig(**named_config(name))  # type: ignore[arg-type]
    with torch.device("meta"):
        vqgan = VQGAN(config)
    assert sum(p.numel() for p in vqgan.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert config.downsampling == downsampling and len(vqgan.codebook) == codes


def test_taming_s_own_yaml(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The YAML beside taming's published weights is the shape known as f16-16384, from the command line too."""
    from pipeline.recipe import load

    path = tmp_path / "model.yaml"
    path.write_text(TAMING_F16)
    by_file, by_name = (
        load(str(world.recipe), [f"discretizer.config={value}"]).discretizer.config for value in (path, "f16-16384")
    )
    assert by_file == by_name == VQGANConfig(**named_config("f16-16384"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("f8-16834", r"no VQGAN is known as 'f8-16834'; did you mean .*'f8-16384'"),
        ("nowhere.yaml", r"discretizer\.config: nowhere\.yaml: no such file"),
        ("model: {params: {embed_dim: 4}}", r"not a VQGAN of taming's layout"),
        ("[1, 2", r"not a VQGAN of taming's layout"),
        (TAMING_F16.replace("double_z: false", "double_z: true"), r"double_z is True; a VQGAN of images needs False"),
        (TAMING_F16.replace("in_channels: 3", "in_channels: 1", 1), r"in_channels is 1; a VQGAN of images needs 3"),
    ],
)
def test_shapes_that_are_none(world, tmp_path: Path, value: str, message: str) -> None:  # type: ignore[no-untyped-def]
    """A misspelt name gets the nearest; a YAML of something else says what is missing. One line each."""
    from pipeline.recipe import load

    if ":" in value or "[" in value:
        (tmp_path / "model.yaml").write_text(value)
        value = str(tmp_path / "model.yaml")
    with pytest.raises(UserError, match=message) as caught:
        load(str(world.recipe), [f"discretizer.config={value}"])
    assert "\n" not in str(caught.value)


def test_random_weights_need_no_file(config: VQGANConfig, pictures: torch.Tensor) -> None:
    """`random` is the same every time, and leaves the process's own random numbers alone."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (load_discretizer(config, "random") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(first(pictures)[0], second(pictures)[0])


@pytest.mark.parametrize("codes", [1, 63, 16384])
def test_chunks_of_tokens_equal_all_at_once(codes: int) -> None:
    """More tokens than one chunk give the codes of the whole matrix of distances, also at the paper's codebook size."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(discretizer.NEAREST_CHUNK + 100 if codes < 100 else 500, 4, generator=generator)
    codebook = torch.randn(codes, 4, generator=generator)
    found = nearest_code(tokens, codebook)
    distances = torch.cdist(tokens.double(), codebook.double())
    reached = distances.gather(1, found[:, None])[:, 0]
    torch.testing.assert_close(reached, distances.amin(1), atol=1e-6, rtol=1e-6)
    assert (
        found == distances.argmin(1)
    ).float().mean() > 0.999  # float32 may take the other of two that are equally near
