"""Stable Diffusion, image to image, in the discretizer's place (paper, table 10). Needs the extra ``[diffusion]``."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from manifests import UserError, one_line, recipe_dataclass

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer(Fast)?",
    "scheduler": r"\w+Scheduler",
}
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # image to image does without
_CODE = ("auto_map", "quantization_config", "custom_pipelines")  # keys of a part's config that lead to other code


@recipe_dataclass
class DiffusionConfig:
    """Settings of the image-to-image pipeline."""

    strength: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of noise that is put on the image before denoising; 1 leaves nothing of it."""
    inference_steps: Annotated[int, Field(ge=1)] = 20
    """Steps of the whole schedule; the pipeline runs ``strength`` of them."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance; 1 or less: none, at half the cost."""
    prompt: str = ""
    """Text prompt of every image."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the noise. Every image gets the same noise, so its result does not depend on its batch."""


class ImageToImage(nn.Module):
    """A diffusers pipeline as a quantizer without codes: images [B, 3, H, W] in [0, 1] -> (images, codes [B, 0, 0])."""

    def __init__(self, pipeline: Any, config: DiffusionConfig) -> None:
        super().__init__()
        self.vae, self.unet, self.text_encoder = pipeline.vae, pipeline.unet, pipeline.text_encoder
        self.config = config
        self.made_from = _made_from(pipeline, config.prompt)  # for the fingerprint
        self._pipeline = (pipeline,)  # in a tuple, so that nn.Module does not register it

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, device = self.config, images.device
        drawn = self._pipeline[0](
            prompt=[config.prompt] * len(images),
            image=images,
            strength=config.strength,
            num_inference_steps=config.inference_steps,
            guidance_scale=config.guidance,
            generator=[torch.Generator(device).manual_seed(config.seed) for _ in images],
            output_type="pt",
        ).images
        return drawn.float().clamp(0, 1), torch.zeros(len(images), 0, 0, dtype=torch.long, device=device)


def _made_from(pipeline: Any, prompt: str) -> dict[str, Any]:
    """Everything beside weights and recipe that decides the function.

    That is the parts' settings (only those in their files, because defaults change with the library's version), the
    scheduler's kind, and the tokens of the prompt and of the empty prompt.
    """
    settings = {}
    for name in ("scheduler", "unet", "vae"):
        config = getattr(pipeline, name).config
        given = config.keys() - set(config.get("_use_default_values", ()))
        settings[name] = {key: config[key] for key in given if not key.startswith("_")}
    text, tokenizer = pipeline.text_encoder.config, pipeline.tokenizer
    tokens = tokenizer([prompt, ""], padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    settings["text_encoder"] = {
        key: getattr(text, key, None) for key in ("hidden_act", "num_attention_heads", "layer_norm_eps")
    }
    return settings | {"kind": type(pipeline.scheduler).__name__, "tokens": tokens.input_ids}


def load_diffusion(config: DiffusionConfig, weights: str | None) -> ImageToImage:
    """weights: a folder in diffusers' layout, or a model of the Hub. Safetensors alone are read, and no code is run.

    Raises UserError for a missing package, a folder that would run code, and whatever diffusers or a download raises.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UserError(
            "discretizer.kind: diffusion needs the extra: pip install 'discrete-adversarial-distillation[diffusion]'"
        )
    if weights is None:
        raise UserError("discretizer.weights: name a folder in diffusers' layout, or a model of the Hub")
    if int(config.strength * config.inference_steps) < 1:
        steps = f"strength {config.strength} of {config.inference_steps} inference_steps"
        raise UserError(f"discretizer.diffusion: {steps} is less than one step; raise one of the two")
    from diffusers import StableDiffusionImg2ImgPipeline

    folder = diffusion_folder(weights)
    try:
        pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, **dict.fromkeys(_LEFT_OUT)
        )
    except Exception as error:  # whatever diffusers raises
        raise UserError(f"discretizer.weights: cannot load {weights}: {one_line(error, 300)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return ImageToImage(pipeline, config).eval()


def is_download(weights: str) -> bool:
    """Whether ``weights`` is no folder of this machine, so that it would be fetched from the Hub."""
    return not Path(weights).expanduser().is_dir()


def diffusion_folder(weights: str) -> Path:
    """The folder of a model, if need be fetched from the Hub without its Python, after checking what it would import.

    Raises UserError.
    """
    folder = Path(weights).expanduser()
    if is_download(weights):
        from huggingface_hub import snapshot_download

        wanted = [
            "model_index.json",
            *(f"{part}/*{end}" for part in _PARTS for end in (".json", ".safetensors", ".txt")),
        ]
        try:
            folder = Path(snapshot_download(weights, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*non_ema*"]))
        except Exception as error:  # whatever the Hub and the network raise
            raise UserError(f"discretizer.weights: cannot load {weights}: {one_line(error, 300)}") from error
    _check_index(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix == ".py" or path.name == "adapter_config.json":
            raise UserError(f"discretizer.weights: {folder}: {name} is not loaded (it may run code); remove it")
        if path.suffix == ".json" and name.parts[0] in _PARTS and name.name in ("config.json", "tokenizer_config.json"):
            odd = [key for key in _read_json(path) if key in _CODE or "attn_implementation" in key]
            if odd:
                raise UserError(f"discretizer.weights: {path}: {odd[0]} may run code; remove it")
    return folder


def _check_index(folder: Path) -> None:
    """model_index.json names the class of every part, which diffusers imports: only those of Stable Diffusion pass."""
    path = folder / "model_index.json"
    index = _read_json(path)
    if index.get("_class_name") not in _PIPELINES:
        raise UserError(
            f"discretizer.weights: {path}: is no Stable Diffusion (_class_name {index.get('_class_name')!r})"
        )
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None]:
            continue
        known = _PARTS.get(name, "")
        if name in _LEFT_OUT and value[0] in ("transformers", "stable_diffusion"):
            continue
        if len(value) != 2 or value[0] not in ("diffusers", "transformers") or not re.fullmatch(known, str(value[1])):
            raise UserError(
                f"discretizer.weights: {path}: {name} is {value!r}, no part of Stable Diffusion; it is not loaded"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"discretizer.weights: cannot load {path}: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"discretizer.weights: cannot load {path}: not a mapping")
    return tree
