"""Sources of other people's making: Parquet files as the Hub has them, tars as plain tools write them."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests import Store

LAYOUTS = ("folders", "tars", "parquet")
HubRow = tuple[bytes | None, str | None, int | None]  # image bytes, image path, label


@pytest.fixture(scope="session")
def write_hub() -> Callable[..., None]:
    """`write_hub_parquet`."""
    return write_hub_parquet


def write_hub_parquet(path: Path, rows: Sequence[HubRow], names: Sequence[str] | None = None, group: int = 10) -> None:
    """A file as `imagenet-1k` on the Hub: struct image{bytes, path}, int64 label, names in ``huggingface`` metadata."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata: dict[str, Any] = {}
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        metadata["huggingface"] = json.dumps({"info": {"features": features}})
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)
    table = pa.Table.from_pylist(
        [{"image": {"bytes": data, "path": name}, "label": label} for data, name, label in rows], schema=schema
    )
    pq.write_table(table, path, row_group_size=group)


Labelled = tuple[str, bytes, int]  # key, image, label


def write_layout(
    url: str | Path, kind: str, samples: Sequence[Labelled], names: Sequence[str], ending: str = "png"
) -> str:
    """The same images in one of `LAYOUTS`, in two files or a folder per class, at a path or URL; returns that."""
    store = Store(url)
    halves = (samples[: len(samples) // 2], samples[len(samples) // 2 :])
    if kind == "folders":
        for key, data, label in samples:
            store.write(f"{names[label]}/{key}.{ending}", data)
    for number, half in enumerate(halves if kind != "folders" else ()):
        with tempfile.TemporaryDirectory() as place:
            file = Path(place, "file")
            if kind == "tars":
                with tarfile.open(file, "w") as tar:
                    for key, data, label in half:
                        for name, member in ((f"{key}.{ending}", data), (f"{key}.cls", str(label).encode())):
                            header = tarfile.TarInfo(name)
                            header.size = len(member)
                            tar.addfile(header, io.BytesIO(member))
                store.write(f"set-{number}.tar", file.read_bytes())
            else:
                write_hub_parquet(file, [(data, f"{key}.{ending}", label) for key, data, label in half], names, group=4)
                store.write(f"set-{number}.parquet", file.read_bytes())
    return store.url
