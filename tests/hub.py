"""Sources of other people's making: Parquet files as the Hub has them, tars as plain tools write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

HubRow = tuple[bytes | None, str | None, int | None]  # image bytes, image path, label


@pytest.fixture(scope="session")
def write_hub() -> Callable[..., None]:
    """`write_hub_parquet`."""
    return write_hub_parquet


def write_hub_parquet(path: Path, rows: Sequence[HubRow], names: Sequence[str] | None = None, group: int = 10) -> None:
    """A file as `imagenet-1k` on the Hub has it: struct image{bytes, path}, int64 label, label names in the ``huggingface`` metadata."""
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
