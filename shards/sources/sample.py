"""What every kind of source yields: samples with a key and a label, in pieces of known place."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from manifests import UserError
from shards.tar import clean_key

from .classes import ClassList

EXACT = 50_000  # samples; in a source that seems larger, cutting it reads the names of some only
SLACK = 1.25  # a tar or row group of up to this many times the shard size stays one piece

KeyRule = Literal["name", "place"]
OUTSIDE = "is outside the class list"


@dataclass(frozen=True)
class SourceSample:
    """One image as found: bytes undecoded. ``label`` is None, and ``problem`` says why, when it cannot be used."""

    key: str
    data: bytes
    label: int | None
    problem: str | None = None

    @property
    def of_another_list(self) -> bool:
        """Whether the label is a number that the class list does not have: then the whole set is of another list."""
        return self.label is None and self.problem is not None and OUTSIDE in self.problem


class Piece(Protocol):
    """A stretch of the source that becomes one shard. Small, and can be sent to another process."""

    @property
    def name(self) -> str:
        """For messages and the record, without the folder that it lies in."""

    @property
    def count(self) -> int:
        """Samples; an estimate where the source is not `exact`."""

    def samples(self, classes: ClassList) -> Iterator[SourceSample]:
        """Read the piece, in the order of the source. Raises UserError when its file is missing or damaged."""


class WholePiece(Piece, Protocol):
    """A piece that several readers can share out, and whose headers can be read alone."""

    def samples(self, classes: ClassList, part: int = 0, parts: int = 1) -> Iterator[SourceSample]:
        """As `Piece.samples`; of several parts, number ``part`` holds every parts-th sample."""

    def called(self, number: int, key: str) -> str:
        """What messages call the ``number``-th sample, within its set."""

    def headers(self, classes: ClassList) -> Iterator[SourceSample]:
        """Every sample with its label but without ``data``, and with what is wrong with it as far as no image tells."""


@dataclass(frozen=True)
class Place:
    """Where one image lies: a file, and in a tar the bytes of its sample, in a Parquet file its row."""

    file: str  # path or URL; of a class folder's file, relative to the root
    offset: int = 0  # bytes, or rows
    size: int = 0  # bytes; 0 where the file says it itself


def place_key(file: str, index: int) -> str:
    """Key of the ``index``-th sample of a file, for sources whose own names repeat."""
    return clean_key(f"{file.rpartition('.')[0] or file}-{index:06d}")


def check_label(value: object, classes: ClassList) -> tuple[int | None, str | None]:
    """Turn a label (text, number or None) into (index into the class list, None), or (None, what is wrong with it)."""
    if value is None:
        return None, "no label (KEY.cls)"
    try:
        text = value.decode("ascii").strip() if isinstance(value, bytes) else str(int(value))  # type: ignore[call-overload]
        if isinstance(value, bool) or not re.fullmatch("[+-]?[0-9]+", text):  # int() would take 1_0 for ten
            raise ValueError(text)
        label = int(text)
    except (ValueError, TypeError):
        return None, f"label {value[:20] if isinstance(value, bytes) else value!r} is not an integer"
    if not 0 <= label < len(classes.names):
        return None, f"label {label} {OUTSIDE} (0 to {len(classes.names) - 1})"
    return label, None


class Fingerprint:
    """The fingerprint of a source, which is given every entry once, in order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, *entry: object) -> None:
        self._digest.update(f"{entry}\n".encode())

    def value(self) -> str:
        """First 16 hex digits of the sha256."""
        return self._digest.hexdigest()[:16]


def key_hashes(keys: Iterable[str]) -> np.ndarray:
    """A hash of 8 bytes for each key, by which repeated keys are found: uint64 [N]."""
    return np.fromiter(
        (int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") for key in keys), np.uint64
    )


RENAME = "rename one (files that differ in their ending only count as one)"
BY_PLACE = f"{RENAME}, or --set source.keys=place to name samples by file and number"
SCATTERED = "the members of one sample must follow each other: pack the tar anew with tar --sort=name"


def refuse_repeated(
    hashes: np.ndarray, describe: Callable[[int], tuple[str, str]], mend: str = BY_PLACE, mend_within: str | None = None
) -> None:
    """Raises UserError when a hash occurs twice; ``describe(i)`` gives the key of entry i and where it stands.

    mend: what to do. mend_within: what to do where both entries stand in one file, with others between.
    """
    order = np.argsort(hashes, kind="stable")
    again = order[1:][np.diff(hashes[order]) == 0]
    if len(again):
        later = int(again.min())
        earlier = int(np.flatnonzero(hashes == hashes[later])[0])
        key, where = describe(later)
        if mend_within is not None and later > earlier + 1 and describe(earlier)[1] == where:
            mend = mend_within
        raise UserError(f"{where}: key {key!r} occurs twice in the source; {mend}")
