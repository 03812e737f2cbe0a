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
    """How an image is re-drawn."""

    strength: Annotated[float, Field(gt=0, le=1)] = 0.3
    """How far towards noise the image is taken before it is denoised; 1 forgets it."""
    inference_steps: Annotated[int, Field(ge=1)] = 20
    """Of the whole schedule; the share ``strength`` of it is run."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance; at most 1 is none, at half the cost."""
    prompt: str = ""
    """The same for all images."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the noise, which is the same for every image: so its result does not depend on its batch."""


class ImageToImage(nn.Module):
    """A diffusers pipeline as a quantizer without codes: images [B, 3, H, W] in [0, 1] -> (images, codes [B, 0, 0])."""

    def __init__(self, pipeline: Any, config: DiffusionConfig) -> None:
        super().__init__()
        self.vae, self.unet, self.text_encoder = pipeline.vae, pipeline.unet, pipeline.text_encoder
        self.config = config
        self.made_from = _made_from(pipeline, config.prompt)  # for the fingerprint
        self._pipeline = (pipeline,)  # in a tuple: its modules are registered above, it is none itself

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
    """What decides the function beside weights and recipe: the parts' settings (those in their files: defaults come and go with the
    library's version), the scheduler's kind, and what the tokenizer makes of the prompt and of the empty one.
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
    """weights: a folder in diffusers' layout, or a model of the Hub; safetensors only. Raises UserError."""
    if importlib.util.find_spec("diffusers") is None:
        raise UserError(
            "discretizer.kind: diffusion needs the extra: pip install 'discrete-adversarial-distillation[diffusion]'"
        )
    if weights is None:
        raise UserError("discretizer.weights: name a folder in diffusers' layout, or a model of the Hub")
    if int(config.strength * config.inference_steps) < 1:
        raise UserError(
            f"discretizer.diffusion: strength {config.strength} of {config.inference_steps} inference_steps is less than one step; "
            "raise one of the two"
        )
    from diffusers import StableDiffusionImg2ImgPipeline

    try:
        pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(weights, use_safetensors=True, safety_checker=None)
    except Exception as error:  # whatever diffusers or a download raises
        raise UserError(f"discretizer.weights: cannot load {weights}: {one_line(error, 300)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return ImageToImage(pipeline, config).eval()
