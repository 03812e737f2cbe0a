"""A tiny sealed run directory, written through the contract alone: stage 2 needs nothing of stage 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from manifests import RunDir, RunInfo
from shards import ImageFormat, TarWriter, encode_image
from shards.codec import encode_array

CLASSES, SIDE, SHARDS, PER_SHARD = 5, 32, 3, 17
NAMES = [f"class {i}" for i in range(CLASSES)]


def write_run(out: Path, classes: int = CLASSES, *, clean_images: bool = True) -> Path:
    """Classes are colours, so that a few steps of training show; two of three samples have a DAD image."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 255, (classes, 3, 1, 1), generator=generator)
    run = RunDir(out)
    info = RunInfo(
        recipe={"canvas": SIDE, "output": {"image": {"format": "png"}}},
        identity={},
        fingerprints={"classes": str(classes)},
        classes=[f"class {i}" for i in range(classes)],
        shards=SHARDS,
        samples=SHARDS * PER_SHARD,
        versions={},
    )
    run.begin(info)
    for shard in range(SHARDS):
        tars = {"clean": TarWriter(), "dad": TarWriter()}
        rows = []
        for n in range(PER_SHARD):
            label = int(torch.randint(classes, (), generator=generator))
            key = f"s{shard}-{n:02d}"
            row = {"key": key, "shard": shard, "label": label, "status": "verified" if n % 3 else "rejected"}
            for stream, tar in tars.items():
                if stream == "dad" and n % 3 == 0:
                    continue
                noise = torch.randint(-20, 20, (3, SIDE, SIDE), generator=generator)
                image = (colours[label] + noise).clamp(0, 255).to(torch.uint8)
                logits = np.full(classes, -2, np.float16)
                logits[label] = 4
                members = (
                    {"png": encode_image(image, ImageFormat(format="png"))} if clean_images or stream == "dad" else {}
                )
                extent = tar.add(key, members | {"cls": str(label).encode(), "logits.npy": encode_array(logits)})
                row |= {
                    f"{stream}_offset": extent.offset,
                    f"{stream}_size": extent.size,
                    f"{stream}_crc32": extent.crc32,
                }
            rows.append(row)
        finished = {stream: (tar.close(), tar.samples) for stream, tar in tars.items()}
        run.commit(shard, rows, finished, source=f"s{shard}", run=info.fingerprint)
    run.seal(info, range(SHARDS))
    return out


def write_image_set(folder: Path, images: int = 20, classes: int = CLASSES) -> Path:
    """A folder with one tar of grey images with labels 0, 1, 2 …"""
    folder.mkdir(parents=True)
    tar = TarWriter()
    for n in range(images):
        image = torch.full((3, SIDE, SIDE), 10 * (n % classes), dtype=torch.uint8)
        tar.add(f"k{n:03d}", {"png": encode_image(image, ImageFormat(format="png")), "cls": str(n % classes).encode()})
    (folder / "set-000000.tar").write_bytes(tar.close())
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_run(tmp_path_factory.mktemp("tiny") / "run")
