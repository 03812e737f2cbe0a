"""Files that are cut, flipped, swapped, foreign or edited: both `RunDir.damage` and the reader name them."""

from __future__ import annotations

import dataclasses
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from manifests import RunDir, UserError
from manifests.rows import encode_part
from pipeline.generate import make_shards, sound_shards
from shards import ShardDataset

NAME = "dad/dad-000001.tar"


@pytest.fixture
def tar(run_copy: Path) -> Path:
    return run_copy / NAME


def named_everywhere(run: Path) -> bool:
    """Whether the record and the reader both name the damaged tar, and do not trust its shard."""
    directory = RunDir(run)
    why = directory.damage(1, directory.info().fingerprint)
    with pytest.raises(UserError, match=NAME):
        ShardDataset(str(run), "dad").check(progress=False)
    return why is not None and why.startswith(str(run / NAME))


def boundaries(path: Path) -> list[int]:
    """Where members begin, and where the archive ends."""
    with tarfile.open(path) as tar:
        return [member.offset for member in tar.getmembers()] + [tar.offset]


@pytest.mark.parametrize("filled", [False, True])
def test_cut_at_every_member_boundary(run_copy: Path, tar: Path, filled: bool) -> None:
    """What is left is a well-formed tar; filled up with zeros to its old size, it even has the right one."""
    data = tar.read_bytes()
    for at in boundaries(tar)[:-1]:
        tar.write_bytes(data[:at].ljust(len(data) if filled else at, b"\0"))
        assert named_everywhere(run_copy), at


@pytest.mark.parametrize("filled", [False, True])
def test_cut_at_random_bytes(run_copy: Path, tar: Path, filled: bool) -> None:
    data, rng = tar.read_bytes(), random.Random()
    content = len(data.rstrip(b"\0"))
    for at in (rng.randrange(content) for _ in range(50)):
        tar.write_bytes(data[:at].ljust(len(data) if filled else at, b"\0"))
        assert named_everywhere(run_copy), at


def test_flipped_bits(run_copy: Path, tar: Path) -> None:
    data, rng = tar.read_bytes(), random.Random()
    for at in (rng.randrange(len(data)) for _ in range(50)):
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        tar.write_bytes(changed)
        assert named_everywhere(run_copy), at


def swap(run: Path) -> None:
    other = run / "dad" / "dad-000000.tar"
    data = other.read_bytes()
    shutil.copy(run / NAME, other)
    (run / NAME).write_bytes(data)


def foreign_part(run: Path) -> None:
    rows, record = RunDir(run).part(1)
    part = encode_part(rows.to_pylist(), dataclasses.replace(record, run="0123456789abcdef"))
    (run / "manifest" / "part-000001.parquet").write_bytes(part)


@pytest.mark.parametrize(
    ("harm", "unsound", "word"),
    [
        (swap, {0, 1}, "dad-000001.tar"),
        (foreign_part, {1}, "belongs to another run"),
        (
            lambda run: shutil.copy(run / "manifest" / "part-000000.parquet", run / "manifest" / "part-000001.parquet"),
            {1},
            "another run or shard",
        ),
        (lambda run: shutil.copy(run / NAME, run / "clean" / "clean-000001.tar"), {1}, "clean-000001.tar"),
    ],
)
def test_what_is_not_sound_is_withdrawn_and_made_anew(
    world, run_copy: Path, finished_run: Path, run_digests: Callable[[Path], dict[str, str]],
    harm: Callable[[Path], object], unsound: set[int], word: str, capsys: pytest.CaptureFixture[str],
) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
    """A damaged shard is named and loses its part file, so that no command takes it for done; the next run mends it."""
    harm(run_copy)
    run = RunDir(run_copy)
    assert sound_shards(run, run.info(), range(3)) == {0, 1, 2} - unsound
    assert word in capsys.readouterr().err and run.shards_with_parts() == {0, 1, 2} - unsound
    make_shards(world.load(), str(run_copy))
    assert run_digests(run_copy) == run_digests(finished_run)
