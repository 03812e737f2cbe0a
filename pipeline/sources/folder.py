"""An ImageFolder as a source: one sub-folder per class, mapped through the class list, never by folder order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import click
import numpy as np

from manifests import Store, Unreachable, UserError
from manifests.recipe import nearest
from shards.canvas import IMAGE_EXTENSIONS
from shards.tar import clean_key

from ..classes import ClassList
from .sample import Fingerprint, Piece, SourceSample, key_hashes, refuse_repeated


@dataclass(frozen=True, kw_only=True)
class FolderPiece:
    """Some files of an ImageFolder."""

    root: str
    name: str
    files: tuple[tuple[str, int], ...]  # (path below the root, label)

    @property
    def count(self) -> int:
        return len(self.files)

    def samples(self, classes: ClassList) -> Iterator[SourceSample]:
        store = Store(self.root)
        for file, label in self.files:
            try:
                yield SourceSample(folder_key(file), store.read(file), label)
            except (OSError, Unreachable) as error:
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
                yield SourceSample(folder_key(file), b"", label, f"cannot read the file: {reason}")


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
        return FolderPiece(root=self.root, name=f"{self.root.rstrip('/').rsplit('/', 1)[-1]}[{first}:{stop}]", files=files)

    def _name(self, i: int) -> str:
        begin = int(self._ends[i - 1]) if i else 0
        return self._names[begin : int(self._ends[i])].decode("utf-8", "surrogateescape")


def plan_folder(root: str, classes: ClassList, shard_size: int) -> tuple[Sequence[Piece], int, str]:
    """The pieces of an ImageFolder, the number of its images, and a fingerprint of names and labels.

    Raises UserError for a folder that is no class, with the nearest, and for files that differ in their ending only.
    """
    labels = {folder: label for label, folder in enumerate(classes.folders)}
    names: list[bytes] = []
    numbers: list[int] = []
    hashes: list[np.ndarray] = [np.empty(0, np.uint64)]
    skipped = 0
    for folder, files in _class_folders(root):
        if folder not in labels:
            raise UserError(
                f"source.data: {root}/{folder}: this folder is not in the class list{nearest(folder, classes.folders)} "
                "(add it to source.classes under `folders`)"
            )
        images = sorted(file for file in files if file.rpartition(".")[2].lower() in IMAGE_EXTENSIONS)
        skipped += len(files) - len(images)
        hashes.append(key_hashes(folder_key(file) for file in images))
        names += [file.encode("utf-8", "surrogateescape") for file in images]
        numbers += [labels[folder]] * len(images)
    if skipped:
        click.echo(f"note: {root}: {skipped} files are left out, they are no images ({', '.join(IMAGE_EXTENSIONS)})", err=True)
    refuse_repeated(
        np.concatenate(hashes), lambda i: (folder_key(names[i].decode(errors="replace")), f"{root}/{names[i].decode(errors='replace')}")
    )
    # Shards of one class each would make batches of one class; a fixed shuffle by name spreads them.
    order = sorted(range(len(names)), key=[hashlib.sha256(name).digest() for name in names].__getitem__)
    names, found = [names[i] for i in order], np.array([numbers[i] for i in order], dtype=np.int32)
    fingerprint = Fingerprint()
    fingerprint.add(hashlib.sha256(b"\n".join(names)).hexdigest(), hashlib.sha256(found.tobytes()).hexdigest())
    return FolderPieces(root, names, found, shard_size), len(names), fingerprint.value()


def folder_key(file: str) -> str:
    """Key of a file of an ImageFolder: ``n01440764/n01440764_10026.JPEG`` -> ``n01440764-n01440764_10026``."""
    return clean_key(os.path.splitext(file)[0])


def _class_folders(root: str) -> Iterator[tuple[str, list[str]]]:
    """(name, paths of all files below it) of each sub-folder, sorted; hidden ones are passed over. Paths are relative to the root."""
    store = Store(root)
    if store.is_local:
        for folder in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")):
            yield folder, list(_files_below(root, folder))
        return
    found: dict[str, list[str]] = {}
    for path in store.fs.find(store.root):
        relative = path[len(store.root) :].lstrip("/")
        folder, slash, _ = relative.partition("/")
        if slash and not folder.startswith("."):
            found.setdefault(folder, []).append(relative)
    yield from sorted(found.items())


def _files_below(root: str, folder: str) -> Iterator[str]:
    """Without a stat of each file: a listing says what is a folder."""
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):  # a link to a folder above would never end
                yield from _files_below(root, f"{folder}/{entry.name}")
            else:
                yield f"{folder}/{entry.name}"
