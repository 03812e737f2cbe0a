"""The place of every sample of a stream, in one memory-mapped Arrow file whose pages all workers of a machine share.

The first use makes it from the sealed manifest and stores it in the cache folder. 1.28 M samples take about 60 MB.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests import RunDir, RunInfo, Store, UserError
from manifests.files.cache import cache_folder, lock, writing_cache
from manifests.recipe import fingerprint
from manifests.rows import TarRecord
from manifests.rundir import MANIFEST

COLUMNS = ("shard", "label", "offset", "size", "crc32")
UNUSED = 30 * 24 * 3600  # seconds; files that nobody read for so long are removed
VERSION = 3  # of the files in the cache folder
CRC = 4  # bytes of the checksum at the end of each file


@dataclass(frozen=True)
class StreamIndex:
    """The samples of one stream, in the order of the source. Its arrays are views of the mapped file."""

    keys: pa.StringArray
    shard: np.ndarray  # int32 [N], non-decreasing
    label: np.ndarray  # int32 [N]
    offset: np.ndarray  # int64 [N], bytes before the first header in the tar
    size: np.ndarray  # int32 [N], bytes
    crc32: np.ndarray  # uint32 [N]
    tars: dict[int, TarRecord]  # by shard
    name: str  # fingerprint of the manifest and the stream

    def __len__(self) -> int:
        return len(self.shard)


def open_index(run: RunDir, info: RunInfo, stream: str) -> StreamIndex:
    """The index of a sealed run's stream. If this machine has it already, ``info`` is all that it needs of the run.

    Raises UserError for a run that is not sealed, or whose manifest is not the sealed one.
    """
    name = fingerprint([info.manifest_sha256, info.fingerprint, info.classes, info.samples, stream, VERSION])
    table = kept_table(name, lambda: _index_table(run, info, stream))
    arrays = {column: table.column(column).chunk(0).to_numpy(zero_copy_only=True) for column in COLUMNS}
    tars = [TarRecord(**tar) for tar in json.loads(table.schema.metadata[b"tars"])]
    by_shard = {int(tar.name.rsplit("-", 1)[1].removesuffix(".tar")): tar for tar in tars}
    return StreamIndex(keys=table.column("key").chunk(0), **arrays, tars=by_shard, name=name)


def kept_table(name: str, make: Callable[[], pa.Table]) -> pa.Table:
    """Map the table of this name in the cache folder into memory. If it is missing or damaged, ``make`` it first.

    Of several processes one makes it. None replaces a whole file, for others have it mapped.
    Raises UserError when the cache folder is not writable.
    """
    folder = cache_folder("indexes")
    path = folder / f"{name}.arrow"
    if (table := read_mapped(path)) is not None:
        return table
    with lock(folder, name):
        if (table := read_mapped(path)) is None:  # otherwise another process was faster
            write_mapped(path, make())
            table = read_mapped(path)
    if table is None:
        raise UserError(f"{path}: cannot be read back; set DAD_CACHE to a folder on another disk")
    return table


def read_mapped(path: Path) -> pa.Table | None:
    """Map a table that `write_mapped` wrote; None if the file is missing or a byte of it has changed."""
    try:
        data = pa.memory_map(str(path)).read_buffer()
        body = data.slice(0, max(data.size - CRC, 0))
        if zlib.crc32(body).to_bytes(CRC, "little") != data.slice(body.size).to_pybytes():
            return None
        table = pa.ipc.open_file(pa.BufferReader(body)).read_all()
        with suppress(OSError):  # a read-only folder needs no marks of use: nothing is removed from it
            os.utime(path)
        return table
    except (FileNotFoundError, NotADirectoryError, pa.ArrowInvalid):
        return None


def write_mapped(path: Path, table: pa.Table) -> None:
    """Write a table as an Arrow file of exactly one batch, followed by its CRC32.

    Removes files that nobody has read for long. Raises UserError when the folder is not writable.
    """
    batch = pa.RecordBatch.from_arrays(
        [column.combine_chunks() if column.num_chunks else pa.array([], column.type) for column in table.columns],
        schema=table.schema,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    body = sink.getvalue()
    with writing_cache(path.parent):
        Store(path.parent).write(path.name, b"".join([body, zlib.crc32(body).to_bytes(CRC, "little")]))
    for other in path.parent.glob("*.arrow"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - other.stat().st_mtime > UNUSED:
                other.unlink()  # its pages stay with a process that has it mapped


def _index_table(run: RunDir, info: RunInfo, stream: str) -> pa.Table:
    columns = {"key": "key", "shard": "shard", "label": "label"} | {
        name: f"{stream}_{name}" for name in ("offset", "size", "crc32")
    }
    table, tars = run.manifest(list(columns.values()), info)
    table = table.rename_columns(list(columns))
    if table.column("offset").null_count:
        table = table.filter(pc.is_valid(table.column("offset")))
    if empty := [name for name in columns if table.column(name).null_count]:
        raise UserError(f"{run.store.where(MANIFEST)}: {stream} samples without {empty[0]}; make the run anew")
    if wrong := [name for name in ("shard", "offset", "size") if len(table) and pc.min(table.column(name)).as_py() < 0]:
        raise UserError(
            f"{run.store.where(MANIFEST)}: {stream} samples of negative {wrong[0]}; restore it or make the run anew"
        )
    described = [asdict(tar) for tar in tars if tar.name.startswith(f"{stream}/")]
    return table.replace_schema_metadata({b"tars": json.dumps(described).encode()})
