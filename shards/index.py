"""Where every sample of a stream lies, as one memory-mapped Arrow file: all workers and ranks of a machine share its pages.

Made from the sealed manifest on first use and kept in the cache folder. 1.28 M samples are about 60 MB.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests import RunDir, RunInfo, Store, UserError
from manifests.cache import cache_folder, writing_cache
from manifests.recipe import fingerprint
from manifests.rows import TarRecord
from manifests.rundir import MANIFEST

COLUMNS = ("shard", "label", "offset", "size", "crc32")
UNUSED = 30 * 24 * 3600  # seconds after which a file in the cache folder is removed
VERSION = 1  # of the files in the cache folder


@dataclass(frozen=True)
class StreamIndex:
    """The samples of one stream, in the order of the source. Arrays are views of the mapped file."""

    keys: pa.StringArray
    shard: np.ndarray  # int32 [N], non-decreasing
    label: np.ndarray  # int32 [N]
    offset: np.ndarray  # int64 [N], of the first header byte in the tar
    size: np.ndarray  # int32 [N], bytes
    crc32: np.ndarray  # uint32 [N]
    tars: dict[int, TarRecord]  # by shard
    name: str  # fingerprint of the manifest and the stream

    def __len__(self) -> int:
        return len(self.shard)


def open_index(run: RunDir, info: RunInfo, stream: str) -> StreamIndex:
    """The index of a sealed run's stream. Raises UserError for a run that is not sealed, or whose manifest is not the sealed one."""
    store = Store(cache_folder("indexes"))
    name = fingerprint([info.manifest_sha256, info.fingerprint, info.samples, stream, VERSION])
    path = Path(store.root) / f"{name}.arrow"
    sealed = run.store.exists(MANIFEST) and run.store.sha256(MANIFEST) == info.manifest_sha256
    table = read_mapped(path) if sealed else None
    if table is None:
        write_mapped(store, path.name, _index_table(run, stream))
        table = read_mapped(path)
        if table is None:
            raise UserError(f"{path}: cannot be read back; set DAD_CACHE to a folder on another disk")
    arrays = {column: table.column(column).chunk(0).to_numpy(zero_copy_only=True) for column in COLUMNS}
    tars = [TarRecord(**tar) for tar in json.loads(table.schema.metadata[b"tars"])]
    by_shard = {int(tar.name.rsplit("-", 1)[1].removesuffix(".tar")): tar for tar in tars}
    return StreamIndex(keys=table.column("key").chunk(0), **arrays, tars=by_shard, name=name)


def read_mapped(path: Path) -> pa.Table | None:
    """An Arrow file of one batch, mapped into memory; None when it is not there or not whole."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        with suppress(OSError):  # where the folder is read-only, nothing is removed either
            os.utime(path)
        return table
    except (FileNotFoundError, NotADirectoryError, pa.ArrowInvalid):
        return None


def write_mapped(store: Store, name: str, table: pa.Table) -> None:
    """Write a table as an Arrow file of exactly one batch, and remove files that were not read for long.

    Raises UserError when the cache folder is not writable.
    """
    batch = pa.RecordBatch.from_arrays(
        [column.combine_chunks() if column.num_chunks else pa.array([], column.type) for column in table.columns], schema=table.schema
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with writing_cache(Path(store.root)):
        store.write(name, memoryview(sink.getvalue()))
    for other in Path(store.root).glob("*.arrow"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - other.stat().st_mtime > UNUSED:
                other.unlink()  # a process that has it mapped keeps it


def _index_table(run: RunDir, stream: str) -> pa.Table:
    columns = {"key": "key", "shard": "shard", "label": "label"} | {name: f"{stream}_{name}" for name in ("offset", "size", "crc32")}
    table, tars = run.manifest(list(columns.values()))
    table = table.rename_columns(list(columns))
    if table.column("offset").null_count:
        table = table.filter(pc.is_valid(table.column("offset")))
    if empty := [name for name in columns if table.column(name).null_count]:
        raise UserError(f"{run.store.where(MANIFEST)}: {stream} samples without {empty[0]}; make the run anew")
    described = [asdict(tar) for tar in tars if tar.name.startswith(f"{stream}/")]
    return table.replace_schema_metadata({b"tars": json.dumps(described).encode()})
