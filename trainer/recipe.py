"""The recipe of stage 2: one YAML file, one frozen dataclass tree. ``trainer/recipes/`` holds the project's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field

from manifests import Execution, Location, load_recipe, recipe_dataclass
from manifests.plain_yaml import load_plain
from manifests.recipe import Positive

from .images.augmentation import Augmentation
from .methods import BY_NAME, DAD, AnyMethod, Method
from .optimizer import Optimizer
from .recipes import FOLDER


@recipe_dataclass
class Recipe:
    """All settings of a training: what decides the student, and how it runs on this machine."""

    RETIRED: ClassVar[Mapping[str, str]] = {
        "loss": "is now `method`, for example method: {name: dad, temperature: 4, weight: 0.5}"
    }

    shards: Annotated[str, Location] = "data/demo"
    """The run directory to learn from."""
    images: Annotated[str | None, Location] = None
    """Your own images, for shards that hold labels only: a folder or URL in any layout of stage 1's `source.data`.
    Keys match them with the labels. None: the shards hold the images."""
    student: str = "resnet18"
    """Any timm model name."""
    pretrained: str | None = None
    """Weights to start from: a checkpoint file, or a tag of the model that timm downloads, such as augreg_in21k.
    A head for another number of classes is left out. None: random weights."""
    input: Annotated[int, Field(ge=8)] | None = None
    """Side of the student's input in pixels. None: the side of the stored images."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: probability of dropping the last residual branch, rising linearly from 0 at the first."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the classifier."""
    forward: Literal["joint", "separate"] = "joint"
    """How clean and DAD images go through the student. joint: in one batch, with common batch norm statistics.
    separate: one after the other, each with its own batch statistics; the running statistics follow both."""
    method: AnyMethod = DAD()
    """How the student learns: the `name` of a method, and its settings. `python -m trainer methods` lists them all."""
    models: Annotated[dict[Literal["teacher", "discretizer"], dict[str, Any]], Location] = Field(default_factory=dict)
    """Where the run's teacher and discretizer are on this machine, for methods that use them in training: fields of
    `teacher` and `discretizer` that override those in run.json, such as teacher.weights."""
    augmentation: Augmentation = Augmentation()
    optimizer: Optimizer = Optimizer()
    epochs: Positive = 10
    """Passes over the clean set. An epoch also uses the DAD set once."""
    batch: Positive = 64
    """Clean images per step, over all GPUs. DAD images are added in proportion."""
    accumulate: Annotated[int, Field(ge=1), Execution] = 1
    """Parts into which each batch is split, to save memory. The gradient is that of the whole batch; only batch norm
    takes its statistics from each part. May change when a run goes on, for example with the number of GPUs."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the moving average of the weights; the averaged student is evaluated and exported. 0: no average."""
    window: Positive = 16
    """Number of shards that are shuffled together."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initial weights, order and augmentation."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of forward and backward passes. auto: bf16 if the device supports it in hardware."""
    compile: bool = False
    """Compile the student with torch.compile: takes minutes at the start, makes steps on a GPU faster."""
    sync_bn: bool = False
    """Take batch norm's statistics over all GPUs. Without it, students with batch norm learn slightly differently
    on another number of GPUs. No effect on one GPU."""
    validation: Annotated[str | None, Location] = None
    """Labelled images whose top-1 chooses the best checkpoint: a folder or URL in any layout of `source.data`.
    Class folders have the names of the classes, ImageNet's wnids, or other names that a `classes.yaml` (`classes`,
    `folders`) beside the set translates. None: the last checkpoint counts as the best."""
    device: Annotated[str, Execution] = "auto"
    """cpu, cuda, cuda:1 … auto: a GPU if there is one."""
    workers: Annotated[int, Field(ge=0), Execution] = 0
    """Loader processes per GPU. 0: the training process reads the images itself."""
    threads: Annotated[int | None, Field(ge=1), Execution] = None
    """CPU threads for the student's computation. None: all cores."""
    checkpoint_minutes: Annotated[float, Field(ge=0), Execution] = 1.0
    """Minutes between checkpoints within an epoch. The end of an epoch always writes one."""
    cache_gb: Annotated[float, Field(gt=0), Execution] = 50
    """Local disk space for shards from an object store, in GiB. The folder is $DAD_CACHE, or else ~/.cache/dad."""
    check_shards: Annotated[bool, Execution] = True
    """Check the sha256 of every tar before the first step. Each sample is checked when it is read in any case."""
    wandb: Annotated[str | None, Execution] = None
    """Weights & Biases project to log to (pip install '.[wandb]'). Logs stay on disk unless WANDB_MODE=online."""


SHARED = ("smoothing", "temperature", "weight")  # these settings mean the same in every method that has them


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by file or name and apply ``field=value`` overrides. Raises UserError naming file and field."""
    return load_recipe(Recipe, name, FOLDER, overrides, adapt=partial(_switch_method, overrides=overrides))


def with_shared_settings(name: str, method: Method) -> Method:
    """The method ``name`` with its defaults, except for `SHARED` settings, which it takes over from ``method``."""
    kind = BY_NAME[name]
    shared = [field for field in SHARED if hasattr(kind(), field) and hasattr(method, field)]
    return kind(**{field: getattr(method, field) for field in shared})


def _switch_method(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """When an override names another method, drop the settings of the recipe's method that are not `SHARED`."""
    split = (override.partition("=") for override in overrides)
    named = [value for field, _, value in split if field.strip() == "method.name"]
    old = tree.get("method")
    if not named or not isinstance(old, dict):
        return tree
    try:
        new = str(load_plain(named[-1]))
    except yaml.YAMLError:
        return tree  # `apply_overrides` says what is wrong
    if new == old.get("name") or new not in BY_NAME:
        return tree
    shared = {field: old[field] for field in SHARED if field in old and hasattr(BY_NAME[new](), field)}
    return tree | {"method": {"name": new} | shared}
