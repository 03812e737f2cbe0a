"""Runs that store labels only take the images from the user's own source, in any layout and at any URL, joined by key.

The source is listed once; where each image lies is then in the cache folder, as a memory-mapped file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from manifests import UserError
from manifests.recipe import fingerprint

from .canvas import IMAGE_EXTENSIONS, BadImage, load_canvas
from .index import kept_table
from .sources.files import PIPE, NoSuchFile, stamps
from .sources.folder import folder_places, folder_stamps, read_image
from .sources.parquet import parquet_places, read_row
from .sources.pieces import EXPECTED, Kind, find_layout
from .sources.sample import Place
from .sources.tars import read_sample, tar_places
from .tar import clean_key


class OwnImages:
    """The images of a stream, in its order, wherever they lie in a source of the user's.

    The source is a folder or URL of tars, Parquet files or class folders, or a list of files with braces. Reading an
    image from a tar or a class folder reads its bytes alone; from a Parquet file it reads a row group, and the last
    ones stay in memory. Raises UserError for a source without images, or one that lacks a key of the stream or holds
    it twice.
    """

    def __init__(self, data: str | Path, keys: pa.StringArray, stream: str) -> None:
        """``stream``: fingerprint of the keys."""
        self.data = str(data)
        if self.data.startswith(PIPE):
            raise UserError(f"images: {data}: images are read at random, a command only once; name files or a folder")
        try:
            self.kind, self.files = find_layout(self.data)
            found = folder_stamps(self.files[0], names_only=True) if self.kind == "ImageFolder" else stamps(self.files)
        except UserError as error:
            raise UserError(f"images: {error}") from error
        if not found:
            raise UserError(f"images: {data}: holds no images; {EXPECTED}")
        name = fingerprint([self.data, self.files, found, stream])
        table = kept_table(name, lambda: _places_of(keys, self.kind, self.files, self.data))
        self._keys = keys
        self._file = table.column("file").chunk(0)
        self._offset, self._size = (
            table.column(name).chunk(0).to_numpy(zero_copy_only=True) for name in ("offset", "size")
        )

    def pixels(self, index: int, side: int) -> np.ndarray:
        """The canvas of a sample, uint8 [side, side, 3], as stage 1 made it. Raises UserError naming file and key."""
        file = self._file[index].as_py().decode("utf-8", "surrogateescape")
        place = Place(file, int(self._offset[index]), int(self._size[index]))
        data, where = self._read(place, self._keys[index].as_py())
        try:
            return load_canvas(data, side).permute(1, 2, 0).contiguous().numpy()
        except BadImage as error:
            raise UserError(f"{where}: {error}") from error

    def _read(self, place: Place, key: str) -> tuple[bytes, str]:
        """(encoded image, its name for messages)."""
        if self.kind == "ImageFolder":
            return read_image(self.files[0], place.file), f"{self.files[0]}/{place.file}"
        where = f"{place.file}: {key}"
        try:
            if self.kind == "Parquet":
                found, data = read_row(place)
                members = "none"
            else:
                sample = read_sample(place)
                found, data = clean_key(sample.key), sample.first(IMAGE_EXTENSIONS)
                members = ", ".join(sample.members)
        except NoSuchFile as error:
            raise UserError(f"{error} any more; was it moved while it is read? Restore it and start again") from error
        if found != key:
            raise UserError(f"{where} is no longer where it was; the file was changed while it is read: start again")
        if data is None:
            raise UserError(f"{where}: no image among the members ({members})")
        return data, where


def _places_of(keys: pa.StringArray, kind: Kind, files: Sequence[str], data: str) -> pa.Table:
    """Where each key lies, as a table of `Place`s with one row per key."""
    wanted = keys.to_pylist()
    of_the_run = frozenset(wanted)
    if repeated := len(wanted) - len(of_the_run):
        why = f"{repeated} samples of the run have the key of another, and no telling which image is whose"
        raise UserError(f"images: {why}; make it anew with output.clean_images=true")
    places: dict[str, Place] = {}
    for key, place in _all_places(kind, files):
        if key not in of_the_run:
            continue
        if key in places:
            both = f"{places[key].file} and again in {place.file}"
            raise UserError(f"images: {key} is in {both}; name a source that holds the images of the run alone")
        places[key] = place
    if missing := [key for key in wanted if key not in places]:
        raise UserError(
            f"images: {data}: {len(missing)} of {len(wanted)} images of the run are not here, the first is {missing[0]}"
        )
    found = [places[key] for key in wanted]
    names = pa.array([place.file.encode("utf-8", "surrogateescape") for place in found], pa.binary())
    offsets, sizes = (pa.array([getattr(place, name) for place in found], pa.int64()) for name in ("offset", "size"))
    return pa.table({"file": names.dictionary_encode(), "offset": offsets, "size": sizes})


def _all_places(kind: Kind, files: Sequence[str]) -> Iterator[tuple[str, Place]]:
    if kind == "ImageFolder":
        yield from folder_places(files[0])
        return
    places = tar_places if kind == "WebDataset" else parquet_places
    hidden = None if len(files) > 20 else True
    for file in tqdm(files, desc="reading where images lie", unit="file", disable=hidden, leave=False):
        yield from places(file)
