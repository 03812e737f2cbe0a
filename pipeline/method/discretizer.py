"""The discretizer Q: encode an image to a grid of codebook entries and decode those. A VQGAN (Esser et al., CVPR 2021).

Encoder and decoder are taming-transformers' blocks. Its `VectorQuantizer` is not used, because it holds distances and a
one-hot of [tokens x codes] in memory; `nearest_code` keeps only the nearest index. Checkpoints keep taming's names
(``encoder.* decoder.* quantize.embedding.weight quant_conv.* post_quant_conv.*``), so published weights load unchanged.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BeforeValidator
from torch import nn

from manifests import Location, RunInfo, UserError, find_file, load_weights, one_line, recipe_dataclass
from manifests.files.weights import find_weights
from manifests.notes import note
from manifests.plain_yaml import load_plain
from manifests.recipe import apply_overrides, make_recipe, nearest
from manifests.rundir import RUN

from .diffusion import DiffusionConfig, is_download, load_diffusion

RANDOM = "random"
NEAREST_CHUNK = 8192  # tokens whose distances to all codes are in memory at once: 8192 x 16384 float32 is 512 MiB


@recipe_dataclass
class VQGANConfig:
    """Shape of a VQGAN, in taming's terms. Defaults: VQGAN f=8, 16384 codes (OpenImages)."""

    ch: int = 128  # base channels
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)  # per resolution; len - 1 halvings
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (32,)
    resolution: int = 256  # nominal input side, which decides at which depths attention sits
    z_channels: int = 4
    embed_dim: int = 4  # length of a codebook entry
    n_embed: int = 16384  # codebook entries

    @property
    def downsampling(self) -> int:
        """Pixels per code, along a side (the f of f=8)."""
        return 2 ** (len(self.ch_mult) - 1)


_F16 = {"ch_mult": (1, 1, 2, 2, 4), "attn_resolutions": (16,)}
KNOWN: Mapping[str, Mapping[str, Any]] = {
    # latent-diffusion's first stages; f8-16384 is the paper's discretizer
    "f4-8192": {"ch_mult": (1, 2, 4), "attn_resolutions": (), "z_channels": 3, "embed_dim": 3, "n_embed": 8192},
    "f8-16384": {},
    "f8-256": {"n_embed": 256},
    "f16-16384-ldm": {**_F16, "z_channels": 8, "embed_dim": 8},
    # taming-transformers' ImageNet models
    "f16-1024": {**_F16, "z_channels": 256, "embed_dim": 256, "n_embed": 1024},
    "f16-16384": {**_F16, "z_channels": 256, "embed_dim": 256},
}


def named_config(value: object) -> object:
    """Replace a name of `KNOWN`, or a YAML file in taming's layout, by its shape; return anything else unchanged.

    Raises UserError for an unknown name, or for a file that describes no VQGAN.
    """
    if not isinstance(value, str):
        return value
    if value in KNOWN:
        return dict(KNOWN[value])
    if not value.endswith((".yaml", ".yml")):
        hint = f"{nearest(value, list(KNOWN))}; or name taming's YAML file"
        raise UserError(f"discretizer.config: no VQGAN is known as {value!r}{hint}")
    path = find_file(value, "discretizer.config")
    try:
        params = load_plain(path.read_text())["model"]["params"]
        shape = {**params["ddconfig"], "embed_dim": params["embed_dim"], "n_embed": params["n_embed"]}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"discretizer.config: {path}: not a VQGAN of taming's layout (model.params.ddconfig, embed_dim, n_embed)"
        ) from error
    odd = {"double_z": False, "in_channels": 3, "out_ch": 3}
    if wrong := next((name for name, fit in odd.items() if shape.get(name, fit) != fit), None):
        raise UserError(
            f"discretizer.config: {path}: {wrong} is {shape[wrong]!r}; a VQGAN of images needs {odd[wrong]!r}"
        )
    return {name: value for name, value in shape.items() if name in VQGANConfig.__dataclass_fields__}


NamedConfig = Annotated[VQGANConfig, BeforeValidator(named_config)]


@recipe_dataclass
class Discretizer:
    """The VQGAN that turns images into codes and back, or a replacement for it."""

    kind: Literal["vqgan", "identity", "diffusion"] = "vqgan"
    """identity: no discretization, plain adversarial examples. diffusion: Stable Diffusion (paper, table 10)."""
    weights: Annotated[str | None, Location] = None
    """Checkpoint in taming's or latent diffusion's layout (safetensors or a torch file), or `random`."""
    config: NamedConfig = VQGANConfig()
    """Shape of the VQGAN: a known name (f8-16384, f8-256, f4-8192, f16-1024, f16-16384), a YAML file, or fields."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Settings of kind diffusion; ``weights`` is then a folder in diffusers' layout, or a model of the Hub."""


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. Images go in and come out as [B, 3, H, W] in [0, 1]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        from taming.modules.diffusionmodules.model import Decoder, Encoder

        shape = {
            "ch": config.ch,
            "out_ch": 3,
            "ch_mult": config.ch_mult,
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": list(config.attn_resolutions),
            "in_channels": 3,
            "resolution": config.resolution,
            "z_channels": config.z_channels,
            "double_z": False,
        }
        self.config = config
        with contextlib.redirect_stdout(io.StringIO()):  # taming prints the shape of z
            self.encoder = Encoder(**shape)
            self.decoder = Decoder(**shape)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(config.n_embed, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def codebook(self) -> torch.Tensor:
        """Codebook entries [n_embed, embed_dim]."""
        return self.get_parameter("quantize.embedding.weight")

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Continuous latents [B, embed_dim, h, w] before quantization."""
        return self.quant_conv(self.encoder(2 * images - 1))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1] -> codes [B, h, w] int64."""
        latents = self.latents(images)
        batch, dim, height, width = latents.shape
        tokens = latents.permute(0, 2, 3, 1).reshape(-1, dim)
        return nearest_code(tokens, self.codebook).view(batch, height, width)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [B, h, w] -> float32 images [B, 3, H, W] in [0, 1]."""
        return self.decode_latents(self.codebook[codes].permute(0, 3, 1, 2)).clamp(0, 1)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Quantized latents [B, embed_dim, h, w] -> float32 images, not yet clamped."""
        return (self.decoder(self.post_quant_conv(latents)).float() + 1) / 2

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Q: images [B, 3, H, W] in [0, 1] -> (discretized images in [0, 1], codes [B, h, w])."""
        codes = self.encode(images)
        return self.decode(codes), codes


def nearest_code(tokens: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest codebook entry in L2, in float32 whatever the autocast.

    tokens: [N, D]; codebook: [C, D]. Returns [N] int64. |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 does not change
    the argmin.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        codebook = codebook.float()
        bias = codebook.square().sum(1)
        scaled = -2 * codebook.t()
        parts = [torch.addmm(bias, part.float(), scaled).argmin(1) for part in tokens.split(NEAREST_CHUNK)]
    return torch.cat(parts)


class Identity(nn.Module):
    """No discretization, so that the attack makes plain adversarial examples. Codes are empty, [B, 0, 0]."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, torch.zeros(len(images), 0, 0, dtype=torch.long, device=images.device)


def load_discretizer(config: VQGANConfig, weights: str | None, kind: str = "vqgan") -> nn.Module:
    """Build a recipe's discretizer on the CPU. ``weights="random"``, for trials and measurements, needs no file.

    Raises UserError for missing, unreadable or unfitting weights.
    """
    if kind == "identity":
        return Identity()
    if weights is None:
        raise UserError("discretizer.weights: name a checkpoint file of the VQGAN")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vqgan = VQGAN(config)
    except (ValueError, RuntimeError, UnboundLocalError, ZeroDivisionError) as error:
        raise UserError(f"discretizer.config: no VQGAN has this shape ({one_line(error)})") from error
    if weights == RANDOM:
        return vqgan.eval()
    path: Path = find_weights(weights, "discretizer.weights")
    state = load_weights(path, vqgan.state_dict().keys())
    state = {name: value for name, value in state.items() if not name.startswith("loss.")}
    try:
        vqgan.load_state_dict(state)
    except RuntimeError as error:
        reason = one_line(error, 300)
        raise UserError(f"discretizer.weights: {path}: does not fit discretizer.config: {reason}") from error
    return vqgan.eval()


def build_discretizer(settings: Discretizer) -> nn.Module:
    """Build a recipe's discretizer on the CPU. Raises UserError for missing, unreadable or unfitting weights."""
    if settings.kind == "diffusion":
        return load_diffusion(settings.diffusion, settings.weights)
    return load_discretizer(settings.config, settings.weights, settings.kind)


def discretizer_of_run(info: RunInfo, overrides: Sequence[str] = ()) -> nn.Module:
    """Build the discretizer of a run on the CPU. overrides: ``discretizer.weights=…``, as on the command line.

    Raises UserError when its file is not where run.json says, or when only run.json names a download.
    """
    tree = apply_overrides({"discretizer": info.recipe["discretizer"]}, overrides)
    settings: Discretizer = make_recipe(Discretizer, tree["discretizer"], RUN, overrides)
    weights = settings.weights or ""
    if settings.kind == "diffusion":
        if is_download(weights) and not any(override.startswith("discretizer.weights=") for override in overrides):
            raise UserError(
                f"{RUN}: discretizer.weights: {weights} would be downloaded because this file names it; if you want "
                f"that model, say so with --set discretizer.weights={weights}, or name a local folder"
            )
        note(f"{RUN} names the discretizer: {weights}; it is loaded now")
    return build_discretizer(settings)
