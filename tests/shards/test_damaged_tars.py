"""Damaged and hostile tars: every one gives its samples or one line that names it."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests import UserError
from shards import Extent, TarWriter
from shards.tar import index_tar, parse_sample
from tests.shards.test_tar import build, make_tar, read


def many() -> tuple[bytes, list[int]]:
    """A tar of 6 samples with two members each, and the offsets of the headers."""
    data = make_tar(
        [(f"s{n}.{ext}", bytes(300 * n + 1)) for n in range(6) for ext in ("jpg", "cls")], format=tarfile.USTAR_FORMAT
    )
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data, [member.offset for member in tar]


@pytest.mark.parametrize("field", [0, 50, 100, 124, 136, 150, 156, 257, 345, 511])
@pytest.mark.parametrize("header", [0, 1, 5, 11])
def test_a_damaged_header_anywhere(header: int, field: int) -> None:
    """A flipped bit in a header (name, size, checksum, unused end) refuses the tar; no sample vanishes silently."""
    data, headers = many()
    damaged = bytearray(data)
    damaged[headers[header] + field] ^= 0x10
    with pytest.raises(UserError, match=r"t\.tar: not a readable tar"):
        read(bytes(damaged))


@pytest.mark.parametrize("header", [0, 1, 5, 11])
def test_a_wiped_header(header: int) -> None:
    """A header overwritten with zeros looks like the end of the archive; since samples follow, the tar is refused."""
    data, headers = many()
    for blocks in (1, 2):
        damaged = bytearray(data)
        damaged[headers[header] : headers[header] + 512 * blocks] = bytes(512 * blocks)
        if header < 11:
            with pytest.raises(UserError, match=r"t\.tar"):
                read(bytes(damaged))
        else:  # only the last member's zeros follow: no reader can notice, but the manifest's checksum does
            assert len(read(bytes(damaged))) == 6


def test_two_tars_in_one_file() -> None:
    """`cat a.tar b.tar`: the second is read too, or the file is refused; it never vanishes silently."""
    first, second = make_tar([("a.jpg", b"1")]), make_tar([("b.jpg", b"2")])
    try:
        found = read(first + second)
    except UserError as error:
        assert "t.tar" in str(error)
    else:
        assert set(found) == {"a", "b"}


def test_truncated_tars() -> None:
    """A tar cut anywhere, even just before its zeros, is refused. One block of zeros at the end is enough."""
    data, headers = many()
    end = len(data.rstrip(b"\0"))
    padded = headers[-1] + 512 + 3 * 512  # the last member holds 1501 bytes
    for cut in (
        1,
        100,
        511,
        513,
        headers[3] + 100,
        headers[3] + 512 + 10,
        *headers[1:],
        headers[6] + 600,
        end - 5,
        padded,
        padded + 511,
    ):
        for function in (read, lambda part: list(index_tar(io.BytesIO(part), "t.tar"))):
            with pytest.raises(UserError, match=r"t\.tar: not a readable tar"):
                function(data[:cut])
    assert len(read(data[: padded + 512])) == len(read(data)) == 6


@pytest.mark.parametrize(
    "data", [b"", b"x", b"hello" * 200, bytes(100), b"\x1f\x8b\x08" + bytes(2000), b"PK\3\4" + bytes(2000)]
)
def test_files_that_are_no_tar(data: bytes) -> None:
    with pytest.raises(UserError, match=r"t\.tar: not a readable tar \(.*\); is it whole, and uncompressed\?"):
        read(data)


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    """A .tar.gz named .tar is refused, for its offsets mean nothing."""
    import gzip

    with pytest.raises(UserError, match="uncompressed"):
        read(gzip.compress(many()[0]))


def test_an_empty_tar_has_no_samples() -> None:
    assert read(make_tar([])) == {} and read(TarWriter().close()) == {}


def test_random_damage_never_crashes() -> None:
    """Flipped bits and rewritten fields with valid checksums give samples or a UserError (USTAR, GNU, PAX)."""
    rng = np.random.default_rng(0)
    long = [("n" * 150 + f"{n}.jpg", bytes(100)) for n in range(3)]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = make_tar(
            [("a.jpg", bytes(10)), ("b.cls", b"1")] + (long if form != tarfile.USTAR_FORMAT else []), format=form
        )
        for _ in range(400):
            damaged = bytearray(data)
            block = 512 * int(rng.integers(len(data) // 512 - 4))
            for _ in range(int(rng.integers(1, 5))):
                damaged[block + int(rng.integers(512))] = int(rng.integers(256))
            if rng.random() < 0.7:
                damaged[block + 148 : block + 156] = b" " * 8
                damaged[block + 148 : block + 156] = b"%06o\0 " % sum(damaged[block : block + 512])
            try:
                read(bytes(damaged))
            except UserError as error:
                assert "\n" not in str(error)


def test_altered_samples_are_refused() -> None:
    """Reading by extent refuses any flipped bit, a short read and the bytes of another extent."""
    data, extents = build()
    extent = extents["B_2"]
    piece = bytearray(data[extent.offset : extent.offset + extent.size])
    for at in (0, 300, 512, 1500, extent.size - 1):
        piece[at] ^= 4
        with pytest.raises(
            UserError, match=rf"t\.tar: the sample at byte {extent.offset} is not the one that was written"
        ):
            parse_sample(bytes(piece), extent, "t.tar")
        piece[at] ^= 4
    with pytest.raises(UserError, match=rf"t\.tar: ends inside the sample at byte {extent.offset} \(truncated\)"):
        parse_sample(bytes(piece[:-1]), extent, "t.tar")
    other = extents["a-1"]
    with pytest.raises(UserError, match="not the one that was written"):
        parse_sample(
            data[other.offset : other.offset + other.size], Extent(other.offset, other.size, extent.crc32), "t.tar"
        )


HANGS = """
import sys, zlib
from manifests import UserError
from shards.tar import Extent, parse_sample
data = open(sys.argv[1], "rb").read()
try:
    parse_sample(data, Extent(0, len(data), zlib.crc32(data)), "t.tar")
except UserError as error:
    print("refused", error)
"""


def header_with_size(size: bytes) -> bytes:
    """A header whose size field is ``size``, with a valid checksum, and a block of data."""
    block = bytearray(tarfile.TarInfo("k.jpg").tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512)


@pytest.mark.parametrize("content", [b"not a header at all".ljust(1024, b"."), bytes(1024), b"short"])
def test_extents_that_hold_no_sample(content: bytes) -> None:
    """A hostile manifest may name any bytes with their right crc32; the UserError names the tar."""
    with pytest.raises(UserError, match=r"t\.tar"):
        parse_sample(content, Extent(0, len(content), zlib.crc32(content)), "t.tar")


def test_a_negative_size_does_not_hang(tmp_path: Path, forked: Callable[..., Any]) -> None:
    """A member of size -512, which tar's base-256 numbers allow, must not make a reader step back for ever."""
    import subprocess

    (tmp_path / "t").write_bytes(header_with_size(b"\xff" * 10 + b"\xfe\x00"))
    try:
        result = forked(f"import resource; resource.setrlimit(resource.RLIMIT_CPU, (8, 8))\n{HANGS}", tmp_path / "t")
    except subprocess.TimeoutExpired:
        pytest.fail("hangs")
    assert result.returncode == 0 and result.stdout.startswith("refused t.tar"), result
