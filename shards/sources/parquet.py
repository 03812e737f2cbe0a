"""Parquet files of encoded images and labels as a source: the layout of image sets on the Hugging Face Hub."""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifests import UserError, one_line
from manifests.notes import note
from shards.tar import clean_key

from .classes import ClassList
from .files import file_name, open_file
from .sample import (
    EXACT,
    SLACK,
    Fingerprint,
    KeyRule,
    Piece,
    Place,
    SourceSample,
    check_label,
    key_hashes,
    place_key,
    refuse_repeated,
)

IMAGES = ("image", "img", "jpg", "png")
LABELS = ("label", "labels", "cls", "fine_label")
ROWS = 32  # read at once
BUFFER = 1 << 20  # bytes read at once, or a page where that is larger; without a buffer, all of a row group
GROUPS = 2  # row groups that stay in memory for rows read at random; the Hub's hold about 100 images, 10 MB
SLOW = 4 << 20  # bytes of a row group from which reading rows at random is slow


@dataclass(frozen=True, kw_only=True)
class ParquetPiece:
    """A stretch of rows of one file."""

    url: str
    name: str
    count: int
    start: int = 0  # first row
    keys: KeyRule = "name"

    def samples(self, classes: ClassList, part: int = 0, parts: int = 1) -> Iterator[SourceSample]:
        return itertools.islice(self._samples(classes), part, None, parts)

    def called(self, number: int, key: str) -> str:
        return f"{file_name(self.url)}: row {self.start + number}"

    def headers(self, classes: ClassList) -> Iterator[SourceSample]:
        """From the label column alone; keys are `place_key`s."""
        with open_file(self.url) as source:
            file = open_parquet(source, self.url)
            _, label = columns(file.schema_arrow, self.url)
            labels = label_map(file.schema_arrow, label, classes, self.url)
            for number, row in self._rows(file, [label]):
                value, problem = _label(row[label], labels, classes)
                yield SourceSample(place_key(file_name(self.url), number), b"", value, problem)

    def _samples(self, classes: ClassList) -> Iterator[SourceSample]:
        with open_file(self.url) as source:
            file = open_parquet(source, self.url)
            image, label = columns(file.schema_arrow, self.url)
            labels = label_map(file.schema_arrow, label, classes, self.url)
            for number, row in self._rows(file, [image, label]):
                data, path = _picture(row[image])
                value, problem = _label(row[label], labels, classes)
                if not data:
                    problem = "the row holds no image bytes"
                yield SourceSample(row_key(self.url, number, path, self.keys), data or b"", value, problem)

    def _rows(self, file: pq.ParquetFile, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row number, row) of the rows of this piece; a few are held at once, and nothing is read behind the last."""
        groups, begins, begin = [], [], 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if begin < self.start + self.count and begin + rows > self.start:
                groups.append(group)
                begins.append(begin)
            begin += rows
        number = begins[0] if begins else 0
        try:
            for batch in file.iter_batches(ROWS, row_groups=groups, columns=names, use_threads=False):
                for row in batch.to_pylist():
                    if number >= self.start:
                        yield number, row
                    number += 1
                    if number == self.start + self.count:
                        return
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.url}: damaged near row {number} ({one_line(error)})") from error


def _label(value: object, labels: list[int] | None, classes: ClassList) -> tuple[int | None, str | None]:
    """As `check_label`; ``labels`` is the file's `label_map`."""
    label, problem = check_label(value, classes)
    return (label if label is None or labels is None else labels[label]), problem


def _picture(value: Any) -> tuple[bytes | None, str | None]:
    """(bytes, path) of an image cell, which is a struct, or the bytes alone."""
    return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)


def row_key(url: str, number: int, path: str | None, keys: KeyRule = "name") -> str:
    """Key of a row: from its image's path, or without one from the file's name and the row's number."""
    if keys == "name" and path:
        return clean_key(str(path).rpartition(".")[0] or str(path))
    return place_key(file_name(url), number)


def parquet_places(url: str) -> Iterator[tuple[str, Place]]:
    """(key, place) of every row of a file; ``Place.offset`` is the row's number. A note warns of large row groups."""
    with open_file(url) as source:
        file = open_parquet(source, url)
        paths = _paths(file, url)
        size = max((file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)), default=0)
    if size > SLOW:
        note(f"{url}: each image is read with its row group, of {size >> 20} MiB; tars or smaller groups are faster")
    for number, path in enumerate(paths):
        yield row_key(url, number, path), Place(url, number)


def read_row(place: Place) -> tuple[str, bytes | None]:
    """(key, image bytes) of a row. Raises UserError when the file has no such row.

    A row is read together with its row group; a few groups stay in memory for the next rows.
    """
    begins, image = _groups(place.file, os.getpid())
    group = bisect.bisect_right(begins, place.offset) - 1
    if place.offset >= begins[-1]:
        raise UserError(
            f"{place.file}: has no row {place.offset} any more; it was changed while it is read: start again"
        )
    cells = _group(place.file, group, image, os.getpid())
    data, path = _picture(cells[place.offset - begins[group]].as_py())
    return row_key(place.file, place.offset, path), data


@lru_cache(maxsize=1024)
def _groups(url: str, _pid: int) -> tuple[list[int], str]:
    """(first row of each row group and the number of rows, name of the image column)."""
    with open_file(url) as source:
        file = open_parquet(source, url)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return list(itertools.accumulate(rows, initial=0)), image_column(file.schema_arrow, url)


@lru_cache(maxsize=GROUPS)
def _group(url: str, group: int, image: str, _pid: int) -> pa.Array:
    """The image column of a row group. Raises UserError."""
    with open_file(url) as source:
        try:
            table = open_parquet(source, url).read_row_group(group, columns=[image], use_threads=False)
            return table.column(0).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{url}: damaged in row group {group} ({one_line(error)})") from error


def cut_parquet(
    urls: Sequence[str], classes: ClassList, shard_size: int, keys: KeyRule
) -> tuple[Sequence[Piece], bool, str]:
    """The pieces of a list of Parquet files, from their footers; counts are always exact."""
    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(lambda url: _groups_and_size(url, classes), urls))
    if keys == "name":
        looked_at = urls if sum(sum(groups) for groups, _ in counts) <= EXACT else urls[:1]
        names = [(key, url) for url in looked_at for key in _names(url)]
        refuse_repeated(key_hashes(key for key, _ in names), names.__getitem__)
    fingerprint = Fingerprint()
    pieces: list[Piece] = []
    for url, (groups, size) in zip(urls, counts, strict=True):
        fingerprint.add(file_name(url), groups, size)
        for first, count in _cut(groups, shard_size):
            name = file_name(url) if count == sum(groups) else f"{file_name(url)}[{first}:{first + count}]"
            pieces.append(ParquetPiece(url=url, name=name, count=count, start=first, keys=keys))
    return pieces, True, fingerprint.value()


def _cut(groups: Sequence[int], shard_size: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of pieces of about ``shard_size`` rows, which are whole row groups if they fit."""
    first = count = 0
    for rows in groups:
        if count and count + rows > shard_size:
            yield first, count
            first, count = first + count, 0
        count += rows
        if count > SLACK * shard_size:  # one group that is too large: cut evenly
            parts = -(-count // shard_size)
            for begin, end in itertools.pairwise(count * part // parts for part in range(parts + 1)):
                yield first + begin, end - begin
            first, count = first + count, 0
    if count:
        yield first, count


def open_parquet(source: Any, url: str) -> pq.ParquetFile:
    """Raises UserError for a file that is none."""
    try:
        return pq.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{url}: not a readable Parquet file ({one_line(error)})") from error


def columns(schema: pa.Schema, url: str) -> tuple[str, str]:
    """Names of the image column (a struct with ``bytes``, or binary) and of the label column. Raises UserError."""
    image = _image_column(schema)
    label = next(
        (name for name in LABELS if name in schema.names and pa.types.is_integer(schema.field(name).type)), None
    )
    if image is None or label is None:
        raise UserError(
            f"{url}: needs an image column ({', '.join(IMAGES)}: bytes, or a struct with bytes) and an integer label "
            f"column ({', '.join(LABELS)}); it has {', '.join(f'{field.name}: {field.type}' for field in schema)}"[:400]
        )
    return image, label


def image_column(schema: pa.Schema, url: str) -> str:
    """Name of the image column alone, for files whose labels nobody needs. Raises UserError."""
    image = _image_column(schema)
    if image is None:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise UserError(
            f"{url}: needs an image column ({', '.join(IMAGES)}: bytes, or a struct with bytes); it has {found}"[:400]
        )
    return image


def _image_column(schema: pa.Schema) -> str | None:
    return next((name for name in IMAGES if name in schema.names and _is_image(schema.field(name).type)), None)


def label_map(schema: pa.Schema, column: str, classes: ClassList, url: str) -> list[int] | None:
    """Index in the class list for each label number of the file, by the names that `datasets` stores; None: the same.

    If some names differ (synonyms), the numbers stand as they are, for both lists may still have one order. Raises
    UserError when the orders differ (a name that both know has another number), or when the file names another number
    of classes.
    """
    names = [name.replace("_", " ") for name in _label_names(schema, column)]
    if not names:
        return None
    if len(names) != len(classes.names):
        raise UserError(f"{url}: names {len(names)} classes, the class list {len(classes.names)}")
    lists = [_places(classes.names), _places(classes.folders)]
    for places in lists:
        if places.keys() == set(names) and len(places) == len(names):
            return [places[name][0] for name in names]
    for number, name in enumerate(names):
        if elsewhere := next((places[name] for places in lists if number not in places.get(name, [number])), None):
            strange = ", ".join(repr(other) for other in names if not any(other in places for places in lists))[:80]
            raise UserError(
                f"{url}: its label {number} is {name!r}, number {elsewhere[0]} of the class list; the orders differ, "
                f"and the names do not tell how (not in the class list: {strange or 'none'}); spell the names of the "
                "class list as the file does"
            )
    return None


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    """Where each name stands in a class list, `_` for space or not; ImageNet's has one name twice."""
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        places.setdefault(name.replace("_", " "), []).append(number)
    return places


def _label_names(schema: pa.Schema, column: str) -> list[str]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def _is_image(kind: pa.DataType) -> bool:
    is_struct = pa.types.is_struct(kind) and any(field.name == "bytes" for field in kind)
    return is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _groups_and_size(url: str, classes: ClassList) -> tuple[list[int], int]:
    """(rows of each row group, bytes of all) of a file. Raises UserError when it lacks a column that we need."""
    with open_file(url) as source:
        file = open_parquet(source, url)
        label_map(file.schema_arrow, columns(file.schema_arrow, url)[1], classes, url)
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        return [group.num_rows for group in groups], sum(group.total_byte_size for group in groups)


def _names(url: str) -> list[str]:
    """Keys that the rows of a file have by name; only the column of names is read."""
    with open_file(url) as source:
        paths = _paths(open_parquet(source, url), url)
    return [row_key(url, 0, path) for path in paths if path]


def _paths(file: pq.ParquetFile, url: str) -> list[str | None]:
    """The path of each row's image; only this column is read. None: the row has none."""
    image = image_column(file.schema_arrow, url)
    kind = file.schema_arrow.field(image).type
    if not pa.types.is_struct(kind) or all(field.name != "path" for field in kind):
        return [None] * file.metadata.num_rows
    try:
        paths: list[str | None] = file.read([f"{image}.path"]).column(0).combine_chunks().field("path").to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{url}: damaged in column {image}.path ({one_line(error)})") from error
    return paths
