"""The recipe of stage 2: one YAML file, one frozen dataclass tree. ``trainer/recipes/`` holds those that come with the project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from manifests import Execution, Location, load_recipe, recipe_dataclass

FOLDER = Path(__file__).parent / "recipes"
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


@recipe_dataclass
class Loss:
    """What the student minimizes."""

    objective: Literal["plain", "kd", "dad"] = "dad"
    """plain: cross-entropy. kd: plus distillation on clean images. dad: plus distillation on DAD images (paper eq. 9)."""
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, of both distillation terms."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """a, of both distillation terms."""


@recipe_dataclass
class Augmentation:
    """Random changes of the training images, the same kind for clean and DAD images."""

    flip: Share = 0.5
    """Probability of a horizontal flip."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Smallest side of a random square crop, as a fraction of the image; it is resized back. 1: no crop."""
    colour: Share = 0.0
    """Strength of colour jitter: brightness, contrast and saturation are scaled by random factors in 1 ± colour."""
    grey: Share = 0.0
    """Probability of turning an image grey."""


@recipe_dataclass
class Optimizer:
    """Any optimizer that timm knows, with a cosine schedule after a linear warm-up."""

    name: str = "adamw"
    """timm's name: sgd, adamw, lamb …"""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Not applied to biases and normalisation layers."""
    momentum: Share = 0.9
    """Of sgd."""
    warmup: Annotated[float, Field(ge=0)] = 0.5
    """Epochs of linear warm-up."""
    clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Largest gradient norm; None: no clipping."""


@recipe_dataclass
class Recipe:
    """Everything that decides what a student becomes."""

    shards: Annotated[str, Location] = "data/demo"
    """The run directory to learn from."""
    student: str = "resnet18"
    """Any timm model name."""
    loss: Loss = Loss()
    augmentation: Augmentation = Augmentation()
    optimizer: Optimizer = Optimizer()
    epochs: Positive = 10
    """Passes over the clean set; the DAD stream ends together with it."""
    batch: Positive = 64
    """Clean images per step. DAD images come in proportion, on top."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the exponential moving average of the weights, which is what is evaluated and exported. 0: none."""
    window: Positive = 16
    """Shards that are shuffled together."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of initial weights, order and augmentation."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device has it in hardware."""
    validation: str | None = None
    """WebDataset tars to choose the best checkpoint by (top-1). None: the last is the best."""
    device: Annotated[str, Execution] = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU when there is one."""
    workers: Annotated[int, Field(ge=0), Execution] = 0
    """Loader processes. 0: read in the training process."""
    threads: Annotated[int | None, Field(ge=1), Execution] = None
    """CPU threads of the model. None: all cores."""
    checkpoint_minutes: Annotated[float, Field(ge=0), Execution] = 1.0
    """Time between checkpoints inside an epoch; there is one after every epoch in any case."""
    check_shards: Annotated[bool, Execution] = True
    """Compare the sha256 of every tar before the first step. Reads are checked one by one in any case."""


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by file or name and apply ``field=value`` overrides."""
    return load_recipe(Recipe, name, FOLDER, overrides)
