"""An ImageFolder as a source: one sub-folder per class, mapped through the class list, never by folder order."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np

from manifests import Store, Unreachable, UserError, one_line
from manifests.notes import note
from manifests.recipe import nearest
from shards.canvas import IMAGE_EXTENSIONS
from shards.tar import clean_key

from ..prefetch import map_in_order
from .classes import ClassList, repeated
from .files import version
from .sample import RENAME, Fingerprint, Piece, Place, SourceSample, key_hashes, refuse_repeated

READERS = 32  # files fetched at once, ahead of the decoders: at 30 ms a GET, one after the other would be 33 images/s
LOOKED_AT = 64  # files whose content enters the fingerprint


@dataclass(frozen=True, kw_only=True)
class FolderPiece:
    """Some files of an ImageFolder."""

    root: str
    name: str
    files: tuple[tuple[str, int], ...]  # (path below the root, label)

    @property
    def count(self) -> int:
        return len(self.files)

    def samples(self, classes: ClassList, part: int = 0, parts: int = 1) -> Iterator[SourceSample]:
        with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
            yield from map_in_order(pool, partial(_sample, Store(self.root)), self.files[part::parts], READERS)

    def called(self, number: int, key: str) -> str:
        return self.files[number][0]

    def headers(self, classes: ClassList) -> Iterator[SourceSample]:
        for file, label in self.files:
            yield SourceSample(folder_key(file), b"", label)


def _sample(store: Store, entry: tuple[str, int]) -> SourceSample:
    file, label = entry
    try:
        return SourceSample(folder_key(file), _read(store, file), label)
    except (OSError, Unreachable) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        return SourceSample(folder_key(file), b"", label, f"cannot read the file: {reason}")


def _read(store: Store, file: str) -> bytes:
    """Raises OSError, also for a named pipe or a device, which might never end."""
    if store.is_local and not stat.S_ISREG(Path(store.root, file).stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return store.read(file)


class FolderPieces(Sequence[Piece]):
    """All files of an ImageFolder, about 50 bytes each; a piece is made when it is asked for."""

    def __init__(self, root: str, names: list[bytes], labels: np.ndarray, shard_size: int) -> None:
        self.root, self.shard_size = root, shard_size
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._labels = labels

    def __len__(self) -> int:
        return -(-len(self._labels) // self.shard_size)

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, stop = index * self.shard_size, min((index + 1) * self.shard_size, len(self._labels))
        files = tuple((self._name(i), int(self._labels[i])) for i in range(first, stop))
        return FolderPiece(
            root=self.root, name=f"{self.root.rstrip('/').rsplit('/', 1)[-1]}[{first}:{stop}]", files=files
        )

    def _name(self, i: int) -> str:
        begin = int(self._ends[i - 1]) if i else 0
        return _text(self._names[begin : int(self._ends[i])])


def cut_folder(root: str, classes: ClassList, shard_size: int) -> tuple[Sequence[Piece], int, str]:
    """The pieces of an ImageFolder, the number of its images, and a fingerprint.

    The fingerprint is made from names, labels and the content of `LOOKED_AT` files. It differs for other images under
    the same names, unless only a few were replaced: replacing a tenth goes unnoticed once in 800 times. Raises
    UserError as `list_folder` does, and for files that differ in their ending only.
    """
    names, numbers, skipped = list_folder(root, classes)
    if skipped:
        note(f"{root}: {skipped} files are left out, they are hidden or no images ({', '.join(IMAGE_EXTENSIONS)})")
    refuse_repeated(
        key_hashes(folder_key(_text(name)) for name in names),
        lambda i: (folder_key(names[i].decode(errors="replace")), f"{root}/{names[i].decode(errors='replace')}"),
        RENAME,
    )
    # Shards of one class each would make batches of one class; a fixed shuffle by name spreads them.
    order = sorted(range(len(names)), key=[hashlib.sha256(name).digest() for name in names].__getitem__)
    names, found = [names[i] for i in order], np.array([numbers[i] for i in order], dtype=np.int32)
    fingerprint = Fingerprint()
    fingerprint.add(hashlib.sha256(b"\n".join(names)).hexdigest(), hashlib.sha256(found.tobytes()).hexdigest())
    for digest in _content(root, [_text(name) for name in names[:LOOKED_AT]]):  # spread over all classes by their hash
        fingerprint.add(digest)
    return FolderPieces(root, names, found, shard_size), len(names), fingerprint.value()


def list_folder(root: str, classes: ClassList) -> tuple[list[bytes], list[int], int]:
    """(paths below the root, labels, number of files that are no images), sorted by class folder and name.

    Raises UserError for a folder that is no class, with the nearest, and for a class list without distinct folders.
    """
    if (twice := repeated(classes.folders)) is not None:
        raise UserError(f"{root}: two classes have the name {twice!r}, so folders cannot go by names; {classes.mend}")
    labels = {folder: label for label, folder in enumerate(classes.folders)}
    names: list[bytes] = []
    numbers: list[int] = []
    skipped = 0
    for folder, files in class_folders(root):
        if folder not in labels:
            raise UserError(
                f"{root}/{folder}: this folder is not in the class list{nearest(folder, classes.folders)} "
                f"({classes.mend})"
            )
        images = sorted(file for file in files if is_image(file))
        skipped += len(files) - len(images)
        names += [file.encode("utf-8", "surrogateescape") for file in images]
        numbers += [labels[folder]] * len(images)
    return names, numbers, skipped


def is_image(file: str) -> bool:
    """Whether a path below the root ends as an image does and no part of it is hidden."""
    return file.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "/." not in file


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def folder_places(root: str) -> Iterator[tuple[str, Place]]:
    """(key, place) of every image in an ImageFolder, whatever its folders are called."""
    for _, files in class_folders(root):
        for file in sorted(file for file in files if is_image(file)):
            yield folder_key(file), Place(file)


def folder_stamps(root: str, *, names_only: bool = False) -> list[tuple[str, int, object]]:
    """(path, bytes, version) of every image, sorted, as `files.stamps`. names_only: 0 for the rest on a local disk."""
    store = Store(root)
    if not store.is_local:
        found = store.files_below()
        return [(file, *version(found[file])) for file in sorted(found) if "/" in file and is_image(file)]
    files = [file for _, below in class_folders(root) for file in below if is_image(file)]
    if names_only:
        return [(file, 0, 0) for file in sorted(files)]
    entries = ((file, Path(store.root, file).stat()) for file in sorted(files))
    return [(file, entry.st_size, entry.st_mtime_ns) for file, entry in entries]


def read_image(root: str, file: str) -> bytes:
    """A file of an ImageFolder. Raises UserError naming it when it cannot be read."""
    store = Store(root)
    try:
        return _read(store, file)
    except OSError as error:
        raise UserError(f"{store.where(file)}: cannot read the file: {error.strerror or one_line(error)}") from error


def _content(root: str, files: Sequence[str]) -> list[str]:
    """sha256 of each file, empty for one that cannot be read."""
    store = Store(root)

    def digest(file: str) -> str:
        try:
            return hashlib.sha256(_read(store, file)).hexdigest()
        except OSError:  # the sample's row will say so
            return ""

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(digest, files))


def folder_key(file: str) -> str:
    """Key of a file of an ImageFolder: ``n01440764/n01440764_10026.JPEG`` -> ``n01440764-n01440764_10026``."""
    return clean_key(os.path.splitext(file)[0])


def class_folders(root: str) -> Iterator[tuple[str, list[str]]]:
    """(name, paths of all files below it) of each sub-folder that is not hidden, sorted. Paths begin below the root."""
    store = Store(root)
    if store.is_local:
        for folder in sorted(
            entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
        ):
            yield folder, list(_files_below(root, folder))
        return
    found: dict[str, list[str]] = {}
    for file in store.files_below():
        folder, slash, _ = file.partition("/")
        if slash and not folder.startswith("."):
            found.setdefault(folder, []).append(file)
    yield from sorted(found.items())


def _files_below(root: str, folder: str) -> Iterator[str]:
    """Paths of all files in a folder and below. The listing says what is a folder: no file is looked at."""
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):  # a link to a folder above would never end
                yield from _files_below(root, f"{folder}/{entry.name}")
            else:
                yield f"{folder}/{entry.name}"
