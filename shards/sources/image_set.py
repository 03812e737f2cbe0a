"""A labelled image set for measuring: every sample once, in any layout, shared among processes, decoded in threads."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from manifests import UserError
from manifests.recipe import fingerprint
from shards.canvas import BadImage, load_canvas

from ..prefetch import map_in_order
from .classes import ClassList
from .files import PIPE, expand, stamps
from .folder import FolderPiece, folder_stamps, list_folder
from .parquet import ParquetPiece
from .pieces import EXPECTED, Kind, find_layout
from .sample import SourceSample, WholePiece
from .tars import TarPiece

MAX_ERRORS = 0.01  # share of samples that may be unusable, as a recipe of stage 1 has it by default
DECODED = 100  # images that `check` decodes: in a larger set, one bad image alone is within MAX_ERRORS
SIDE = 64  # pixels to which it decodes them


@dataclass(frozen=True)
class Picture:
    """A sample of a set. ``image`` is None, and ``problem`` says why and where, when it cannot be used."""

    image: torch.Tensor | None  # uint8 [3, side, side]
    label: int  # index into the class list; -1 where it is unknown
    problem: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """A set as `open_set` lists it; no file of it is open yet."""

    where: str
    kind: Kind
    pieces: tuple[WholePiece, ...]  # one per tar or Parquet file; of class folders, one in all
    classes: ClassList

    def pictures(self, side: int, *, part: int = 0, parts: int = 1, threads: int = 1) -> Iterator[Picture]:
        """Every sample in order, its image resized and cropped to [3, side, side] as stage 1 does it.

        Of several parts, each sample is in exactly one. ``threads`` decode a few images ahead of the one that is
        asked for. Raises UserError for a file that cannot be read, and for a label outside the class list.
        """
        with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="decode") as pool:
            samples = self._samples(part, parts)
            yield from map_in_order(pool, partial(_decode, side), samples, 4 * max(threads, 1))

    def check(self) -> None:
        """Read all headers and labels, and decode the first `DECODED` images.

        Raises UserError for a set without images, a label outside the class list, and as `refuse_many`.
        """
        problems: list[str] = []
        count = 0
        for piece in self.pieces:
            for number, sample in enumerate(piece.headers(self.classes)):
                count += 1
                called = piece.called(number, sample.key)
                self._refuse_another_list(called, sample)
                if sample.problem:
                    problems.append(f"{called}: {sample.problem}")
        self.refuse_empty(count)
        if not problems:  # else their images are known to be missing
            first = itertools.islice(self.pictures(SIDE), DECODED)
            problems = [picture.problem for picture in first if picture.problem]
        if problems:
            self.refuse_many(problems[0], len(problems), count)

    def refuse_empty(self, count: int) -> None:
        """Raises UserError for a set without samples."""
        if not count:
            raise UserError(f"{self.where}: holds no images; {EXPECTED}")

    def refuse_many(self, first: str, bad: int, count: int) -> None:
        """Raises UserError when more than `MAX_ERRORS` of ``count`` samples are unusable. first: the first problem."""
        if bad > MAX_ERRORS * count:
            more = f"more than {MAX_ERRORS:.0%} of a set; mend them or take them out"
            raise UserError(f"{self.describe(first, bad, count)}; that is {more}")

    def describe(self, first: str, bad: int, count: int) -> str:
        """How many samples of the set cannot be used, and why the first cannot."""
        return f"{self.where}: {bad:,} of {count:,} samples cannot be used, the first is {first}"

    def stamps(self) -> list[tuple[str, int, object]]:
        """What a score of the set depends on: (name, bytes, version) of every file, and the folders of the classes."""
        if self.kind != "ImageFolder":
            return stamps([piece.url for piece in self.pieces if isinstance(piece, (TarPiece, ParquetPiece))])
        listed = ("class folders", len(self.classes.folders), fingerprint(self.classes.folders))
        return [listed, *folder_stamps(self.pieces[0].name)]

    def _samples(self, part: int, parts: int) -> Iterator[tuple[str, SourceSample]]:
        """(what messages call it, sample) of every sample of a part."""
        for index, piece in enumerate(self.pieces):
            first = (part + index) % parts  # the first part would get one more of every small file
            for number, sample in enumerate(piece.samples(self.classes, first, parts)):
                called = piece.called(first + number * parts, sample.key)
                self._refuse_another_list(called, sample)
                yield called, sample

    def _refuse_another_list(self, called: str, sample: SourceSample) -> None:
        if sample.of_another_list:
            raise UserError(f"{self.where}: {called}: {sample.problem}; is the set of other classes than the shards?")


def open_set(data: str, classes: ClassList) -> ImageSet:
    """The image set at ``data``, a location as `find_layout` takes it, from listings alone.

    Raises UserError for one that is not there, of several layouts, or without files.
    """
    urls = expand(data)
    if any(url.startswith(PIPE) for url in urls):
        raise UserError(f"{data}: image sets are read many times, and a command only once; give files or a folder")
    kind, files = find_layout(data, classes.folders)
    where = urls[0] if len(urls) == 1 else data
    return ImageSet(where, kind, tuple(_piece(kind, file, classes) for file in files), classes)


def _piece(kind: Kind, file: str, classes: ClassList) -> WholePiece:
    if kind == "WebDataset":
        return TarPiece(url=file, name=file, count=sys.maxsize)
    if kind == "Parquet":
        return ParquetPiece(url=file, name=file, count=sys.maxsize)  # to its end
    names, labels, _ = list_folder(file, classes)
    if not names:
        raise UserError(f"{file}: holds no images; {EXPECTED}")
    files = ((name.decode("utf-8", "surrogateescape"), label) for name, label in zip(names, labels, strict=True))
    return FolderPiece(root=file, name=file, files=tuple(files))


def _decode(side: int, found: tuple[str, SourceSample]) -> Picture:
    """Runs in a thread; PIL lets go of the interpreter."""
    called, sample = found
    label = -1 if sample.label is None else sample.label
    if sample.problem is not None:
        return Picture(None, label, f"{called}: {sample.problem}")
    try:
        return Picture(load_canvas(sample.data, side), label)
    except BadImage as error:
        return Picture(None, label, f"{called}: {error}")
