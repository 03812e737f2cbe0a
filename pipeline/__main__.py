"""``python -m pipeline``: stage 1, images in, shards out."""

from __future__ import annotations

import os
import signal

# torch takes a second to import, and Ctrl-C in there would print a stack trace; later ProjectGroup sets its handlers
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\ninterrupted before anything was done\n"), os._exit(130)))

import secrets
import time
from pathlib import Path

import click

from manifests.command import ProjectGroup, add_recipe_command, as_overrides, recipe_option_of, set_option

from .recipe import FOLDER, load


@click.group(cls=ProjectGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Turn a labelled image set into shards of verified discrete adversarial images with a teacher's soft labels.

    \b
    python -m pipeline generate --recipe demo --out data/demo
    python -m pipeline status data/demo
    python -m pipeline verify data/demo
    """


recipe_option = recipe_option_of(FOLDER)
data_option = click.option(
    "--data", metavar="DIR", help="WebDataset tars, Parquet files or class folders; short for --set source.data=DIR."
)
out_argument = click.argument("out", metavar="OUT")


@main.command()
@recipe_option
@data_option
@click.option(
    "--out",
    default="data/demo",
    show_default=True,
    metavar="DIR|URL",
    help="The run directory, local or any fsspec URL.",
)
@click.option(
    "--launcher",
    type=click.Choice(["local", "slurm", "ray"]),
    help="Engine that runs the workers. [default: the recipe's]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of processes, array tasks or actors. [default: one per GPU]",
)
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Seal even if some shards could not be made; run.json records which and why.",
)
@set_option
def generate(
    recipe: str,
    data: str | None,
    out: str,
    launcher: str | None,
    workers: int | None,
    allow_missing: bool,
    overrides: tuple[str, ...],
) -> None:
    """Make the shards of a recipe that are missing. The same command on another machine shares the work."""
    options = {"source.data": data, "launch.launcher": launcher, "launch.workers": workers}
    settings = load(recipe, [*as_overrides(options), *overrides])
    from .generate import make_shards  # here, so that --help does not wait for torch and matplotlib

    make_shards(settings, out, allow_missing=allow_missing)


@main.command()
@recipe_option
@data_option
@click.option(
    "--out",
    default="data/demo",
    show_default=True,
    metavar="DIR|URL",
    help="The run directory that `generate` would write.",
)
@set_option
def plan(recipe: str, data: str | None, out: str, overrides: tuple[str, ...]) -> None:
    """Forecast a run: images, work, hours on this device, bytes; and what is missing, with the fix. Writes nothing."""
    settings = load(recipe, [*as_overrides({"source.data": data}), *overrides])
    from .speed.forecast import forecast, show

    show(forecast(settings, out))


@main.command()
@out_argument
@click.option("--content", is_flag=True, help="Compare checksums too, not only sizes.")
@click.option("--watch", is_flag=True, help="Print again every 10 seconds until it is sealed.")
def status(out: str, content: bool, watch: bool) -> None:
    """Report on OUT from any machine: shards done, running, failed, missing, damaged; verified rate, speed, ETA."""
    from manifests import RunDir

    from .status import Survey, status_lines

    survey = Survey(RunDir(out))
    while True:
        state = survey.look(tars=True, content=content)
        click.echo("\n".join(status_lines(out, state)))
        if not watch or state.sealed:
            return
        time.sleep(10)


@main.command()
@out_argument
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Random samples of each stream that the teacher labels again; 0 for none.",
)
@click.option("--seed", type=int, help="Seed that chooses the samples. [default: drawn anew each time]")
@set_option
def verify(out: str, samples: int, seed: int | None, overrides: tuple[str, ...]) -> None:
    """Check every checksum, count and label of OUT, and re-infer random samples. Exits with 1 if anything fails."""
    from .verify import problems, reinfer, summary

    seed = secrets.randbelow(2**31) if seed is None else seed
    found = list(problems(out))
    if not found and samples:
        found = [f"{line} (--seed {seed})" for line in reinfer(out, samples, seed, overrides)]
    if found:
        click.echo("\n".join(f"FAILED {line}" for line in found))
        some = f"{len(found)} problem{'s' * (len(found) > 1)}"
        click.echo(f"{some}; `make shards` with the same recipe makes damaged shards anew")
        raise SystemExit(1)
    click.echo(summary(out))
    if samples:
        checked = f"up to {samples} random samples of each stream"
        click.echo(f"{out}: the teacher agrees with the stored labels and logits of {checked}")


@main.command("convert-vqgan")
@click.argument("source", metavar="IN", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", metavar="OUT.safetensors", type=click.Path(path_type=Path))
def convert(source: Path, target: Path) -> None:
    """Take the weights out of a VQGAN checkpoint, also one of Lightning's pickles, without running any code in it."""
    from .method.convert import convert_vqgan

    kept, left = convert_vqgan(source, target)
    others = f"left out {left} others (loss, optimizer)"
    click.echo(f"{target}: {kept} tensors; {others}. Use it with discretizer.weights={target}")


add_recipe_command(main, load)


if __name__ == "__main__":
    main(prog_name="python -m pipeline")
