"""The teacher: images in [0, 1] -> logits over the class list. Any open_clip model zero-shot, or any timm classifier.

A teacher owns its differentiable resize and its normalisation, so that attacks and labels speak of [0, 1] pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from manifests import UserError, find_file, load_weights
from manifests.recipe import nearest
from manifests.weights import files_fingerprint

from .classes import ClassList, load_templates
from .recipe import Teacher as TeacherSettings

LOCAL = "local-dir:"


class Teacher(nn.Module):
    """Resize, normalise, embed, compare with a head: logits [B, classes].

    size: side of the model's input; mean, std: its normalisation; head: [D, classes], applied to unit features and scaled by
    ``scale`` (zero-shot), or None when the model returns logits itself. made_from: what decides the function beside the
    weights (architecture, class names, prompts), for the fingerprint.
    """

    mean: torch.Tensor
    std: torch.Tensor
    head: torch.Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        head: torch.Tensor | None = None,
        scale: float = 1.0,
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.size, self.scale = model, size, scale
        self.made_from = {"size": size, **(made_from or {})}
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.register_buffer("head", head)
        self.eval()
        # The weights keep requires_grad: without it open_clip's ViT under bf16 autocast is ten times slower on CPU.

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1] -> logits [B, classes] float32."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        images = (images - self.mean) / self.std
        if self.head is None:
            logits: torch.Tensor = self.model(images)
            return logits.float()
        features = self.model.encode_image(images)  # type: ignore[operator]
        with torch.autocast(images.device.type, enabled=False):  # logits of scale 100 need more than bf16's 8 bits
            return self.scale * F.normalize(features.float(), dim=1) @ self.head


def load_teacher(settings: TeacherSettings, classes: ClassList) -> Teacher:
    """Build the teacher that a recipe asks for, on the CPU. Raises UserError for unknown names, missing or unreadable weights."""
    if settings.kind == "timm":
        return _timm_teacher(settings, classes)
    return _open_clip_teacher(settings, classes)


def zero_shot_head(model: nn.Module, tokenizer: object, classes: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Mean text embedding of each class over all templates, as unit vectors: [D, classes] (Radford et al., 2021, sec. 3.1.4)."""
    columns = []
    with torch.no_grad():
        for name in classes:
            tokens = tokenizer([template.format(name) for template in templates])  # type: ignore[operator]
            embedded = F.normalize(model.encode_text(tokens).float(), dim=1).mean(0)  # type: ignore[operator]
            columns.append(F.normalize(embedded, dim=0))
    return torch.stack(columns, dim=1)


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 (first 16 hex digits) over every parameter and buffer of a model, and a teacher's ``made_from``.

    The zero-shot head is left out: it is computed, so its last bits depend on the processor. What it is computed from is covered.
    """
    digest = hashlib.sha256(json.dumps(getattr(model, "made_from", None), sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(model, Teacher) and name == "head":
            continue
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _open_clip_teacher(settings: TeacherSettings, classes: ClassList) -> Teacher:
    import open_clip

    name, weights = settings.model, settings.weights
    tokenizer_options = {}
    bpe = None
    if name.startswith(LOCAL):
        folder = find_file(name.removeprefix(LOCAL), "teacher.model")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")) and not any(folder.glob("*.p*t*")):
            raise UserError(f"teacher.model: {folder}: holds no weights (open_clip_model.safetensors)")
        if (folder / "bpe.txt.gz").exists():
            tokenizer_options["bpe_path"] = str(folder / "bpe.txt.gz")
            bpe = files_fingerprint([folder / "bpe.txt.gz"])
        name, weights = f"{LOCAL}{folder}", None
    elif name.startswith("hf-hub:"):
        weights = None  # the hub's directory holds them
    elif name not in open_clip.list_models():
        raise UserError(f"teacher.model: open_clip knows no model {name!r}{nearest(name, open_clip.list_models())}")
    elif weights is None:
        raise UserError("teacher.weights: name a checkpoint file or a pretrained tag such as openai")
    elif weights not in open_clip.list_pretrained_tags_by_model(name):
        weights = str(find_file(weights, "teacher.weights"))
    before = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # open_clip logs every step of loading to the root logger
    try:
        model = open_clip.create_model(name, pretrained=weights)
        tokenizer = open_clip.get_tokenizer(name, **tokenizer_options)
    except Exception as error:  # whatever open_clip or a download raises, the user needs the field and the reason
        raise UserError(f"teacher: cannot load {name} with weights {weights}: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.getLogger().setLevel(before)
    model.eval()
    templates = _templates(settings, classes)
    architecture = settings.model
    if settings.model.startswith(LOCAL):
        architecture = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    size = model.visual.image_size
    preprocess = getattr(model.visual, "preprocess_cfg", {})
    return Teacher(
        model,
        size=size[0] if isinstance(size, tuple | list) else size,
        mean=preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN),
        std=preprocess.get("std", open_clip.OPENAI_DATASET_STD),
        head=zero_shot_head(model, tokenizer, classes.names, templates),
        scale=float(model.logit_scale.detach().exp()),
        made_from={"model": architecture, "classes": classes.names, "templates": templates, "tokenizer": bpe},
    )


def _templates(settings: TeacherSettings, classes: ClassList) -> Sequence[str]:
    if settings.templates == "openai":
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    if settings.templates is not None:
        return load_templates(find_file(settings.templates, "teacher.templates"))
    if not classes.templates:
        raise UserError("teacher.templates: the class list has none; set it to openai or to a YAML file with `templates`")
    return classes.templates


def _timm_teacher(settings: TeacherSettings, classes: ClassList) -> Teacher:
    import timm

    if not timm.is_model(settings.model):
        raise UserError(f"teacher.model: timm knows no model {settings.model!r}{nearest(settings.model, timm.list_models())}")
    if settings.weights is None:
        raise UserError("teacher.weights: name a checkpoint file of the timm model")
    path: Path = find_file(settings.weights, "teacher.weights")
    model = timm.create_model(settings.model, num_classes=len(classes.names))
    try:
        model.load_state_dict(load_weights(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"teacher.weights: {path}: does not fit {settings.model} with {len(classes.names)} classes: {reason}") from error
    config = timm.data.resolve_data_config(model=model)
    return Teacher(model, size=config["input_size"][-1], mean=config["mean"], std=config["std"], made_from={"model": settings.model})
