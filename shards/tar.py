"""WebDataset tars: written byte for byte the same every time, and read without trusting them.

In a tar, the members of one sample share a key (the name up to the first dot of its last part) and follow each other.
A second member with the same ending begins another sample.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO

from manifests.errors import UserError

KEY = re.compile(r"^[A-Za-z0-9_-]+\Z")
MAX_KEY = 80  # characters; key and extension must fit into the 100 that a tar header holds
BLOCK = 512
MAX_MEMBER = 256 << 20  # bytes; a larger member cannot be an image, label or array, and is skipped


@dataclass(frozen=True)
class Extent:
    """A sample's place in its tar, in bytes: from its first header to the end of its last member's padding."""

    offset: int
    size: int
    crc32: int


@dataclass
class Sample:
    """The members of one sample, by extension (lower case, without the leading dot: ``jpg``, ``logits.npy``)."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)

    def first(self, extensions: Iterable[str]) -> bytes | None:
        """The first of these members that the sample has (its image, say); None if it has none of them."""
        return next((self.members[extension] for extension in extensions if extension in self.members), None)


class TarWriter:
    """Builds one tar in memory. Equal samples give equal bytes, for headers hold neither times nor owners."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.USTAR_FORMAT)
        self.samples = 0

    def add(self, key: str, members: Mapping[str, bytes]) -> Extent:
        """Append one sample. Raises ValueError for a key that the contract forbids."""
        if not KEY.match(key):
            raise ValueError(f"key {key!r} does not match {KEY.pattern}")
        start = self._buffer.tell()
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.samples += 1
        end = self._buffer.tell()
        return Extent(start, end - start, zlib.crc32(self._buffer.getbuffer()[start:end]))

    def close(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()


def parse_sample(data: bytes, extent: Extent, where: str) -> Sample:
    """Parse the bytes of one sample's extent. Raises UserError naming ``where`` unless they are what was written."""
    if len(data) != extent.size:
        raise UserError(f"{where}: ends inside the sample at byte {extent.offset} (truncated)")
    if zlib.crc32(data) != extent.crc32:
        raise UserError(
            f"{where}: the sample at byte {extent.offset} is not the one that was written (altered or damaged)"
        )
    sample = Sample("")
    position = 0
    while position < len(data):
        name, size = _parse_header(data, position, f"{where}: no sample at byte {extent.offset}")
        key, extension = split_name(name)
        body = position + BLOCK
        sample.key = key
        sample.members[extension] = data[body : body + size]
        position = body + -(-size // BLOCK) * BLOCK
    return sample


def _parse_header(data: bytes, at: int, problem: str) -> tuple[str, int]:
    """(name, size) from a plain ustar header, as `TarWriter` writes it.

    tarfile's own parser would take a tenth of the time that decoding a JPEG takes.
    """
    header = data[at : at + BLOCK]
    if len(header) < BLOCK or header[257:262] != b"ustar" or header[156:157] not in b"0\0":
        raise UserError(f"{problem} (no plain ustar header)")
    checksum = sum(header[:148]) + sum(header[156:]) + 8 * 32  # the checksum counts its own eight bytes as spaces
    try:
        size, expected = int(header[124:135], 8), int(header[148:154], 8)
        name = header[:100].rstrip(b"\0").decode()
    except ValueError as error:
        raise UserError(f"{problem} ({error})") from error
    if checksum != expected or size < 0:
        raise UserError(f"{problem} (damaged header)")
    return name, size


def iterate_tar(file: IO[bytes], where: str, start: int = 0) -> Iterator[tuple[int, Sample]]:
    """Read any WebDataset tar from byte ``start``: yields (offset of the sample's first header, sample).

    Reads regular files only; passes over links, devices and directories; writes nothing to disk.
    Raises UserError naming ``where`` for a file that is not a tar, or that was cut off inside or between members.
    """
    yield from _samples(file, where, start)


def index_tar(file: IO[bytes], where: str) -> Iterator[tuple[int, Sample]]:
    """(offset, sample) of every sample of a tar, from headers and labels: all members except ``cls`` are empty."""
    yield from _samples(file, where, 0, only="cls")


def split_name(name: str) -> tuple[str, str]:
    """``"a/b.c.npy"`` -> ``("a/b", "c.npy")``: the key ends at the first dot of the last part."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def clean_key(name: str) -> str:
    """Turn a sample's name in any tar or folder into a key that matches the contract's ``[A-Za-z0-9_-]+``.

    ``-`` replaces the slashes. The key of a long name, or of one with other characters, ends in a hash of the whole
    name, so that different names have different keys.
    """
    joined = name.replace("/", "-")
    key = re.sub(r"[^A-Za-z0-9_-]", "-", joined)
    if key != joined or not 0 < len(key) <= MAX_KEY:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()  # file names need not be UTF-8
        key = f"{key[: MAX_KEY - 17]}-{digest[:16]}"
    return key


def _samples(file: IO[bytes], where: str, start: int, *, only: str | None = None) -> Iterator[tuple[int, Sample]]:
    current: Sample | None = None
    offset = 0
    try:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            # without this condition, Python 3.10 seeks to byte -1 of a tar without members
            for member in iter(tar.next, None) if tar.firstmember or tar.offset else ():  # type: ignore[attr-defined]
                tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every header of a long tar
                if not member.isreg() or member.name.rpartition("/")[2].startswith(
                    "."
                ):  # ._NAME, .DS_Store: a Mac's own
                    continue
                key, extension = split_name(member.name)
                if current is None or key != current.key or extension in current.members:
                    if current is not None:
                        yield offset, current
                    current, offset = Sample(key), member.offset
                current.members[extension] = b""
                if only in (None, extension) and member.size <= MAX_MEMBER:
                    body = tar.extractfile(member)
                    data = body.read() if body else b""
                    if len(data) != member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    current.members[extension] = data
            # tarfile takes a damaged header, or the end of the file, for the end of the archive. A whole tar ends in
            # two blocks of zeros; a tar cut off between members has none. Demand one, and only zeros behind it.
            file.seek(tar.offset)
            if len(file.read(BLOCK)) < BLOCK:
                raise tarfile.ReadError(f"it stops at byte {tar.offset} without the zeros that end a tar")
            file.seek(tar.offset)
            while block := file.read(1 << 20):
                if block.strip(b"\0"):
                    raise tarfile.ReadError(f"damaged at or after byte {tar.offset}")
    except tarfile.TarError as error:
        raise UserError(f"{where}: not a readable tar ({error}); is it whole, and uncompressed?") from error
    if current is not None:
        yield offset, current
