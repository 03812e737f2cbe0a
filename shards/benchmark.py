"""How fast this machine reads samples: a bare loop, webdataset, ImageFolder and this reader take turns in one run.

``make bench-read`` and ``python -m shards bench`` start it. All four decode the same JPEGs with PIL to uint8 batches.
"""

from __future__ import annotations

import hashlib
import itertools
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from manifests import RunDir, RunInfo
from manifests.rows import SCHEMA, encode_table
from manifests.rundir import MANIFEST, tar_name

from .codec import ImageFormat, decode_pixels, encode_array, encode_image, to_uint8
from .epochs.plan import plan_epoch
from .epochs.reader import TrainingReader
from .tar import TarWriter

BATCH = 64
PLANNED = 1024  # batch size of the large run that `measure_plan` plans
CLASSES = 1000
SIDE = 224
DETAIL = 0.1  # contrast of the fine structure of the pictures, as a share of full contrast


class BareTars(IterableDataset[Any]):
    """The least work that reading tars can be: standard library and PIL; no checks, no shuffling, no soft labels."""

    def __init__(self, tars: list[Path]) -> None:
        self.tars = tars

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        images, labels = [], []
        for path in self.tars[worker.id :: worker.num_workers] if worker else self.tars:
            with tarfile.open(path) as tar:
                for member in tar:
                    body = tar.extractfile(member)
                    if body is not None and member.name.endswith(".jpg"):
                        images.append(decode_pixels(body.read()))
                    elif body is not None and member.name.endswith(".cls"):
                        labels.append(int(body.read()))
                        if len(labels) == BATCH:
                            yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
                            images, labels = [], []
        if labels:
            yield torch.from_numpy(np.stack(images)), torch.tensor(labels)


def measure(images: int, shards: int, workers: tuple[int, ...], repeats: int) -> None:
    """Print images/s of each way to read, and the ratio to the bare loop with as many workers."""
    with tempfile.TemporaryDirectory() as folder:
        run, flat = Path(folder) / "run", Path(folder) / "images"
        size = write_run(run, flat, images, shards)
        click.echo(
            f"{images:,} JPEGs of {SIDE} px, {size / images / 1000:.1f} kB each, in {shards} tars; "
            f"batches of {BATCH}; best of {repeats}; {torch.get_num_threads()} threads in the main process"
        )
        click.echo(f"{'images/s (ratio to the bare loop)':36s}" + "".join(f"{n:>10d} workers" for n in workers))
        ways = {
            "bare loop over tars": lambda n: _loader(BareTars(sorted((run / "clean").glob("*.tar"))), n),
            "webdataset": lambda n: _webdataset(run, n),
            "torchvision ImageFolder": lambda n: _image_folder(flat, n),
            "this reader": lambda n: _reader(str(run), BATCH).batches(0, workers=n),
        }
        best = {(name, n): 0.0 for name in ways for n in workers}
        for _, n, (name, way) in itertools.product(range(repeats), workers, ways.items()):
            best[name, n] = max(best[name, n], _images_per_second(way(n)))
        bare = next(iter(ways))
        for name in ways:
            click.echo(
                f"{name:36s}"
                + "".join(f"{best[name, n]:>10,.0f} ({best[name, n] / best[bare, n]:4.2f})" for n in workers)
            )


def measure_plan(samples: int, shards: int) -> None:
    """Print the time and memory that opening and planning a large run take; its manifest is enough for that."""
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), samples, shards)
        size = (Path(folder) / MANIFEST).stat().st_size / 1e6
        click.echo(f"manifest of {samples:,} samples in {shards:,} shards, {size:.0f} MB")
        for label in ("opened for the first time", "opened again"):
            started = time.perf_counter()
            reader = _reader(folder, PLANNED)
            click.echo(f"  {label:36s} {time.perf_counter() - started:7.2f} s")
        reader.plan("clean", 0)
        started = time.perf_counter()
        plan_epoch(reader.datasets["clean"].shards, seed=0, epoch=0, window=16, stream="clean")
        click.echo(f"  {'one epoch planned':36s} {time.perf_counter() - started:7.2f} s")
        before = private_bytes()
        for epoch in range(1, 4):
            for step in range(reader.steps):
                reader.indices("clean", epoch, step)
        click.echo(f"  {'memory after 3 more epochs of plans':36s} {(private_bytes() - before) / 1e6:+7.1f} MB")


def private_bytes() -> int:
    """Memory that this process shares with no other, without mapped files."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Anonymous")


def write_run(run: Path, flat: Path, images: int, shards: int) -> int:
    """Write a sealed run of random smooth JPEGs with soft labels, and the same images as an ImageFolder.

    Returns the bytes of all JPEGs together.
    """
    directory, generator = RunDir(run), torch.Generator().manual_seed(0)
    info = _info(images, shards)
    directory.write_info(info)
    size = 0
    for shard in range(shards):
        tars, rows = {"clean": TarWriter(), "dad": TarWriter()}, []
        for n in range(images * shard // shards, images * (shard + 1) // shards):
            label = n % CLASSES
            jpeg = encode_image(_picture(generator), ImageFormat())
            logits = torch.randn(CLASSES, generator=generator).half().numpy()
            extent = tars["clean"].add(
                f"k{n:08d}", {"jpg": jpeg, "cls": str(label).encode(), "logits.npy": encode_array(logits)}
            )
            row = {"key": f"k{n:08d}", "shard": shard, "label": label, "status": "rejected"}
            rows.append(row | {f"clean_{field}": value for field, value in asdict(extent).items()})
            path = flat / f"{label:04d}" / f"{n:08d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)
            size += len(jpeg)
        finished = {stream: (tar.close(), tar.samples) for stream, tar in tars.items()}
        directory.commit(shard, rows, finished, source="benchmark", run=info.fingerprint)
    directory.seal(info, range(shards))
    return size


def write_manifest(run: Path, samples: int, shards: int, *, sorted_by_class: bool = False) -> None:
    """Write the ``run.json`` and ``manifest.parquet`` of a sealed run, without its tars."""
    directory = RunDir(run)
    number = np.arange(samples)
    label = number * CLASSES // samples if sorted_by_class else number % CLASSES
    shard = number * shards // samples
    columns: dict[str, Any] = {
        "key": [f"n{c:08d}-n{c:08d}_{n}" for n, c in enumerate(label.tolist())],
        "shard": shard,
        "label": label,
        "status": ["rejected"] * samples,
        "clean_offset": (number - np.searchsorted(shard, shard)) * 22_528,
        "clean_size": np.full(samples, 22_528),
        "clean_crc32": np.random.default_rng(0).integers(0, 1 << 32, samples, dtype=np.uint32),
    }
    table = pa.table(
        {f.name: pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(samples, f.type) for f in SCHEMA}
    )
    info = _info(samples, shards)
    tars = [
        {"name": tar_name("clean", s), "size": 22_528_000, "sha256": "0" * 64, "samples": samples // shards}
        for s in range(shards)
    ]
    data = encode_table(table, {"run": info.fingerprint, "tars": tars})
    directory.store.write(MANIFEST, data)
    info = _info(samples, shards, counts={"rejected": samples}, manifest_sha256=hashlib.sha256(data).hexdigest())
    directory.write_info(info)


def _info(samples: int, shards: int, **sealed: Any) -> RunInfo:
    return RunInfo(
        recipe={"canvas": SIDE}, identity={}, fingerprints={"source": "benchmark"}, versions={},
        classes=[f"class {n}" for n in range(CLASSES)], shards=shards, samples=samples, **sealed,
    )  # fmt: skip


def _picture(generator: torch.Generator) -> torch.Tensor:
    """Smooth colours with some detail, which make a JPEG of about 18 kB at quality 95."""
    coarse = F.interpolate(torch.rand(1, 3, 7, 7, generator=generator), SIDE, mode="bicubic")[0]
    fine = F.interpolate(torch.rand(1, 1, 56, 56, generator=generator), SIDE, mode="bicubic")[0]
    return to_uint8(coarse + DETAIL * (fine - 0.5))


def _reader(run: str, batch_size: int) -> TrainingReader:
    return TrainingReader(run, batch_size=batch_size, streams=("clean",))


def _loader(dataset: Dataset[Any], workers: int, batch: int | None = None, shuffle: bool = False) -> Iterable[Any]:
    return DataLoader(dataset, batch_size=batch, shuffle=shuffle, num_workers=workers)


def _webdataset(run: Path, workers: int) -> Iterable[Any]:
    import webdataset as wds

    tars = [str(path) for path in sorted((run / "clean").glob("*.tar"))]
    dataset = (
        wds.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(1000)
        .decode("rgb8")
        .to_tuple("jpg", "cls", "logits.npy")
        .batched(BATCH)
    )
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers)


def _image_folder(flat: Path, workers: int) -> Iterable[Any]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    return _loader(ImageFolder(str(flat), PILToTensor()), workers, BATCH, shuffle=True)


def _images_per_second(batches: Iterable[Any]) -> float:
    """Images/s over a whole epoch, including the start of the workers."""
    started, images = time.perf_counter(), 0
    count: Callable[[Any], int] = lambda batch: len(batch["clean"].keys if isinstance(batch, dict) else batch[0])  # noqa: E731
    for batch in batches:
        images += count(batch)
    return images / (time.perf_counter() - started)
