"""``python -m shards``: measures how fast this machine reads shards, and what shorter soft labels lose."""

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
    help="Measurements of each reader, in turn; the best one counts.",
)
@click.option(
    "--samples",
    default=1_281_167,
    show_default=True,
    type=click.IntRange(min=0),
    help="Samples of a manifest whose epochs are planned, 1,000 per shard. 0: plan nothing.",
)
def bench(images: int, shards: int, workers: str, repeats: int, samples: int) -> None:
    """Compare a bare tar loop, webdataset, ImageFolder and this reader; time the plan of a large run."""
    from .benchmark import PLANNED, measure, measure_plan

    numbers = _numbers(workers, "--workers")
    if not 0 <= min(numbers) <= max(numbers) <= shards:
        raise click.BadParameter(
            f"{workers}: from 0 to {shards}, so that each has a tar; raise --shards for more", param_hint="--workers"
        )
    if 0 < samples < PLANNED:
        raise click.BadParameter(f"{samples}: fewer than a batch of {PLANNED}; 0 plans nothing", param_hint="--samples")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DAD_CACHE"] = cache  # an empty cache: the first opening must build its index
        measure(images, shards, numbers, repeats)
        if samples:
            measure_plan(samples, max(samples // 1000, 1))


@main.command()
@click.argument("run", metavar="[RUN]", required=False)
@click.option(
    "--k", "ks", default="10,50,200", show_default=True, metavar="K,K,…", help="Numbers of logits to store per label."
)
@click.option("--temperature", default=4.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
def topk(run: str | None, ks: str, temperature: float) -> None:
    """Say what the soft labels of RUN would lose with views.topk=K.

    Without RUN, the labels are those of an imitated zero-shot CLIP.
    """
    from .shortening import show

    show(run, _numbers(ks, "--k"), temperature)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,2,4", param_hint=option) from error


if __name__ == "__main__":
    main(prog_name="python -m shards")
