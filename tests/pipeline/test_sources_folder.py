"""Class folders on an object store, and what a plan of a large tree keeps in memory."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from manifests import UserError
from pipeline.classes import ClassList, load_classes
from pipeline.sources import plan_source
from pipeline.sources.folder import FolderPieces

CLASSES = ClassList(names=("wolf", "ant", "bee"), folders=("n9", "n1", "n5"), templates=())


def test_on_an_object_store(world) -> None:  # type: ignore[no-untyped-def]
    """The same tree behind a URL: the same keys, labels, images, order and fingerprint."""
    memory = fsspec.filesystem("memory")
    for path in world.images.rglob("*.jpg"):
        memory.pipe_file(f"/tree/{path.relative_to(world.images)}", path.read_bytes())
    memory.pipe_file("/tree/readme.txt", b"no image")
    memory.pipe_file("/tree/.hidden/x.jpg", b"hidden")
    classes = load_classes(world.clip / "prompts.yaml")
    local, remote = plan_source(str(world.images), classes, 7), plan_source("memory://tree", classes, 7)
    assert remote.fingerprint == local.fingerprint and remote.samples == local.samples == 36
    for one, other in zip(local.pieces, remote.pieces, strict=True):
        assert list(one.samples(classes)) == list(other.samples(classes))
    memory.pipe_file("/tree/n00/x.jpg", b"")
    with pytest.raises(UserError, match=r"memory://tree/n00: this folder is not in the class list"):
        plan_source("memory://tree", classes, 7)


def test_labels_never_come_from_order(tmp_path: Path) -> None:
    """Folders that sort otherwise than the class list, some of them empty or missing: labels are the list's."""
    for folder in ("n5", "n9"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}_1.JPEG").write_bytes(folder.encode())
    (piece,) = plan_source(str(tmp_path), CLASSES, 10).pieces
    assert {s.data: s.label for s in piece.samples(CLASSES)} == {b"n5": 2, b"n9": 0}


def test_pieces_are_a_sequence() -> None:
    """Indices from both ends, slices, and every file in exactly one piece, whatever its name."""
    names = [f"n1/{name}.jpg".encode() for name in ("a", "ä", "b" * 200, "名前", "c d")] + [b"n1/\xff.jpg"]
    pieces = FolderPieces("root", names, np.arange(6, dtype=np.int32), 4)
    assert len(pieces) == 2 and pieces[-1] == pieces[1] and list(pieces[:]) == [pieces[0], pieces[1]] == list(pieces)
    files = [file for piece in pieces for file in piece.files]  # type: ignore[attr-defined]
    assert [file.encode("utf-8", "surrogateescape") for file, _ in files] == names and [label for _, label in files] == list(range(6))
    with pytest.raises(IndexError):
        pieces[2]


def test_a_plan_of_200_000_files_is_small() -> None:
    """About 50 bytes a file are kept, and what a piece takes to another process is its own files alone."""
    count = 200_000
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG".encode() for i in range(count)]
    pieces = FolderPieces("/data/imagenet/train", names, np.zeros(count, np.int32), 1000)
    held = sum(sys.getsizeof(value) if isinstance(value, bytes) else getattr(value, "nbytes", 0) for value in vars(pieces).values())
    assert held < 50 * count and len(pieces) == 200
    assert len(pickle.dumps(pieces[77])) < 60 * 1000
    assert pieces[77].count == 1000 and pieces[77].files[3][0].encode() == names[77_003]  # type: ignore[attr-defined]
