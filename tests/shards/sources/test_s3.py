"""DATA=s3://…: tars and class folders behind a real S3 server make the same shards as on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifests import RunDir, Store
from pipeline.generate import make_shards


@pytest.mark.parametrize("kind", ["tars", "images"])
def test_a_source_on_s3(world, finished_run: Path, faults: dict[str, float], tmp_path: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    """Listed, planned and read like a folder, by its name or with braces; the tars that come out are the same to
    the byte.
    """
    folder = getattr(world, kind)
    store = Store(f"s3://bucket/source-{kind}")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        store.write(str(path.relative_to(folder)), path.read_bytes())
    sources = [store.url] if kind == "images" else [store.url, f"{store.url}/source-{{0..2}}.tar"]
    for number, data in enumerate(sources):
        out = tmp_path / str(number)
        make_shards(world.load(f"source.data={data}"), str(out))
        table, tars = RunDir(out).manifest()
        assert table.num_rows == 36
        if kind == "tars":
            assert tars == RunDir(finished_run).manifest()[1]
        else:
            assert dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True)) == world.labels
