"""The recipe of stage 1: one YAML file, one frozen dataclass tree. ``pipeline/recipes/`` holds those that come with the project."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from manifests import Execution, Location, RunDir, UserError, load_recipe, recipe_dataclass
from manifests.recipe import apply_overrides, as_tree, make_recipe
from manifests.rundir import RUN
from shards import ImageFormat
from shards.sources import ImageSource, NoSuchFile, find_source
from shards.sources.classes import ClassList, find_classes
from shards.sources.files import PIPE, expand, without_secrets
from shards.views import ViewSettings

from .method.attack import AttackSettings
from .method.discretizer import Discretizer
from .method.teacher import Teacher

SlurmValue = (
    Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")] | int | bool
)  # a line break would begin a command of the job script
FOLDER = Path(__file__).parent / "recipes"


@recipe_dataclass
class Source:
    """The labelled images to start from."""

    data: Annotated[str, Location]
    """A folder or fsspec URL of WebDataset tars, Parquet files or class folders; tars or Parquet files by name with
    braces (`train-{000000..001281}.tar`), several joined by `::`; or, on the command line only, `pipe:COMMAND` for each
    tar."""
    classes: Annotated[str, Location] = "imagenet-1k"
    """`imagenet-1k` (CLIP's names, the 1000 wnids as folders), or a YAML file: `classes` (names, in label order), optionally
    `folders` (an ImageFolder's folder names, in the same order) and `templates`."""
    shard_size: Annotated[int, Field(ge=1)] = 1000
    """Source samples per shard, about: whole tars stay whole where they can. Small shards make a short tail and lose little when a
    worker dies."""
    keys: Literal["name", "place"] = "name"
    """What a sample's key comes from. name: its own name (tar member, file path, Parquet `image.path`). place: file and number,
    for sources whose names repeat."""


@recipe_dataclass
class Output:
    """What goes into the shards."""

    image: ImageFormat = ImageFormat()
    """Storage format of clean and DAD images."""
    clean_images: bool = True
    """False: the clean shards hold labels and logits only."""
    codes: bool = False
    """True: store the VQ codes of each DAD image as KEY.codes.npy (uint16)."""
    attacked_loss: bool = False
    """True: record the teacher's loss on the attacked image before the second discretization. Costs one more teacher forward."""


@recipe_dataclass
class Launch:
    """Who makes the shards. Changes nothing about what comes out."""

    launcher: Annotated[Literal["local", "slurm", "ray"], Execution] = "local"
    """local: processes on this machine, one per GPU. slurm: an array job. ray: actors on the cluster of RAY_ADDRESS, or on this machine."""
    workers: Annotated[int | None, Field(ge=1), Execution] = None
    """local: how many processes; None: one per GPU, or one on the CPU. slurm: tasks of the array; None: 8. ray: actors; None: one per GPU
    of the cluster, or per `threads` of its CPUs."""
    retries: Annotated[int, Field(ge=0), Execution] = 2
    """How often a shard that fails, or whose worker dies, is tried again before it is reported."""
    slurm: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z_]+$")], SlurmValue], Execution] = Field(
        default_factory=dict
    )
    """Options of the array job by their sbatch names, with `_` for `-`: `partition`, `account`, `time` (minutes), `gpus_per_task` …"""


@recipe_dataclass
class Recipe:
    """Everything that decides what a run directory will hold."""

    source: Source
    teacher: Teacher
    discretizer: Discretizer
    attack: AttackSettings = AttackSettings()
    views: ViewSettings = ViewSettings()
    """Soft labels of several crops of each image (one forward pass of the teacher each), or of the whole canvas alone, as the paper."""
    output: Output = Output()
    canvas: Annotated[int, Field(ge=16)] = 224
    """Side of the square images, in pixels: shorter side resized to it, then centre-cropped."""
    batch: Annotated[int, Field(ge=0)] = 64
    """Images per model call. 0: found by itself when the run begins, the smallest that is about as fast as any. Part of the
    result's identity: floating point sums depend on it."""
    compile: bool = False
    """torch.compile for both models: fewer passes over memory, minutes of warm-up. Changes the last bits of the result."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the models' forward and backward passes. Losses, logits and the perturbation are float32."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the random starts, together with each sample's key."""
    max_errors: Annotated[float, Field(ge=0, le=1), Execution] = 0.01
    """Share of samples that may fail (unreadable, wrong label) before the command exits non-zero."""
    device: Annotated[str, Execution] = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU when there is one."""
    threads: Annotated[int | None, Field(ge=1), Execution] = None
    """CPU threads of the models. None: all cores, shared by the workers of a machine."""
    codec_threads: Annotated[int | None, Field(ge=1), Execution] = None
    """CPU threads that decode the sources, and as many that encode x'', beside the models. None: half of the cores, at most 16."""
    launch: Launch = Launch()
    """Where the shards are made."""


def as_published(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a tree for run.json and the dataset card, which others will read: without the secrets that `source.data` may hold."""
    tree = as_tree(recipe)
    tree["source"]["data"] = without_secrets(recipe.source.data)
    return tree


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by file or name and apply ``field=value`` overrides."""
    recipe = load_recipe(Recipe, name, FOLDER, overrides)
    with _naming_the_source():
        commands = any(url.startswith(PIPE) for url in expand(recipe.source.data))
    if commands and not any(override.startswith("source.data=") for override in overrides):
        raise UserError(
            f"{name}: source.data: a recipe is data and starts no commands; give `pipe:` on the command line, with --data"
        )
    return recipe


def source_of(recipe: Recipe, classes: ClassList) -> ImageSource:
    """The images that a recipe starts from. Raises UserError as `find_source` does, naming the field."""
    with _naming_the_source():
        return find_source(recipe.source.data, classes, recipe.source.shard_size, recipe.source.keys)


@contextmanager
def _naming_the_source() -> Iterator[None]:
    try:
        yield
    except NoSuchFile as error:
        raise UserError(f"source.data: {error}; set DATA=FOLDER (or --set source.data=FOLDER)") from error
    except UserError as error:
        raise type(error)(f"source.data: {error}") from error


def recipe_of(run: RunDir, overrides: tuple[str, ...]) -> tuple[Recipe, ClassList]:
    """The recipe that a run was made with, with overrides (for paths that differ here), and its class list."""
    tree = apply_overrides(run.info().recipe, overrides)
    recipe = make_recipe(Recipe, tree, run.store.where(RUN), overrides)
    return recipe, find_classes(recipe.source.classes)[0]
