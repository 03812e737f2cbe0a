"""``python -m trainer``: stage 2, shards in, students out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from manifests.command import ProjectGroup, add_recipe_command, as_overrides, set_option

from .options import choice_options, chosen
from .recipes import DEMO


@click.group(cls=ProjectGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Distil students of any architecture from shards, evaluate them, compare them.

    \b
    python -m trainer train --student resnet18 --shards data/demo
    python -m trainer eval runs
    """


data_option = click.option(
    "--data",
    default="data/renditions",
    show_default=True,
    metavar="DIR",
    help="Folder or URL of evaluation sets: sub-folders of tars, Parquet files or class folders.",
)


@main.command()
@choice_options
@click.option(
    "--method",
    metavar="NAME",
    help="Training method; the recipe's temperature, weight and smoothing stay. The command `methods` lists them.",
)
@click.option("--seed", type=int, help="Seed of weights, order and augmentation; short for --set seed=….")
@click.option(
    "--out", metavar="DIR", help="Directory of the student.  [default: runs/STUDENT-METHOD-sSEED, or runs/RECIPE-…]"
)
@set_option
def train(
    recipe: str | None,
    student: str | None,
    shards: str | None,
    method: str | None,
    seed: int | None,
    out: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Train a student, or go on with one that was interrupted.

    \b
    On many devices: torchrun --nproc-per-node=8 -m trainer train …, or srun.
    """
    from .ranks.distributed import joined  # not at the top: it imports torch, and --help must be quick

    with joined():
        from .recipe import load

        recipe, named = chosen(recipe, student, shards)
        settings = load(recipe, [*named, *as_overrides({"method.name": method, "seed": seed}), *overrides])
        from .loop import train as run

        name = student or (settings.student if recipe == DEMO else Path(recipe).stem)
        run(settings, out or f"runs/{name}-{settings.method.name}-s{settings.seed}")


@main.command("eval")
@click.argument("runs", nargs=-1, metavar="[RUNS]…")
@data_option
@click.option("--out", default="reports", show_default=True, metavar="DIR", help="Folder for report.md and report.png.")
def evaluate(runs: tuple[str, ...], data: str, out: str) -> None:
    """Score students on all evaluation sets, in one table.

    RUNS are student directories, or folders of them.  [default: runs]
    """
    from .tables.compare import compare

    compare(runs or ("runs",), data, out)


@main.command("export")
@click.argument("run", metavar="RUN")
@click.argument("out", metavar="OUT")
@click.option("--onnx", is_flag=True, help="Write model.onnx too (pip install '.[onnx]').")
def export_student(run: str, out: str, onnx: bool) -> None:
    """Write a student as a folder for timm and the Hugging Face hub.

    RUN is a student directory. timm loads OUT as local-dir:OUT and, after an upload, as hf-hub:USER/NAME.
    """
    from .checkpoint import StudentDir
    from .export import export

    click.echo(f"{out}: {', '.join(export(StudentDir(run), out, onnx=onnx))}")
    click.echo(f'load it: timm.create_model("local-dir:{out}", pretrained=True)')


@main.command("demo-table")
@choice_options
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Students per method.")
@data_option
@click.option(
    "--out", default="runs/demo-table", show_default=True, metavar="DIR", help="Folder for the students and the report."
)
@set_option
def table(
    recipe: str | None,
    student: str | None,
    shards: str | None,
    seeds: int,
    data: str,
    out: str,
    overrides: tuple[str, ...],
) -> None:
    """Train plain, KD and DAD students with several seeds.

    Prints means ± standard errors. Takes about an hour on two cores.
    """
    from .study import demo_table

    recipe, named = chosen(recipe, student, shards)
    demo_table(recipe, seeds, out, data, [*named, *overrides])


@main.command()
def methods() -> None:
    """List the training methods with their needs and costs.

    The cost of a method is its number of passes per clean image.
    """
    from .tables.methods import methods_table

    click.echo(methods_table())


def _load(recipe: str, overrides: Sequence[str]) -> Any:
    from .recipe import load

    return load(recipe, overrides)


add_recipe_command(main, _load)


if __name__ == "__main__":
    main(prog_name="python -m trainer")
