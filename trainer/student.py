"""Students: any timm model with the run's classes. The normalisation is inside, so a student takes [0, 1] images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from manifests import UserError, load_weights, one_line
from manifests.devices import out_of_memory
from manifests.files.weights import PART, find_weights
from manifests.recipe import nearest
from manifests.timm_names import check_timm_name


class Student(nn.Module):
    """A timm model behind its own normalisation: images [B, 3, H, W] in [0, 1] -> logits [B, classes]."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model((images - self.mean) / self.std)
        return logits


def check_name(name: str) -> None:
    """Raises UserError for a model, or a tag, that timm does not know."""
    check_timm_name(name, "student", timm)


def create_student(
    name: str, classes: int, side: int, *, pretrained: str | None = None, drop_path: float = 0.0, dropout: float = 0.0
) -> Student:
    """Build a student for images of ``side`` pixels.

    name: any timm model. A tag (``vit_base_patch16_224.augreg_in21k``) decides the normalisation.
    pretrained: see `Recipe.pretrained`; None: random weights.
    Raises UserError for an unknown name, weights that do not fit, or an option that the model does not have.
    """
    check_name(name)
    options: dict[str, Any] = {"num_classes": classes}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if dropout:
        options["drop_rate"] = dropout
    if fixed_size(name):
        options["img_size"] = side
    if pretrained is not None:
        name, weights = _pretrained(name, pretrained, options)
        options |= weights
    try:
        model = timm.create_model(name, **options)
    except OSError as error:  # from network and hub; first, because some of them are ValueErrors too
        raise UserError(
            f"pretrained: {pretrained}: cannot be fetched ({one_line(error)}); give a checkpoint file instead"
        ) from error
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"student: {name} cannot be built for {side} x {side} images with these options ({one_line(error)}); "
            "change student, input, drop_path or dropout"
        ) from error
    settings = timm.data.resolve_data_config(model=model)
    return Student(model, settings["mean"], settings["std"])


def to_device(student: Student, device: torch.device) -> Student:
    """Move a student to a device and give the weights of its 2-D convolutions the layout channels_last."""
    student.to(device)
    # not student.to(memory_format=…), which fails for models that also have 3-D convolutions
    for weight in student.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return student


def try_out(student: Student, images: int, side: int, device: torch.device, *, bf16: bool) -> None:
    """Run one forward pass in train mode on a copy.

    Raises UserError for a student that cannot take a batch of ``images`` images of ``side`` pixels.
    """
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            copy.deepcopy(student).train()(torch.zeros(images, 3, side, side, device=device))
    except Exception as error:  # models raise errors of many classes
        if out_of_memory(error):
            raise
        what = f"{images} image{'s' * (images > 1)} of {side} x {side} pixels at a time"
        why = one_line(error) or type(error).__name__
        raise UserError(
            f"student: it cannot learn from {what} ({why}); change student, input, batch or accumulate"
        ) from error


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict on the CPU. Each tensor has its own memory, as safetensors demands, even if the model ties two."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }


def fixed_size(name: str) -> bool:
    """Whether a model, such as ViT, is built for one image size."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and bool(config.fixed_input_size)


def _pretrained(name: str, pretrained: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(model's name, timm's options) for these weights. A file must hold every weight except the head's."""
    path = Path(pretrained.rpartition(PART)[0] or pretrained).expanduser()
    if path.is_file():
        fresh = timm.create_model(name, **options)
        weights = load_weights(find_weights(pretrained, "pretrained"), fresh.state_dict().keys())
        heads = fresh.pretrained_cfg.get("classifier") or ()
        for key, value in fresh.state_dict().items():
            is_head = key.rpartition(".")[0] in ((heads,) if isinstance(heads, str) else heads)
            # a head for other classes; timm could skip it, but would then skip other missing weights silently, too
            if is_head and (key not in weights or weights[key].shape != value.shape):
                weights[key] = value
        overlay = {
            "state_dict": weights,
            "custom_load": False,
            "label_offset": 0,
            "num_classes": options["num_classes"],
        }
        return name, {"pretrained": True, "pretrained_cfg_overlay": overlay}
    architecture = name.split(".")[0]
    tags = [found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")]
    if pretrained not in tags:
        raise UserError(
            f"pretrained: {pretrained!r} is neither a file nor a tag of {architecture}{nearest(pretrained, tags)}"
        )
    return f"{architecture}.{pretrained}", {"pretrained": True}
