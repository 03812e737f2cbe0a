"""The recipe of stage 1: one YAML file, one frozen dataclass tree. ``pipeline/recipes/`` holds the project's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from manifests import Execution, Location, RunDir, UserError, load_recipe, recipe_dataclass
from manifests.recipe import Locations, apply_overrides, as_tree, make_recipe
from manifests.rundir import RUN
from shards import ImageFormat
from shards.sources import ImageSource, NoSuchFile, find_source
from shards.sources.classes import ClassList, find_classes
from shards.sources.files import PIPE, expand, without_secrets
from shards.views import ViewSettings

from .method.attack import AttackSettings
from .method.discretizer import Discretizer
from .method.teacher import Teacher

# no control characters: a line break would begin a command of the job script
SlurmValue = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")] | int | bool
# options of sbatch that hold lines and words of the job's shell script
SLURM_PROGRAMS = ("setup", "teardown", "srun_args", "additional_parameters")
FOLDER = Path(__file__).parent / "recipes"


def _no_programs(options: dict[str, Any]) -> dict[str, Any]:
    if found := [name for name in SLURM_PROGRAMS if name in options]:
        raise ValueError(f"a recipe is data and starts no programs; {found[0]} is not taken")
    return options


@recipe_dataclass
class Source:
    """The labelled images to start from."""

    data: Annotated[str, Locations]
    """A folder or fsspec URL of WebDataset tars, Parquet files or class folders; or names of tars or Parquet files with
    braces (`train-{000000..001281}.tar`), separated by `::`; or, on the command line only, `pipe:COMMAND` per tar."""
    classes: Annotated[str, Location] = "imagenet-1k"
    """`imagenet-1k` (CLIP's names, the 1000 wnids as folders), or a YAML file: `classes` (names, in label order),
    optionally `folders` (an ImageFolder's folder names, in the same order) and `templates`."""
    shard_size: Annotated[int, Field(ge=1)] = 1000
    """Source samples per shard, about: tars are not split if they need not be. Small shards end a run evenly and lose
    little when a worker dies."""
    keys: Literal["name", "place"] = "name"
    """What a sample's key is made from. name: its own name (tar member, file path, Parquet `image.path`). place: file
    and number, for sources whose names repeat."""


@recipe_dataclass
class Output:
    """What the shards hold."""

    image: ImageFormat = ImageFormat()
    """Storage format of clean and DAD images."""
    clean_images: bool = True
    """False: the clean shards hold labels and logits only."""
    codes: bool = False
    """True: store the VQ codes of each DAD image as KEY.codes.npy (uint16)."""
    attacked_loss: bool = False
    """True: record the teacher's loss on the attacked image before the second discretization, for one more teacher
    forward."""


@recipe_dataclass
class Launch:
    """Who makes the shards. The result does not depend on it."""

    launcher: Annotated[Literal["local", "slurm", "ray"], Execution] = "local"
    """local: processes on this machine, one per GPU. slurm: an array job. ray: actors on the cluster of RAY_ADDRESS, or
    on this machine."""
    workers: Annotated[int | None, Field(ge=1), Execution] = None
    """local: number of processes; None: one per GPU, or one on the CPU. slurm: tasks of the array; None: 8.
    ray: actors; None: one per GPU of the cluster, or per `threads` of its CPUs."""
    retries: Annotated[int, Field(ge=0), Execution] = 2
    """How often a shard is tried again after it failed or its worker died."""
    slurm: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z_]+$")], SlurmValue], AfterValidator(_no_programs), Execution
    ] = Field(default_factory=dict)
    """Options of the array job by their sbatch names, with `_` for `-`: `partition`, `account`, `time` (minutes),
    `gpus_per_task` …"""


@recipe_dataclass
class Recipe:
    """Everything that decides what a run directory will hold, and how it is made."""

    source: Source
    teacher: Teacher
    discretizer: Discretizer
    attack: AttackSettings = AttackSettings()
    views: ViewSettings = ViewSettings()
    """Soft labels of several crops of each image (one teacher forward each), or of the whole canvas, as the paper."""
    output: Output = Output()
    canvas: Annotated[int, Field(ge=16)] = 224
    """Side of the square images, in pixels: the shorter side is resized to it, then the centre is cropped."""
    batch: Annotated[int, Field(ge=0)] = 64
    """Images per model call. 0: the smallest size that is about as fast as any, measured when the run begins. Part of
    the run's identity, because floating point sums depend on it."""
    compile: bool = False
    """torch.compile for both models: fewer passes over memory, minutes of warm-up. Changes last bits of the result."""
    precision: Literal["auto", "bf16", "fp32"] = "bf16"
    """Number format of the models' forward and backward passes; losses, logits and the perturbation are float32. auto:
    bf16 if the device has it in hardware, else fp32, decided when the run begins. Part of the run's identity."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seeds the random starts, together with each sample's key."""
    max_errors: Annotated[float, Field(ge=0, le=1), Execution] = 0.01
    """Share of samples that may fail (unreadable, wrong label); above it the command exits non-zero."""
    device: Annotated[str, Execution] = "auto"
    """cpu, cuda, cuda:1 …; auto: a GPU when there is one, else the CPU."""
    threads: Annotated[int | None, Field(ge=1), Execution] = None
    """CPU threads of the models. None: all cores, divided among the workers of a machine."""
    codec_threads: Annotated[int | None, Field(ge=1), Execution] = None
    """CPU threads that decode the sources, and as many that encode x'', beside the models. None: half of the cores, at
    most 16."""
    launch: Launch = Launch()
    """Who makes the shards."""


def as_published(recipe: Recipe) -> dict[str, Any]:
    """Turn a recipe into a tree for run.json and the dataset card; secrets in `source.data` are left out."""
    tree = as_tree(recipe)
    tree["source"]["data"] = without_secrets(recipe.source.data)
    return tree


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by file or name and apply ``field=value`` overrides. Raises UserError."""
    recipe = load_recipe(Recipe, name, FOLDER, overrides)
    with _naming_the_source():
        commands = any(url.startswith(PIPE) for url in expand(recipe.source.data))
    if commands and not any(override.startswith("source.data=") for override in overrides):
        fix = "give `pipe:` on the command line, with --data"
        raise UserError(f"{name}: source.data: a recipe is data and starts no commands; {fix}")
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
    """A run's recipe, with overrides (for paths that differ here), and its class list."""
    tree = apply_overrides(run.info().recipe, overrides)
    recipe = make_recipe(Recipe, tree, run.store.where(RUN), overrides)
    return recipe, find_classes(recipe.source.classes)[0]
