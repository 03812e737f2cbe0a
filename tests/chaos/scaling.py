"""``python -m tests.chaos.scaling``: images/s of one worker on one core and of two on two, in turn; the ratio counts.

Timed from the first claim to the last part file: loading the models happens once per worker and is left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from manifests import RunDir
from manifests.claims import look


@click.command()
@click.option("--data", default="data/renditions/train", show_default=True, help="The demo's composed images.")
@click.option("--images", default=1500, show_default=True, help="How many of them, in shards of 100.")
@click.option("--turns", default=2, show_default=True)
@click.option("--workers", default=2, show_default=True)
def main(data: str, images: int, turns: int, workers: int) -> None:
    """Compare one worker with several."""
    with tempfile.TemporaryDirectory(prefix="dad-scaling-") as folder:
        source = subset(Path(data), images, Path(folder) / "source")
        for turn in range(turns):
            one, many = (speed(source, count, Path(folder) / f"run-{turn}-{count}") for count in (1, workers))
            click.echo(f"1 worker {one:.1f} images/s, {workers} workers {many:.1f} images/s: {many / one:.2f}x")


def subset(data: Path, images: int, target: Path) -> Path:
    """The first images, by the order of their tars' members."""
    import tarfile

    target.mkdir()
    left = images
    for path in sorted(data.glob("*.tar")):
        with tarfile.open(path) as tar, tarfile.open(target / path.name, "w") as part:
            for member in tar:
                left -= member.name.endswith(".cls")
                part.addfile(member, tar.extractfile(member))
                if not left:
                    return target
    return target


def speed(source: Path, workers: int, out: Path) -> float:
    """Images per second of so many workers on as many cores, with one thread each for the models."""
    options = [
        "--set",
        "threads=1",
        "--set",
        "codec_threads=1",
        "--set",
        "source.shard_size=100",
        "--workers",
        str(workers),
    ]
    command = [sys.executable, "-m", "pipeline", "generate", "--data", str(source), "--out", str(out), *options]
    cores = sorted(os.sched_getaffinity(0))[:workers]
    process = subprocess.Popen(
        ["taskset", "--cpu-list", ",".join(map(str, cores)), *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    store = RunDir(out).store
    while process.poll() is None and not look(store).running:
        time.sleep(0.02)
    began = time.time()
    _, err = process.communicate()
    if process.returncode:
        raise click.ClickException(err)
    ended = max(path.stat().st_mtime for path in (out / "manifest").iterdir())
    rate = RunDir(out).info().samples / (ended - began)
    shutil.rmtree(out)
    return rate


if __name__ == "__main__":
    main()
