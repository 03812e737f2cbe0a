"""The recipe of stage 2: one YAML file, one frozen dataclass tree. ``trainer/recipes/`` holds those that come with the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field

from manifests import Execution, Location, load_recipe, recipe_dataclass
from manifests.recipe import Locations, Positive

from .images.augmentation import Augmentation
from .methods import BY_NAME, DAD, AnyMethod, Method
from .optimizer import Optimizer
from .recipes import FOLDER


@recipe_dataclass
class Recipe:
    """Everything that decides what a student becomes."""

    RETIRED: ClassVar[Mapping[str, str]] = {
        "loss": "is now `method`, for example method: {name: dad, temperature: 4, weight: 0.5}"
    }

    shards: Annotated[str, Location] = "data/demo"
    """The run directory to learn from."""
    images: Annotated[str | None, Locations] = None
    """Your own images, for runs whose clean shards hold labels only: a folder or URL in any layout of stage 1's
    `source.data`, joined by key. None: images are in the shards."""
    student: str = "resnet18"
    """Any timm model name."""
    pretrained: str | None = None
    """Weights to start from: a checkpoint file, or a tag of the model that timm knows and downloads, such as augreg_in21k.
    A head over another number of classes is left out. None: random weights."""
    input: Annotated[int, Field(ge=8)] | None = None
    """Side of the student's input, in pixels. None: that of the stored images."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: probability of dropping the last residual branch; it rises linearly from 0 at the first."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the classifier."""
    forward: Literal["joint", "separate"] = "joint"
    """How clean and DAD images go through the student. joint: in one batch, whose mixture batch norm sees. separate: one after the
    other, each normalised by statistics of its own; the running statistics, which count afterwards, follow both."""
    method: AnyMethod = DAD()
    """How the student learns: `name` and that method's own settings (`python -m trainer methods` lists them)."""
    models: Annotated[dict[Literal["teacher", "discretizer"], dict[str, Any]], Location] = Field(default_factory=dict)
    """Where the run's own teacher and discretizer lie on this machine, for methods that ask them in every step: fields of
    `teacher` and `discretizer` that are laid over those of run.json."""
    augmentation: Augmentation = Augmentation()
    optimizer: Optimizer = Optimizer()
    epochs: Positive = 10
    """Passes over the clean set; the DAD stream ends together with it."""
    batch: Positive = 64
    """Clean images per step. DAD images come in proportion, on top."""
    accumulate: Annotated[int, Field(ge=1), Execution] = 1
    """Parts that each batch is passed through in, for less memory. The gradient is that of the whole batch, but for batch norm's
    statistics, which are those of a part. May change on the way, with the number of GPUs."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the exponential moving average of the weights, which is what is evaluated and exported. 0: none."""
    window: Positive = 16
    """Shards that are shuffled together."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of initial weights, order and augmentation."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device has it in hardware."""
    compile: bool = False
    """Compile the student with torch.compile: minutes at the start, faster steps on a GPU."""
    sync_bn: bool = False
    """Take batch norm's statistics over all GPUs of a run. Without effect on one. Only with it do the
    curves of students with batch norm agree between numbers of GPUs."""
    validation: Annotated[str | None, Locations] = None
    """Labelled images to choose the best checkpoint by (top-1): a folder or URL in any layout of stage 1's `source.data`.
    Class folders have the names of classes, ImageNet's wnids, or what a `classes.yaml` (`classes`, `folders`) beside the
    set says. None: the last checkpoint is the best."""
    device: Annotated[str, Execution] = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU when there is one."""
    workers: Annotated[int, Field(ge=0), Execution] = 0
    """Loader processes of each training process, of which there is one per GPU. 0: read in the training process."""
    threads: Annotated[int | None, Field(ge=1), Execution] = None
    """CPU threads of the model. None: all cores."""
    checkpoint_minutes: Annotated[float, Field(ge=0), Execution] = 1.0
    """Time between checkpoints inside an epoch; there is one after every epoch in any case."""
    cache_gb: Annotated[float, Field(gt=0), Execution] = 50
    """Most that shards on an object store may take on the local disk, in GiB; the folder is $DAD_CACHE, else ~/.cache/dad."""
    check_shards: Annotated[bool, Execution] = True
    """Compare the sha256 of every tar before the first step. Reads are checked one by one in any case."""
    wandb: Annotated[str | None, Execution] = None
    """Weights & Biases project to log to as well (pip install '.[wandb]'); kept on disk unless WANDB_MODE=online."""


SHARED = ("smoothing", "temperature", "weight")  # settings that mean the same in every method that has them


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by file or name and apply ``field=value`` overrides."""
    return load_recipe(Recipe, name, FOLDER, overrides, adapt=partial(_switch_method, overrides=overrides))


def with_shared_settings(name: str, method: Method) -> Method:
    """The method of that name with its defaults and, of another method's settings, those that mean the same in both."""
    kind = BY_NAME[name]
    shared = [field for field in SHARED if hasattr(kind(), field) and hasattr(method, field)]
    return kind(**{field: getattr(method, field) for field in shared})


def _switch_method(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe's tree with the settings of another method, where an override names one: only `SHARED` ones stay."""
    named = [value for field, _, value in (override.partition("=") for override in overrides) if field == "method.name"]
    old = tree.get("method")
    if not named or not isinstance(old, dict):
        return tree
    new = str(yaml.safe_load(named[-1]))
    if new == old.get("name") or new not in BY_NAME:
        return tree
    kept = {field: old[field] for field in SHARED if field in old and hasattr(BY_NAME[new](), field)}
    return tree | {"method": {"name": new} | kept}
