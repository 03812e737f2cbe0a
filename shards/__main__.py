"""``python -m shards``: how fast this machine reads shards, and what shorter soft labels would lose."""

from __future__ import annotations

import os
import tempfile

import click

from manifests.command import ProjectGroup


@click.group(cls=ProjectGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The contract between the stages: reading shards."""


@main.command()
@click.option("--images", default=3000, show_default=True, type=click.IntRange(min=128))
@click.option("--shards", default=8, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--workers", default="0,1,2", show_default=True, metavar="N,N,…", help="Numbers of loader workers to try."
)
@click.option(
    "--repeats",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="Measurements of each, in turn; the best counts.",
)
@click.option(
    "--samples",
    default=1_281_167,
    show_default=True,
    type=click.IntRange(min=0),
    help="Samples of the manifest to plan; 1,000 a shard. 0: none.",
)
def bench(images: int, shards: int, workers: str, repeats: int, samples: int) -> None:
    """Compare a bare tar loop, webdataset, ImageFolder and this reader, and time the plan of a large run."""
    from .benchmark import PLANNED, measure, measure_plan

    numbers = _numbers(workers, "--workers")
    if not 0 <= min(numbers) <= max(numbers) <= shards:
        raise click.BadParameter(
            f"{workers}: from 0 to {shards}, so that each has a tar; raise --shards for more", param_hint="--workers"
        )
    if 0 < samples < PLANNED:
        raise click.BadParameter(f"{samples}: fewer than a batch of {PLANNED}; 0 plans nothing", param_hint="--samples")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DAD_CACHE"] = cache  # not the user's own, and so that the first opening is one
        measure(images, shards, numbers, repeats)
        if samples:
            measure_plan(samples, max(samples // 1000, 1))


@main.command()
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--k", "ks", default="10,50,200", show_default=True, metavar="K,K,…", help="Logits to keep.")
@click.option("--temperature", default=4.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
def topk(run: str | None, ks: str, temperature: float) -> None:
    """Say what soft labels would lose if RUN had been made with views.topk=K. Without RUN: those of a teacher like a zero-shot CLIP."""
    from .shortening import show

    show(run, _numbers(ks, "--k"), temperature)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 1,2,4", param_hint=option) from error


if __name__ == "__main__":
    main(prog_name="python -m shards")
