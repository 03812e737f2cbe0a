"""Where the labelled images come from: WebDataset tars or an ImageFolder, cut into pieces that become shards.

`plan_source` looks at names and tar headers only; `Piece.samples` reads one piece. Keys are stable: they depend on the source's
names, not on the order of listing.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from tqdm import tqdm

from manifests import UserError
from manifests.recipe import nearest
from shards.canvas import IMAGE_EXTENSIONS
from shards.tar import index_tar, iterate_tar

from .classes import ClassList

MAX_KEY = 80  # characters; a tar header holds 100, with the longest extension


@dataclass(frozen=True)
class SourceSample:
    """One image as found: bytes undecoded. ``label`` is None, and ``problem`` says why, when it cannot be used."""

    key: str
    data: bytes
    label: int | None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of the source that becomes one shard."""

    name: str  # for messages and the record, without the folder that it lies in
    path: Path  # the tar, or the root of the ImageFolder
    count: int
    start: int = 0  # tar: byte of the first sample's header
    files: tuple[tuple[str, int], ...] = ()  # ImageFolder: (path below the root, label)

    def samples(self, classes: ClassList) -> Iterator[SourceSample]:
        """Read the piece. Raises UserError when the tar is damaged."""
        if self.files:
            yield from self._folder_samples()
        else:
            yield from self._tar_samples(classes)

    def _folder_samples(self) -> Iterator[SourceSample]:
        for file, label in self.files:
            try:
                yield SourceSample(folder_key(file), (self.path / file).read_bytes(), label)
            except OSError as error:
                yield SourceSample(folder_key(file), b"", label, f"cannot read the file: {error.strerror}")

    def _tar_samples(self, classes: ClassList) -> Iterator[SourceSample]:
        with open(self.path, "rb") as file:
            found = iterate_tar(file, str(self.path), self.start)
            for _, (_, sample) in zip(range(self.count), found, strict=False):
                key = clean_key(sample.key)
                image = next((sample.members[ext] for ext in IMAGE_EXTENSIONS if ext in sample.members), None)
                label, problem = _read_label(sample.members.get("cls"), classes)
                if image is None:
                    problem = f"no image among the members ({', '.join(sample.members) or 'none'})"
                yield SourceSample(key, image or b"", label, problem)


@dataclass(frozen=True)
class SourcePlan:
    """The pieces of a source, in order, and a fingerprint of all keys, labels and sizes."""

    pieces: tuple[Piece, ...]
    samples: int
    fingerprint: str


def plan_source(data: str, classes: ClassList, shard_size: int) -> SourcePlan:
    """Find what a source holds. Raises UserError for a missing or empty one, an unknown class folder, or a key that occurs twice."""
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"source.data: {path}: no such file or folder; set DATA=FOLDER (or --set source.data=FOLDER)")
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    plan = _plan_tars(tars, shard_size) if tars else _plan_folder(path, classes, shard_size)
    if not plan.samples:
        raise UserError(f"source.data: {path}: holds no images; expected WebDataset tars (*.tar) or one sub-folder of images per class")
    return plan


def clean_key(name: str) -> str:
    """A key that matches the contract's ``[A-Za-z0-9_-]+``.

    Folders are joined by ``-``. A name with other characters, or a long one, ends in a hash of the whole, so that no two meet.
    """
    joined = name.replace("/", "-")
    key = re.sub(r"[^A-Za-z0-9_-]", "-", joined)
    if key != joined or not 0 < len(key) <= MAX_KEY:
        key = f"{key[: MAX_KEY - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return key


def folder_key(file: str) -> str:
    """Key of a file of an ImageFolder: ``n01440764/n01440764_10026.JPEG`` -> ``n01440764-n01440764_10026``."""
    return clean_key(os.path.splitext(file)[0])


class _Keys:
    """Sees every sample once: finds repeated keys, and makes a fingerprint of keys, labels and sizes. Holds 8 bytes a key."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.seen: set[int] = set()

    def add(self, key: str, where: str, *rest: object) -> None:
        """``rest``: what else the fingerprint shall cover, such as the label or the size."""
        data = key.encode()
        short = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        if short in self.seen:
            raise UserError(
                f"{where}: key {key!r} occurs twice in the source; rename one (files that differ in their ending only count as one)"
            )
        self.seen.add(short)
        self.digest.update(f"{key} {rest}\n".encode())


def _plan_tars(tars: list[Path], shard_size: int) -> SourcePlan:
    keys, pieces, total = _Keys(), [], 0
    for path in tqdm(tars, desc="reading tar headers", unit="tar", disable=None if len(tars) > 20 else True, leave=False):
        with open(path, "rb") as file:
            offsets = []
            for offset, sample in index_tar(file, str(path)):
                keys.add(clean_key(sample.key), str(path), offset, sample.members.get("cls"))
                offsets.append(offset)
        for first in range(0, len(offsets), shard_size):
            count = min(shard_size, len(offsets) - first)
            name = path.name if len(offsets) <= shard_size else f"{path.name}[{first}:{first + count}]"
            pieces.append(Piece(name=name, path=path, count=count, start=offsets[first]))
        total += len(offsets)
    return SourcePlan(tuple(pieces), total, keys.digest.hexdigest()[:16])


def _plan_folder(root: Path, classes: ClassList, shard_size: int) -> SourcePlan:
    labels = {folder: label for label, folder in enumerate(classes.folders)}
    files: list[tuple[str, int]] = []
    skipped = 0
    for folder in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")):
        if folder not in labels:
            raise UserError(
                f"source.data: {root / folder}: this folder is not in the class list{nearest(folder, classes.folders)} "
                "(add it to source.classes under `folders`)"
            )
        found = [path for path in (root / folder).rglob("*") if not path.is_dir()]
        names = sorted(str(path.relative_to(root)) for path in found if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
        skipped += len(found) - len(names)
        files.extend((name, labels[folder]) for name in names)
    if skipped:
        click.echo(f"note: {root}: {skipped} files are left out, they are no images ({', '.join(IMAGE_EXTENSIONS)})", err=True)
    # Shards of one class each would make batches of one class; a fixed shuffle by name spreads them.
    files.sort(key=lambda file: hashlib.sha256(file[0].encode()).digest())
    keys = _Keys()
    for name, label in files:
        keys.add(folder_key(name), str(root / name), label, _size(root / name))
    pieces = [
        Piece(name=f"{root.name}[{first}:{first + len(part)}]", path=root, count=len(part), files=tuple(part))
        for first in range(0, len(files), shard_size)
        if (part := files[first : first + shard_size])
    ]
    return SourcePlan(tuple(pieces), len(files), keys.digest.hexdigest()[:16])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nowhere: recorded when it is read
        return 0


def _read_label(text: bytes | None, classes: ClassList) -> tuple[int | None, str | None]:
    if text is None:
        return None, "no label (KEY.cls)"
    try:
        label = int(text.decode("ascii").strip())
    except ValueError:
        return None, f"label {text[:20]!r} is not an integer"
    if not 0 <= label < len(classes.names):
        return None, f"label {label} is outside the class list (0 to {len(classes.names) - 1})"
    return label, None
