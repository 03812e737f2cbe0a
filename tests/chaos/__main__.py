"""``make chaos N=50 SEED=1``: kill stage 1 N times at random moments, fill its disk, take it away, set its clock back.

Each time nothing wrong stands under a final name, and the same command ends in the bytes of an undisturbed run.
A kill takes about two seconds, five where a worker is killed. The first thing that is not so ends it with status 1.
"""

from __future__ import annotations

import random
import secrets
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from manifests.progress import progress
from pipeline.generate import make_shards

from ..conftest import World, build_world, digests
from .disks import clock_set_back, disk_full, read_only
from .kills import KILLS, check_finished, check_survivors, quietly


@click.command()
@click.option("--kills", default=50, show_default=True, help="How often to kill.")
@click.option("--seed", type=int, help="Of the moments. [default: another one every time]")
def main(kills: int, seed: int | None) -> None:
    """Disturb stage 1 and compare what it makes with what it makes undisturbed."""
    torch.set_num_threads(1)
    seed = secrets.randbelow(2**31) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="dad-chaos-"))
    click.echo(f"seed {seed}, in {folder}")
    (folder / "world").mkdir()
    world = build_world(folder / "world")
    quietly(make_shards, world.load(), str(folder / "whole"))
    whole = digests(folder / "whole")
    survived = disturb(world, folder, whole, kills, random.Random(seed))
    for name, test in (
        ("disk full", disk_full),
        ("disk read-only", read_only),
        ("clock set back a day", clock_set_back),
    ):
        try:
            test(world, folder, whole)
            survived[name] += 1
        except subprocess.CalledProcessError as error:
            click.echo(f"skipped: {name}: cannot mount here ({error.stderr.strip()})", err=True)
    for name, count in survived.items():
        click.echo(f"{count:5d}  {name}")
    click.echo(
        f"all {survived.total()} survived: no wrong byte under a final name, every end that of an undisturbed run"
    )
    shutil.rmtree(folder)


def disturb(
    world: World,
    folder: Path,
    whole: dict[str, str],
    kills: int,
    rng: random.Random,
    kinds: Sequence[str] = tuple(KILLS),
) -> Counter[str]:
    """Kill ``kills`` times, and finish the run and begin another now and then. Returns how many were survived by kind.

    A kill that comes when the command has already ended does not count, and another takes its place.
    """
    survived: Counter[str] = Counter()
    out = folder / "run-0"
    with progress(kills, "killing", "kill") as bar:
        while survived.total() < kills:
            name = rng.choice(kinds)
            died = KILLS[name](world, out, rng)
            check_survivors(out, whole)
            if not died or rng.random() < 0.3 or survived.total() == kills - 1:
                check_finished(world, out, whole)
                shutil.rmtree(out)
                out = folder / f"run-{int(out.name[4:]) + 1}"
            survived[name] += died
            bar.update(died)
    return survived


if __name__ == "__main__":
    main()
