"""Class folders on an object store, and what a plan of a large tree keeps in memory."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from manifests import UserError
from shards.sources import find_source
from shards.sources.classes import ClassList, load_classes
from shards.sources.folder import FolderPieces

from ...patience import PATIENCE

CLASSES = ClassList(names=("wolf", "ant", "bee"), folders=("n9", "n1", "n5"), templates=())


def test_on_an_object_store(world) -> None:  # type: ignore[no-untyped-def]
    """The same tree behind a URL: the same keys, labels, images, order and fingerprint."""
    memory = fsspec.filesystem("memory")
    for path in world.images.rglob("*.jpg"):
        memory.pipe_file(f"/tree/{path.relative_to(world.images)}", path.read_bytes())
    memory.pipe_file("/tree/readme.txt", b"no image")
    memory.pipe_file("/tree/.hidden/x.jpg", b"hidden")
    classes = load_classes(world.clip / "prompts.yaml")
    local, remote = find_source(str(world.images), classes, 7), find_source("memory://tree", classes, 7)
    assert remote.fingerprint == local.fingerprint and remote.samples == local.samples == 36
    for one, other in zip(local.pieces, remote.pieces, strict=True):
        assert list(one.samples(classes)) == list(other.samples(classes))
    memory.pipe_file("/tree/n00/x.jpg", b"")
    with pytest.raises(UserError, match=r"memory://tree/n00: this folder is not in the class list"):
        find_source("memory://tree", classes, 7)


def test_other_images_under_the_same_names_are_another_source(tmp_path: Path) -> None:
    """Names and labels alone would let a run go on with other images; where only some of many were replaced, a
    sample of 64 shows it.
    """
    (tmp_path / "n5").mkdir()
    files = [tmp_path / "n5" / f"{n}.jpg" for n in range(1000)]
    for file in files:
        file.write_bytes(b"one")
    before = find_source(str(tmp_path), CLASSES, 10).fingerprint
    assert find_source(str(tmp_path), CLASSES, 10).fingerprint == before
    for file in files[::5]:
        file.write_bytes(b"two")
    assert find_source(str(tmp_path), CLASSES, 10).fingerprint != before


class Meeting(MemoryFileSystem):
    """A store whose reads wait for eight of their kind: one after the other they would never come to an end."""

    protocol = "meeting"
    cachable = False
    together = threading.Barrier(8, timeout=PATIENCE)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        self.together.wait()
        data: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        return data

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("meeting://")))


def test_files_are_fetched_at_the_same_time_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store answers in tens of milliseconds: a piece asks for several files at once, and keeps their
    order.
    """
    monkeypatch.setenv("DAD_PROTOCOLS", "meeting")
    fsspec.register_implementation("meeting", Meeting, clobber=True)
    memory = fsspec.filesystem("memory")
    for n in range(64):
        memory.pipe_file(f"/many/n1/{n}.jpg", str(n).encode())
    (piece,) = find_source("meeting://many", CLASSES, 100).pieces
    samples = list(piece.samples(CLASSES))
    assert [s.key for s in samples] == [file.removesuffix(".jpg").replace("/", "-") for file, _ in piece.files]  # type: ignore[attr-defined]
    assert [f"n1-{s.data.decode()}" for s in samples] == [s.key for s in samples] and len(samples) == 64


def test_hidden_files_and_pipes(tmp_path: Path) -> None:
    """What macOS and Jupyter leave beside images is no image; a named pipe, is recorded and not waited for."""
    for name in ("n1/x.jpg", "n1/._x.jpg", "n1/.ipynb_checkpoints/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"data")
    os.mkfifo(tmp_path / "n1" / "pipe.jpg")
    (piece,) = find_source(str(tmp_path), CLASSES, 10).pieces
    assert {s.key: s.problem for s in piece.samples(CLASSES)} == {
        "n1-x": None,
        "n1-pipe": "cannot read the file: not a regular file",
    }


def test_labels_never_come_from_order(tmp_path: Path) -> None:
    """Folders that sort otherwise than the class list, some of them empty or missing: labels are the list's."""
    for folder in ("n5", "n9"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}_1.JPEG").write_bytes(folder.encode())
    (piece,) = find_source(str(tmp_path), CLASSES, 10).pieces
    assert {s.data: s.label for s in piece.samples(CLASSES)} == {b"n5": 2, b"n9": 0}


def test_pieces_are_a_sequence() -> None:
    """Indices from both ends, slices, and every file in exactly one piece, whatever its name."""
    names = [f"n1/{name}.jpg".encode() for name in ("a", "ä", "b" * 200, "名前", "c d")] + [b"n1/\xff.jpg"]
    pieces = FolderPieces("root", names, np.arange(6, dtype=np.int32), 4)
    assert len(pieces) == 2 and pieces[-1] == pieces[1] and list(pieces[:]) == [pieces[0], pieces[1]] == list(pieces)
    files = [file for piece in pieces for file in piece.files]  # type: ignore[attr-defined]
    assert [file.encode("utf-8", "surrogateescape") for file, _ in files] == names and [
        label for _, label in files
    ] == list(range(6))
    with pytest.raises(IndexError):
        pieces[2]


def test_a_plan_of_200_000_files_is_small() -> None:
    """About 50 bytes a file are kept, and what a piece takes to another process is its own files alone."""
    count = 200_000
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG".encode() for i in range(count)]
    pieces = FolderPieces("/data/imagenet/train", names, np.zeros(count, np.int32), 1000)
    held = sum(
        sys.getsizeof(value) if isinstance(value, bytes) else getattr(value, "nbytes", 0)
        for value in vars(pieces).values()
    )
    assert held < 50 * count and len(pieces) == 200
    assert len(pickle.dumps(pieces[77])) < 60 * 1000
    assert pieces[77].count == 1000 and pieces[77].files[3][0].encode() == names[77_003]  # type: ignore[attr-defined]
