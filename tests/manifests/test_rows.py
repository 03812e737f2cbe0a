"""The rows of the record: nothing is lost on the way through Parquet, and damage is refused by name."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests import UserError
from manifests.rows import SCHEMA, PartRecord, TarRecord, decode_part, decode_table, encode_part, encode_rows

ROWS: list[dict[str, Any]] = [
    {"key": "a", "shard": 3, "label": 1, "status": "verified", "clean_prob": 0.5, "clean_offset": 0, "clean_size": 10,
     "clean_crc32": 2**32 - 1, "dad_offset": 2**40, "dad_size": 2**31 - 1, "dad_crc32": 0},
    {"key": "b", "shard": 3, "label": None, "status": "error", "reason": "unreadable image: ünïcode"},
]  # fmt: skip
RECORD = PartRecord(
    shard=3,
    source="source-3.tar",
    run="0123",
    samples=2,
    tars=(TarRecord(name="dad/dad-000003.tar", size=1, sha256="ab", samples=1),),
)


def test_roundtrip() -> None:
    """Rows and record come back as they went in; fields that a row leaves out are null."""
    table, record = decode_part(encode_part(ROWS, RECORD), "part")
    assert record == RECORD and table.schema.equals(SCHEMA)
    for before, after in zip(ROWS, table.to_pylist(), strict=True):
        assert after == {name: before.get(name) for name in SCHEMA.names}


def test_same_rows_same_bytes() -> None:
    """Equal input gives equal bytes, whatever the order of a row's or the metadata's fields."""
    turned = [dict(reversed(row.items())) for row in ROWS]
    assert encode_part(ROWS, RECORD) == encode_part(turned, RECORD)
    assert (
        encode_rows(ROWS, {"a": 1, "b": 2})
        == encode_rows(ROWS, {"b": 2, "a": 1})
        != encode_rows(ROWS, {"a": 1, "b": 3})
    )


def test_no_rows() -> None:
    table, _ = decode_table(encode_rows([], {}), "empty")
    assert table.num_rows == 0 and table.schema.names == SCHEMA.names


def parquet(table: pa.Table, meta: bytes | None = b"{}") -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"dad": meta} if meta is not None else None), buffer)
    return buffer.getvalue()


def whole() -> pa.Table:
    return decode_table(encode_rows(ROWS, {}), "whole")[0]


ODD = b'{"tars": [{"name": "clean/../../dev/zero", "size": 1, "sha256": "", "samples": 1}]}'  # which never ends


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "damaged"),
        (b"PAR1", "damaged"),
        (b"no parquet at all", "damaged"),
        (encode_part(ROWS, RECORD)[:-9], "damaged"),
        (parquet(whole(), None), "damaged, or not a manifest"),
        (parquet(whole(), b"{no json"), "damaged, or not a manifest"),
        (parquet(whole(), b"\xff\xfe"), "damaged, or not a manifest"),
        (parquet(whole().drop_columns(["label", "key"])), "columns missing: key, label"),
        (parquet(whole().set_column(2, "label", pa.array(["one", "two"]))), "part-7"),
        (parquet(whole().set_column(1, "shard", pa.array([2**40, 1]))), "part-7"),
        (parquet(whole()), "part-7: tars: input should be a valid list"),
        (parquet(whole(), b"[]"), "part-7"),
        (parquet(whole(), b'{"tars": 3}'), "part-7: tars: input should be a valid list"),
        (parquet(whole(), b'{"tars": [{"name": "x"}]}'), r"part-7: tars\.0\.size: field required"),
        (parquet(whole(), b'{"tars": []}'), r"part-7: not a part file of this project \(shard: field required\)"),
        (parquet(whole(), ODD), r"part-7: names 'clean/\.\./\.\./dev/zero', which is no tar of a run directory"),
        (encode_part(ROWS[:1], RECORD), "says 2 samples and holds 1"),
    ],
)
def test_damaged_or_foreign_files(data: bytes, reason: str) -> None:
    """Anything but a part file is refused in one line that names the file."""
    with pytest.raises(UserError, match=reason) as caught:
        decode_part(data, "part-7")
    assert str(caught.value).startswith("part-7: ") and "\n" not in str(caught.value)


def test_flipped_bits_never_crash() -> None:
    """A bit flipped anywhere gives rows or a UserError, never another exception."""
    data = encode_part(ROWS * 1, RECORD)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 300).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        with contextlib.suppress(UserError):
            decode_part(bytes(damaged), "part")


def test_more_columns_are_welcome() -> None:
    """A file of a later version with a column more still reads; the column is left out."""
    table = whole().append_column("future", pa.array([1, 2]))
    assert decode_table(parquet(table), "part")[0].schema.names == SCHEMA.names
