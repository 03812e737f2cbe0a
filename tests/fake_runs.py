"""Sealed runs and image sets that no model has made, written through the contract's own parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manifests import RunDir, RunInfo
from shards import ImageFormat, TarWriter, encode_image
from shards.codec import encode_array

CLASSES, SIDE, SHARDS, PER_SHARD = 5, 32, 3, 17  # of the coloured run
NAMES = [f"class {n}" for n in range(CLASSES)]
PNG = ImageFormat(format="png")
STREAMS = ("clean", "dad")
Members = dict[str, bytes]
Edit = Callable[[str, str, Members], Members]  # (stream, key, members) -> members


@dataclass(frozen=True)
class FakeSample:
    """One sample: its row of the manifest, and what each of its streams holds."""

    key: str
    label: int
    status: str
    halves: dict[str, tuple[torch.Tensor, Any]]  # by stream: uint8 image [3, H, W], float16 logits [classes]


def seal_run(
    out: Path | str,
    info: RunInfo,
    shards: Sequence[Sequence[FakeSample]],
    edit: Edit | None = None,
    without_images: Sequence[str] = (),
) -> Path:
    """Write the samples as a sealed run. Streams in ``without_images`` hold labels and logits alone.

    ``edit`` may change the members of each sample before they are written; the manifest records what it makes.
    """
    run = RunDir(out)
    run.begin(info)
    for shard, samples in enumerate(shards):
        writers, rows = {stream: TarWriter() for stream in STREAMS}, []
        for sample in samples:
            row: dict[str, object] = {"key": sample.key, "shard": shard, "label": sample.label, "status": sample.status}
            for stream, (image, logits) in sample.halves.items():
                members = {} if stream in without_images else {"png": encode_image(image, PNG)}
                members |= {"cls": str(sample.label).encode(), "logits.npy": encode_array(logits)}
                members = edit(stream, sample.key, members) if edit else members
                extent = writers[stream].add(sample.key, members)
                place = {"offset": extent.offset, "size": extent.size, "crc32": extent.crc32}
                row |= {f"{stream}_{name}": value for name, value in place.items()}
            rows.append(row)
        tars = {stream: (writer.close(), writer.samples) for stream, writer in writers.items()}
        run.commit(shard, rows, tars, source=f"piece {shard}", run=info.fingerprint)
    run.seal(info, range(len(shards)))
    return Path(out)


def write_noise_run(
    out: Path | str,
    names: Sequence[str],
    sizes: Sequence[int] = (9, 12, 7, 11, 14),
    edit: Edit | None = None,
    images: bool = True,
    prefix: str = "",
) -> Path:
    """8 x 8 images of noise, classes ``names``, keys that begin with ``prefix``.

    Two of three samples are verified, one of each shard is an error.
    """
    rng, shards = np.random.default_rng(0), []
    for shard, size in enumerate(sizes):
        samples = []
        for n in range(size):
            label = int(rng.integers(len(names)))
            status = "error" if n == 3 else ("verified", "rejected", "verified")[n % 3]
            halves = {
                stream: (
                    torch.from_numpy(rng.integers(0, 256, (3, 8, 8), dtype=np.uint8)),
                    rng.normal(size=len(names)).astype(np.float16),
                )
                for stream in {"verified": STREAMS, "rejected": ("clean",), "error": ()}[status]
            }
            samples.append(FakeSample(f"{prefix}s{shard}-{n:02d}", label, status, halves))
        shards.append(samples)
    info = _info(8, list(names), shards, identity={"seed": 0}, fingerprints={"source": "plain"})
    return seal_run(out, info, shards, edit, without_images=() if images else STREAMS)


def write_coloured_run(out: Path | str, classes: int = CLASSES, *, clean_images: bool = True) -> Path:
    """Classes are colours, so that a few steps of training show; two of three samples have a DAD image."""
    generator = torch.Generator().manual_seed(0)
    colours, shards = torch.randint(0, 255, (classes, 3, 1, 1), generator=generator), []
    for shard in range(SHARDS):
        samples = []
        for n in range(PER_SHARD):
            label = int(torch.randint(classes, (), generator=generator))
            halves = {}
            for stream in STREAMS if n % 3 else STREAMS[:1]:
                noise = torch.randint(-20, 20, (3, SIDE, SIDE), generator=generator)
                logits = np.full(classes, -2, np.float16)
                logits[label] = 4
                halves[stream] = ((colours[label] + noise).clamp(0, 255).to(torch.uint8), logits)
            samples.append(FakeSample(f"s{shard}-{n:02d}", label, "verified" if n % 3 else "rejected", halves))
        shards.append(samples)
    names = [f"class {n}" for n in range(classes)]
    info = _info(SIDE, names, shards, identity={}, fingerprints={"classes": str(classes)})
    return seal_run(out, info, shards, without_images=() if clean_images else STREAMS[:1])


def write_image_set(folder: Path, images: int = 20, classes: int = CLASSES) -> Path:
    """A folder with one tar of grey images with labels 0, 1, 2 …"""
    folder.mkdir(parents=True)
    tar = TarWriter()
    for n in range(images):
        image = torch.full((3, SIDE, SIDE), 10 * (n % classes), dtype=torch.uint8)
        tar.add(f"k{n:03d}", {"png": encode_image(image, PNG), "cls": str(n % classes).encode()})
    (folder / "set-000000.tar").write_bytes(tar.close())
    return folder


def _info(canvas: int, names: list[str], shards: Sequence[Sequence[FakeSample]], **identity: Any) -> RunInfo:
    recipe = {"canvas": canvas, "output": {"image": {"format": "png"}}}
    samples = sum(map(len, shards))
    return RunInfo(recipe=recipe, classes=names, shards=len(shards), samples=samples, versions={}, **identity)
