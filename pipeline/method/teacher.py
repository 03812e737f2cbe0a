"""The teacher: images in [0, 1] -> logits over the class list. Any open_clip model zero-shot, or any timm classifier.

A teacher owns its differentiable resize and its normalisation, so that attacks and labels speak of [0, 1] pixels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from manifests import Location, RunInfo, UserError, find_file, load_weights, one_line, recipe_dataclass
from manifests.files.archive import is_torchscript, read_tensors
from manifests.files.weights import files_fingerprint, tensors_sha256
from manifests.recipe import make_recipe, nearest
from shards.sources.classes import ClassList, find_classes, load_templates

from .zero_shot import cached_head

LOCAL = "local-dir:"
RANDOM = "random"  # as weights: for trying out and measuring, without a file
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
    """open_clip: a model name, or `local-dir:FOLDER` (open_clip_config.json, weights, optional bpe.txt.gz). timm: a model name."""
    weights: Annotated[str | None, Location] = None
    """A checkpoint file (OpenAI's own archives are known as such; other files of its weights need a `…-quickgelu` model), a
    pretrained tag of open_clip such as `openai`, `pretrained` for timm's own, or `random` to try out and measure. None for `local-dir:`."""
    templates: Annotated[str | None, Location] = None
    """YAML file with `templates`, or `openai` for the 80 ImageNet templates. None: those of `source.classes`."""


class TeacherModel(nn.Module):
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
        """Images [B, 3, H, W] in [0, 1] -> logits [B, classes] float32.

        A canvas of another side than the model's is resized. On CUDA torch adds up the gradient of that in any order, so the last bits of
        an attack may differ from run to run there; a canvas of the model's own side repeats its bits.
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
            return self.scale * F.normalize(features.float(), dim=1) @ self.head


def load_teacher(
    settings: Teacher, classes: ClassList, device: torch.device | str = "cpu", *, with_head: bool = True
) -> TeacherModel:
    """Build the teacher that a recipe asks for, on a device. ``with_head=False``: for its fingerprint only, it cannot classify.

    Raises UserError for unknown names, missing or unreadable weights.
    """
    if settings.kind == "timm":
        return _timm_teacher(settings, classes).to(device)
    return _open_clip_teacher(settings, classes, torch.device(device), with_head=with_head).to(device)


def teacher_of_run(info: RunInfo) -> TeacherModel:
    """The teacher that a run was made with, on the CPU. Raises UserError when its files are not where run.json says."""
    classes, _ = find_classes(info.recipe["source"]["classes"])
    settings: Teacher = make_recipe(Teacher, info.recipe["teacher"], "run.json")
    return load_teacher(settings, replace(classes, names=tuple(info.classes)))


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 (first 16 hex digits) over every parameter and buffer of a model, and a teacher's ``made_from``.

    The zero-shot head is left out: it is computed, so its last bits depend on the processor. What it is computed from is covered.
    """
    tensors = {
        name: value
        for name, value in model.state_dict().items()
        if not (isinstance(model, TeacherModel) and name == "head")
    }
    made_from = json.dumps(getattr(model, "made_from", None), sort_keys=True)
    return tensors_sha256(tensors, made_from.encode())[:16]


def _open_clip_teacher(settings: Teacher, classes: ClassList, device: torch.device, *, with_head: bool) -> TeacherModel:
    if settings.model.startswith(LOCAL):
        folder = find_file(settings.model.removeprefix(LOCAL), "teacher.model")
        model, tokenizer, bpe = _load_local_folder(folder)
        architecture = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    else:
        model, tokenizer = _load_open_clip(settings)
        architecture, bpe = settings.model, None
    model.eval()
    function = {"model": architecture, "quick_gelu": _has_quick_gelu(model), "tokenizer": bpe}
    if settings.weights == RANDOM:
        templates: Sequence[str] = ()
        head = F.normalize(
            torch.randn(_embed_dim(architecture), len(classes.names), generator=torch.Generator().manual_seed(0)), dim=0
        )
    else:
        templates = _templates(settings, classes)
        head = (
            cached_head(model.to(device), tokenizer, classes.names, templates, function)
            if with_head
            else torch.empty(0)
        )
    size = model.visual.image_size
    preprocess = getattr(model.visual, "preprocess_cfg", {})
    return TeacherModel(
        model,
        size=size[0] if isinstance(size, tuple | list) else size,
        mean=preprocess.get("mean", OPENAI_MEAN),
        std=preprocess.get("std", OPENAI_STD),
        head=head,
        scale=float(
            model.logit_scale.detach().exp()
        ),  # SigLIP's logit_bias, the same for all classes, changes no softmax and no argmax
        made_from={**function, "classes": classes.names, "templates": templates},
    )


def _embed_dim(architecture: str | Mapping[str, Any]) -> int:
    """Width of the features that images and texts share; the text tower says it in another place in every kind of model."""
    import open_clip

    config: Any = open_clip.get_model_config(architecture) if isinstance(architecture, str) else architecture
    return int(config["embed_dim"])


def _has_quick_gelu(model: nn.Module) -> bool:
    """The same weights are another function with the other activation, and the model's name does not tell which."""
    return any(type(module).__name__ == "QuickGELU" for module in model.modules())


def _load_local_folder(folder: Path) -> tuple[Any, object, str | None]:
    """(model, tokenizer, fingerprint of the folder's own vocabulary) of open_clip's ``local-dir:`` layout."""
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")) and not any(folder.glob("*.p*t*")):
        raise UserError(f"teacher.model: {folder}: holds no weights (open_clip_model.safetensors)")
    vocabulary = folder / "bpe.txt.gz"
    if not vocabulary.exists():
        return *_create(f"{LOCAL}{folder}", None), None
    return *_create(f"{LOCAL}{folder}", None, bpe_path=str(vocabulary)), files_fingerprint([vocabulary])


def _load_open_clip(settings: Teacher) -> tuple[Any, object]:
    """(model, tokenizer) by name, with a pretrained tag, a checkpoint file, or random weights."""
    import open_clip

    name, weights = settings.model, settings.weights
    if name.startswith("hf-hub:"):
        return _create(name, None)  # the hub's directory holds the weights
    if name not in open_clip.list_models():
        raise UserError(f"teacher.model: open_clip knows no model {name!r}{nearest(name, open_clip.list_models())}")
    if weights is None:
        raise UserError("teacher.weights: name a checkpoint file or a pretrained tag such as openai")
    if weights == RANDOM:
        return _create(name, RANDOM)
    if weights in open_clip.list_pretrained_tags_by_model(
        name
    ):  # open_clip itself would only warn of the wrong activation
        return _create(
            name, weights, force_quick_gelu=bool(open_clip.get_pretrained_cfg(name, weights).get("quick_gelu"))
        )
    path = find_file(weights, "teacher.weights")
    if not is_torchscript(path):
        return _create(name, str(path), force_preprocess_cfg=_normalisation(name))
    model, tokenizer = _create(
        name, None, force_quick_gelu=True
    )  # OpenAI's own files; its models use QuickGELU throughout
    state = {
        name: value
        for name, value in read_tensors(path).items()
        if name not in ("input_resolution", "context_length", "vocab_size")
    }
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"teacher.weights: {path}: does not fit {name}: {one_line(error)}") from error
    return model, tokenizer


def _normalisation(name: str) -> dict[str, Any] | None:
    """Mean and deviation that all of open_clip's own weights of a model share: a file does not tell, and OpenAI's would be taken."""
    import open_clip

    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    found = {
        (tuple(config["mean"]), tuple(config["std"])) for config in configs if config.get("mean") and config.get("std")
    }
    return dict(zip(("mean", "std"), found.pop(), strict=True)) if len(found) == 1 else None


def _create(name: str, weights: str | None, *, bpe_path: str | None = None, **options: Any) -> tuple[Any, object]:
    """open_clip's model (options: of its `create_model`) and tokenizer; with random weights no tokenizer, which may be a download.

    Raises UserError for whatever open_clip or a download raises.
    """
    import open_clip

    before = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # open_clip logs every step of loading to the root logger
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(name, pretrained=None if weights == RANDOM else weights, **options)
        if weights == RANDOM:
            return model, None
        return model, open_clip.get_tokenizer(name, **({"bpe_path": bpe_path} if bpe_path else {}))
    except Exception as error:
        raise UserError(f"teacher: cannot load {name} with weights {weights}: {one_line(error, 300)}") from error
    finally:
        logging.getLogger().setLevel(before)


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

    if not timm.is_model(settings.model):
        raise UserError(
            f"teacher.model: timm knows no model {settings.model!r}{nearest(settings.model, timm.list_models())}"
        )
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
        path: Path = find_file(settings.weights, "teacher.weights")
        try:
            model.load_state_dict(load_weights(path))
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
    """timm's own weights, downloaded on first use. Raises UserError for a tag of another number of classes (its head would be random)."""
    import timm

    config: Any = model.pretrained_cfg
    if config.get("num_classes") != classes:
        raise UserError(
            f"teacher.weights: timm's {name} was trained on {config.get('num_classes')} classes, the class list has {classes}"
        )
    try:
        timm.models.load_pretrained(model, pretrained_cfg=config, num_classes=classes)
    except Exception as error:  # whatever a download raises
        raise UserError(f"teacher: cannot load timm's weights of {name}: {one_line(error, 300)}") from error
