"""Stable Diffusion, image to image, in the discretizer's place (paper, table 10). Needs the extra ``[diffusion]``."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from manifests import UserError, one_line, recipe_dataclass


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
        self._pipeline = (
            pipeline,
        )  # in a tuple so that nn.Module does not register it; its parts are registered above

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
    """Load safetensors from a folder in diffusers' layout, or a model of the Hub. Raises UserError."""
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

    try:
        pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(weights, use_safetensors=True, safety_checker=None)
    except Exception as error:  # diffusers and downloads raise many kinds
        raise UserError(f"discretizer.weights: cannot load {weights}: {one_line(error, 300)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return ImageToImage(pipeline, config).eval()
