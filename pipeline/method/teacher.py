"""The teacher: images in [0, 1] -> logits over the class list. Any open_clip model zero-shot, or any timm classifier.

A teacher owns its differentiable resize and its normalisation, so that attacks and labels speak of [0, 1] pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from manifests import Location, RunInfo, UserError, find_file, load_weights, one_line, recipe_dataclass
from manifests.files.weights import find_weights, tensors_sha256
from manifests.notes import note
from manifests.recipe import apply_overrides, make_recipe
from manifests.rundir import RUN
from manifests.timm_names import check_timm_name
from shards.sources.classes import ClassList, find_classes, load_templates

from .open_clip_models import HUB, RANDOM, embed_dim, load_open_clip, pretrained_tags
from .zero_shot import cached_head

PRETRAINED = "pretrained"
OPENAI_MEAN, OPENAI_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # open_clip's, of CLIP


@recipe_dataclass
class Teacher:
    """The vision-language model (or classifier) that attacks, verifies and labels."""

    kind: Literal["open_clip", "timm"] = "open_clip"
    """open_clip: zero-shot from class names and prompt templates. timm: a classifier over the same classes."""
    model: Annotated[str, Location]
    """open_clip: a model name, `local-dir:FOLDER` (open_clip_config.json, weights, bpe.txt.gz) or `hf-hub:NAME`.
    timm: a model name."""
    weights: Annotated[str | None, Location] = None
    """A checkpoint file (OpenAI's own archives are recognised; other files of its weights need a `…-quickgelu` model;
    timm: `FILE#state_dict_ema` takes the average), a pretrained tag of open_clip such as `openai`, `pretrained` for
    timm's own, or `random` to try out and measure. None for `local-dir:` and `hf-hub:`."""
    templates: Annotated[str | None, Location] = None
    """YAML file with `templates`, or `openai` for the 80 ImageNet templates. None: those of `source.classes`."""


class TeacherModel(nn.Module):
    """Resize, normalise, embed, compare with a head: logits [B, classes].

    size: side of the model's input; mean, std: its normalisation; head: [D, classes], applied to unit features and
    scaled by ``scale`` (zero-shot), or None when the model returns logits itself. made_from: what decides the function
    beside the weights (architecture, class names, prompts), for the fingerprint.
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
        self.twins = None if head is None else _twins(head)
        self.eval()
        # The weights keep requires_grad: without it open_clip's ViT under bf16 autocast is ten times slower on CPU.

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1] -> logits [B, classes] float32.

        A canvas of another side than the model's is resized. On CUDA torch sums the resize's gradient in any order,
        so an attack's last bits may differ from run to run; a canvas of the model's own side repeats its bits.
        """
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(
                images, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False
            )
        images = (images - self.mean) / self.std
        if self.head is None:
            logits: torch.Tensor = self.model(images)
            return logits.float()
        features = self.model.encode_image(images)  # type: ignore[operator]
        with torch.autocast(images.device.type, enabled=False):  # logits of scale 100 need more than bf16's 8 bits
            logits = self.scale * F.normalize(features.float(), dim=1) @ self.head
            return logits if self.twins is None else logits[:, self.twins]


def _twins(head: torch.Tensor) -> list[int] | None:
    """The first class with an equal head column, for each class, so that twins tie to the bit; None if all differ."""
    first: dict[bytes, int] = {}
    found = [first.setdefault(column.numpy().tobytes(), number) for number, column in enumerate(head.cpu().float().T)]
    return found if len(first) < len(found) else None


def load_teacher(
    settings: Teacher, classes: ClassList, device: torch.device | str = "cpu", *, with_head: bool = True
) -> TeacherModel:
    """Build the teacher that a recipe asks for, on a device. ``with_head=False``: for a fingerprint only.

    Raises UserError for unknown names, missing or unreadable weights.
    """
    if settings.kind == "timm":
        return _timm_teacher(settings, classes).to(device)
    return _open_clip_teacher(settings, classes, torch.device(device), with_head=with_head).to(device)


def teacher_of_run(info: RunInfo, overrides: Sequence[str] = ()) -> TeacherModel:
    """The teacher that a run was made with, on the CPU. overrides: ``teacher.model=…``, as given on the command line.

    Raises UserError when its files are not where run.json says, or when only run.json names a download.
    """
    tree = apply_overrides({"teacher": info.recipe["teacher"]}, overrides)
    classes, _ = find_classes(info.recipe["source"]["classes"])
    settings: Teacher = make_recipe(Teacher, tree["teacher"], RUN, overrides)
    announce_teacher(settings, RUN, overrides)
    return load_teacher(settings, replace(classes, names=tuple(info.classes)))


def announce_teacher(settings: Teacher, where: str, overrides: Sequence[str]) -> None:
    """Print a note, before loading, that says which teacher ``where`` (a run.json) names.

    Raises UserError for a download that the command line does not name itself: the run may be a stranger's.
    """
    if (found := _download(settings)) is not None:
        field, name = found
        if not any(override.startswith(f"{field}=") for override in overrides):
            raise UserError(
                f"{where}: {field}: {name} would be downloaded because this file names it; if you want that model, "
                f"say so with --set {field}={name}, or name a local one"
            )
    weights = "" if settings.weights is None else f" with weights {settings.weights}"
    note(f"{where} names the teacher: {settings.kind} {settings.model}{weights}; it is loaded now")


def _download(settings: Teacher) -> tuple[str, str] | None:
    """(field, value) of what would make loading fetch something from the network; None for files and random weights."""
    if settings.kind == "timm":
        return ("teacher.weights", PRETRAINED) if settings.weights == PRETRAINED else None
    if settings.model.startswith(HUB):
        return "teacher.model", settings.model
    tags = pretrained_tags(settings.model) if settings.weights else []
    return ("teacher.weights", str(settings.weights)) if settings.weights in tags else None


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 (first 16 hex digits) over every parameter and buffer of a model, and a teacher's ``made_from``.

    The zero-shot head is left out: its last bits depend on the processor. What it is computed from is covered.
    """
    tensors = {
        name: value
        for name, value in model.state_dict().items()
        if not (isinstance(model, TeacherModel) and name == "head")
    }
    made_from = json.dumps(getattr(model, "made_from", None), sort_keys=True)
    return tensors_sha256(tensors, made_from.encode())[:16]


def _open_clip_teacher(settings: Teacher, classes: ClassList, device: torch.device, *, with_head: bool) -> TeacherModel:
    model, tokenizer, function = load_open_clip(settings.model, settings.weights)
    templates: Sequence[str] = ()
    if settings.weights == RANDOM:
        seeded = torch.Generator().manual_seed(0)
        head = F.normalize(torch.randn(embed_dim(function["model"]), len(classes.names), generator=seeded), dim=0)
    else:
        templates = _templates(settings, classes)
        head = torch.empty(0)
        if with_head:
            head = cached_head(model.to(device), tokenizer, classes.names, templates, function)
    size = model.visual.image_size
    preprocess = getattr(model.visual, "preprocess_cfg", {})
    return TeacherModel(
        model,
        size=size[0] if isinstance(size, tuple | list) else size,
        mean=preprocess.get("mean", OPENAI_MEAN),
        std=preprocess.get("std", OPENAI_STD),
        head=head,
        # SigLIP's logit_bias, the same for all classes, changes no softmax and no argmax
        scale=float(model.logit_scale.detach().exp()),
        made_from={**function, "classes": classes.names, "templates": templates},
    )


def _templates(settings: Teacher, classes: ClassList) -> Sequence[str]:
    if settings.templates == "openai":
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    if settings.templates is not None:
        return load_templates(find_file(settings.templates, "teacher.templates"))
    if not classes.templates:
        raise UserError(
            "teacher.templates: the class list has none; set it to openai or to a YAML file with `templates`"
        )
    return classes.templates


def _timm_teacher(settings: Teacher, classes: ClassList) -> TeacherModel:
    import timm

    check_timm_name(settings.model, "teacher.model", timm)
    if settings.weights is None:
        raise UserError(
            "teacher.weights: name a checkpoint file of the timm model, or `pretrained` for timm's own weights"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(settings.model, num_classes=len(classes.names))
    if settings.weights == PRETRAINED:
        _load_timm_pretrained(model, settings.model, len(classes.names))
    elif settings.weights != RANDOM:
        path: Path = find_weights(settings.weights, "teacher.weights")
        try:
            model.load_state_dict(load_weights(path, model.state_dict().keys()))
        except RuntimeError as error:
            reason = one_line(error)
            raise UserError(
                f"teacher.weights: {path}: does not fit {settings.model} with {len(classes.names)} classes: {reason}"
            ) from error
    config = timm.data.resolve_data_config(model=model)
    return TeacherModel(
        model,
        size=config["input_size"][-1],
        mean=config["mean"],
        std=config["std"],
        made_from={"model": settings.model},
    )


def _load_timm_pretrained(model: nn.Module, name: str, classes: int) -> None:
    """timm's own weights, downloaded on first use.

    Raises UserError for a tag of another number of classes, whose head would be random.
    """
    import timm

    config: Any = model.pretrained_cfg
    if config.get("num_classes") != classes:
        raise UserError(
            f"teacher.weights: timm's {name} was trained on {config.get('num_classes')} classes, "
            f"the class list has {classes}"
        )
    try:
        timm.models.load_pretrained(model, pretrained_cfg=config, num_classes=classes)
    except Exception as error:  # whatever a download raises
        raise UserError(f"teacher: cannot load timm's weights of {name}: {one_line(error, 300)}") from error
