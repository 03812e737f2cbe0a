"""One set of images as an ImageFolder, as WebDataset tars and as Parquet files: what is recorded of it does not
depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests import RunDir
from pipeline.generate import make_shards
from tests.conftest import CLASSES

PLACE = ("key", "shard", "clean_offset", "dad_offset")  # what a layout may decide
WITH_KEY = ("clean_crc32", "dad_crc32", "clean_size", "dad_size")  # of tar members, whose names begin with the key
# Neighbours in a batch may decide the last bits of a sum, and the layouts order their samples differently
ALONE = ("batch=1", "attack.random_start=0")


def records(run: Path, without: tuple[str, ...]) -> list[list[tuple[str, Any]]]:
    """The rows of a run without some columns, in an order that depends on the others alone."""
    rows = RunDir(run).manifest()[0].to_pylist()
    return sorted(([(name, value) for name, value in row.items() if name not in without] for row in rows), key=repr)


@pytest.fixture(scope="module")
def hub(world, tmp_path_factory: pytest.TempPathFactory, write_hub: Callable[..., None]) -> Path:  # type: ignore[no-untyped-def]
    """The world's images in two Parquet files as the Hub has ImageNet: other names, and numbered by the order of
    its own names.
    """
    folder = tmp_path_factory.mktemp("hub")
    names = sorted(CLASSES)
    rows = []
    for number, (key, label) in enumerate(sorted(world.labels.items(), reverse=True)):
        wnid, _, name = key.partition("-")
        rows.append(
            ((world.images / wnid / f"{name}.jpg").read_bytes(), f"{number}_{wnid}.JPEG", names.index(CLASSES[label]))
        )
    for part, stretch in enumerate((rows[:25], rows[25:])):
        write_hub(folder / f"train-0000{part}-of-00002.parquet", stretch, names)
    return folder


def test_the_layout_does_not_matter(world, hub: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Every row is the same in all layouts but for key and place: label, verdict, reason, losses and lengths to the
    last bit.
    """
    runs = {name: tmp_path / name for name in ("folder", "tars", "parquet")}
    for out, data in zip(runs.values(), (world.images, world.tars, hub), strict=True):
        make_shards(world.load(*ALONE, f"source.data={data}"), str(out))
    folder, tars, parquet = (records(out, PLACE + WITH_KEY) for out in runs.values())
    assert folder == tars == parquet
    assert len(folder) == 36 and {dict(row)["status"] for row in folder} == {"verified", "rejected", "error"}
    # Folder and tars agree in their keys too, so in every byte of a sample
    assert records(runs["folder"], PLACE[1:]) == records(runs["tars"], PLACE[1:])
