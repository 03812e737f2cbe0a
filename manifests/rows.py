"""The rows of the record: one per source sample, in Parquet; one part file per shard, one sealed manifest per run."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from .errors import UserError, one_line

Status = Literal["verified", "rejected", "error"]

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # the sample's name in its tars
        ("shard", pa.int32()),
        ("label", pa.int32()),  # index into the class list; null when unreadable
        ("clean_pred", pa.int32()),  # teacher's top-1 on x, and its probability
        ("clean_prob", pa.float32()),
        ("dad_pred", pa.int32()),  # teacher's top-1 on x'' as stored, and its probability
        ("dad_prob", pa.float32()),
        ("status", pa.string()),  # verified: in the DAD tar; rejected: teacher's top-1 on x'' is not the label; error
        ("reason", pa.string()),  # why a sample is rejected or an error
        ("loss_clean", pa.float32()),  # teacher's cross-entropy against the label: on x,
        ("loss_attacked", pa.float32()),  # on the attacked image before the second discretization,
        ("loss_dad", pa.float32()),  # and on x'' as stored
        ("delta_l2", pa.float32()),  # L2 length of the perturbation, in pixels of [0, 1]
        # fraction of VQ codes that differ between Q(x) and x''; above 0 even without an attack, as Q is not idempotent
        ("codes_changed", pa.float32()),
        ("bytes", pa.int32()),  # size of the x'' image as stored, even if rejected
        ("clean_offset", pa.int64()),  # first header byte of the sample in the clean tar, null when absent,
        ("clean_size", pa.int32()),  # bytes up to the end of its last member's padding,
        ("clean_crc32", pa.uint32()),  # and zlib.crc32 of that range
        ("dad_offset", pa.int64()),
        ("dad_size", pa.int32()),
        ("dad_crc32", pa.uint32()),
    ]
)
_META = b"dad"


TAR_NAME = re.compile(r"(clean/clean|dad/dad)-[0-9]{6,}\.tar")


@dataclass(frozen=True, kw_only=True)
class TarRecord:
    """The record of one tar."""

    name: str  # relative to the run directory, e.g. "dad/dad-000003.tar"
    size: int  # bytes
    sha256: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """The record of one shard in its part file, beside the rows."""

    shard: int
    source: str  # name of the piece of the source that the shard was made from
    run: str  # fingerprint of the run (recipe, teacher, discretizer, classes, source)
    samples: int  # rows
    tars: tuple[TarRecord, ...]


def encode_rows(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> bytes:
    """Encode rows and metadata as a Parquet file; the same input gives the same bytes."""
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    return encode_table(table, meta)


def encode_table(table: pa.Table, meta: Mapping[str, Any]) -> bytes:
    table = table.replace_schema_metadata({_META: json.dumps(meta, sort_keys=True).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def encode_part(rows: Sequence[Mapping[str, Any]], record: PartRecord) -> bytes:
    return encode_rows(rows, asdict(record))


def decode_table(
    data: bytes, where: str, columns: Sequence[str] = tuple(SCHEMA.names)
) -> tuple[pa.Table, dict[str, Any]]:
    """Decode the rows (all columns or some) and the metadata of a Parquet file that this module encoded.

    Raises UserError naming ``where`` when the file is damaged or of another kind.
    """
    try:
        table = pq.ParquetFile(_copy(data)).read(list(columns))
        meta = json.loads((table.schema.metadata or {})[_META])
        if not isinstance(meta, dict):
            raise ValueError("its metadata is no mapping")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(f"{where}: damaged, or not a manifest of this project ({one_line(error)})") from error
    missing = [name for name in columns if name not in table.schema.names]
    if missing:
        raise UserError(f"{where}: columns missing: {', '.join(missing)}")
    try:
        return table.select(list(columns)).cast(pa.schema([SCHEMA.field(name) for name in columns])), meta
    except pa.ArrowException as error:
        raise UserError(f"{where}: columns of other types ({one_line(error)})") from error


def decode_tars(meta: Mapping[str, Any], where: str) -> list[TarRecord]:
    """The tars' records in a file's metadata. Raises UserError naming ``where`` and the field, or an odd name."""
    try:
        tars = pydantic.TypeAdapter(list[TarRecord]).validate_python(meta.get("tars"))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("tars", *first["loc"])))
        raise UserError(f"{where}: {field}: {first['msg'].lower()}; restore it or make the run anew") from error
    if odd := [tar.name for tar in tars if not TAR_NAME.fullmatch(tar.name)]:
        raise UserError(f"{where}: names {odd[0]!r}, which is no tar of a run directory")
    return tars


def decode_part(data: bytes, where: str, columns: Sequence[str] = tuple(SCHEMA.names)) -> tuple[pa.Table, PartRecord]:
    """Decode a part file: its rows (all columns or some) and its record. Raises UserError naming ``where``."""
    table, meta = decode_table(data, where, columns)
    tars = decode_tars(meta, where)
    try:
        record = pydantic.TypeAdapter(PartRecord).validate_python({**meta, "tars": tars})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: not a part file of this project ({field}: {first['msg'].lower()})") from error
    if record.samples != table.num_rows:
        raise UserError(f"{where}: says {record.samples} samples and holds {table.num_rows}")
    return table, record


def _copy(data: bytes) -> pa.Buffer:
    """Copy into Arrow-owned memory: if Arrow's threads still hold Python-owned bytes at exit, the process aborts."""
    sink = pa.BufferOutputStream()
    sink.write(data)
    return sink.getvalue()
