"""What a source holds, cut into pieces; labels by the class list alone; whatever is wrong is recorded or refused by
name.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from manifests import UserError
from shards.sources import SourceSample, find_source
from shards.sources.classes import ClassList, load_classes
from shards.tar import KEY

CLASSES = ClassList(names=("wolf", "ant", "bee"), folders=("n9", "n1", "n5"), templates=())
WriteTar = Callable[[Path, list[tuple[str, bytes]]], None]


@pytest.fixture
def write_tar() -> WriteTar:
    from io import BytesIO
    from tarfile import TarInfo
    from tarfile import open as open_tar

    def write(path: Path, members: list[tuple[str, bytes]]) -> None:
        with open_tar(path, "w") as tar:
            for name, data in members:
                info = TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))

    return write


def read(data: Path, classes: ClassList = CLASSES, shard_size: int = 1000) -> list[SourceSample]:
    """All samples of a source, through plan and pieces."""
    plan = find_source(str(data), classes, shard_size)
    samples = [sample for piece in plan.pieces for sample in piece.samples(classes)]
    assert len(samples) == plan.samples == sum(piece.count for piece in plan.pieces)
    return samples


def test_tars_and_folders_are_the_same_source(world) -> None:  # type: ignore[no-untyped-def]
    """The same images as tars and as an ImageFolder give the same keys, bytes and labels."""
    classes = load_classes(world.clip / "prompts.yaml")
    from_tars = {(s.key, s.label, s.data) for s in read(world.tars, classes)}
    assert len(from_tars) == 36
    assert from_tars == {(s.key, s.label, s.data) for s in read(world.images, classes)}
    assert {key: label for key, label, _ in from_tars} == world.labels


def test_folder_labels_come_from_the_class_list(world) -> None:  # type: ignore[no-untyped-def]
    """Shuffling the class list shuffles the labels with it; the order of the folders on disk never matters."""
    classes = load_classes(world.clip / "prompts.yaml")
    by_name = {s.key: classes.names[s.label or 0] for s in read(world.images, classes)}
    order = [3, 0, 4, 1, 2]
    shuffled = ClassList(
        names=tuple(classes.names[i] for i in order), folders=tuple(classes.folders[i] for i in order), templates=()
    )
    after = read(world.images, shuffled)
    assert {s.key: shuffled.names[s.label or 0] for s in after} == by_name
    assert {s.key: s.label for s in after} != {s.key: s.label for s in read(world.images, classes)}
    assert (
        find_source(str(world.images), shuffled, 10).fingerprint
        != find_source(str(world.images), classes, 10).fingerprint
    )


@pytest.mark.parametrize("kind", ["tars", "images"])
@pytest.mark.parametrize("shard_size", [1, 5, 12, 100])
def test_pieces_cover_the_source_once(world, kind: str, shard_size: int) -> None:  # type: ignore[no-untyped-def]
    """No piece is larger than asked; together they hold every sample once; a piece is the same read alone or after
    the others.
    """
    classes = load_classes(world.clip / "prompts.yaml")
    plan = find_source(str(getattr(world, kind)), classes, shard_size)
    assert all(1 <= piece.count <= shard_size for piece in plan.pieces) and plan.samples == 36
    parts = [[s.key for s in piece.samples(classes)] for piece in reversed(plan.pieces)]
    assert [len(part) for part in parts] == [piece.count for piece in reversed(plan.pieces)]
    assert sorted(key for part in parts for key in part) == sorted(world.labels)
    assert len({piece.name for piece in plan.pieces}) == len(plan.pieces)


def test_a_folder_s_pieces_mix_classes(world) -> None:  # type: ignore[no-untyped-def]
    """An ImageFolder is not read class by class: shards of one class would make batches of one class."""
    classes = load_classes(world.clip / "prompts.yaml")
    for piece in find_source(str(world.images), classes, 18).pieces:
        assert len({s.label for s in piece.samples(classes)}) >= 3


def test_one_tar_file_is_a_source(world) -> None:  # type: ignore[no-untyped-def]
    assert len(read(world.tars / "source-1.tar", load_classes(world.clip / "prompts.yaml"))) == 12


def test_unknown_folder(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A folder that is no class is refused, with the nearest class; hidden folders are passed over."""
    images = tmp_path / "images"
    for folder in ("wolf", "wofl", ".cache"):
        shutil.copytree(world.images / "n09", images / folder)
    classes = dataclasses.replace(CLASSES, folders=CLASSES.names)
    with pytest.raises(UserError, match=r"images/wofl: this folder is not in the class list; did you mean 'wolf'\?"):
        find_source(str(images), classes, 10)
    shutil.rmtree(images / "wofl")
    assert {s.label for s in read(images, classes)} == {0}


def test_images_below_subfolders_and_other_files(tmp_path: Path) -> None:
    """Images are found at any depth and in upper case; other files are left alone."""
    for name in ("n1/a/b/x.JPEG", "n1/a/x.png", "n5/y.webp", "n5/notes.txt", "n5/z.jpg.part"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"data")
    assert {(s.key, s.label) for s in read(tmp_path)} == {("n1-a-b-x", 1), ("n1-a-x", 1), ("n5-y", 2)}


def test_unreadable_file_is_recorded(tmp_path: Path) -> None:
    """A file that vanishes after planning, a link to nowhere, a folder named like an image: each a problem of that
    sample alone.
    """
    (tmp_path / "n1" / "folder.jpg").mkdir(parents=True)
    (tmp_path / "n1" / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for name in ("gone.jpg", "here.jpg"):
        (tmp_path / "n1" / name).write_bytes(b"data")
    plan = find_source(str(tmp_path), CLASSES, 10)
    (tmp_path / "n1" / "gone.jpg").unlink()
    found = {s.key: s.problem for s in plan.pieces[0].samples(CLASSES)}
    assert found.pop("n1-here") is None
    assert (
        all(problem and problem.startswith("cannot read the file") for problem in found.values()) and "n1-gone" in found
    )


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: (p / "n1").mkdir(), lambda p: (p / "readme.txt").write_text("x")]
)
def test_empty_sources(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=r".*holds no images; expected"):
        find_source(str(tmp_path), CLASSES, 10)


def test_empty_and_missing_tars(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(UserError, match="holds no images"):
        find_source(str(tmp_path), CLASSES, 10)
    with pytest.raises(UserError, match=r".*nowhere: no such file or folder"):
        find_source(str(tmp_path / "nowhere"), CLASSES, 10)


def test_two_kinds_in_one_folder(tmp_path: Path, write_tar: WriteTar, write_hub: Callable[..., None]) -> None:
    """Which is meant nobody knows: both are named, locally and behind a URL. Folders that are no classes, and a
    list, leave no doubt.
    """
    import fsspec

    write_tar(tmp_path / "n1.tar", [("x.jpg", b"data"), ("x.cls", b"0")])
    (tmp_path / "logs").mkdir()
    assert find_source(str(tmp_path), CLASSES, 10).kind == "WebDataset"
    (tmp_path / "n1").mkdir()
    (tmp_path / "n1" / "y.jpg").write_bytes(b"data")  # as extracting ImageNet's own archives leaves them
    fsspec.filesystem("memory").put(f"{tmp_path}/", "/two-kinds", recursive=True)
    for data in (str(tmp_path), "memory://two-kinds"):
        with pytest.raises(UserError, match=r"holds \*\.tar files \(n1\.tar …\) and class folders \(n1 …\), .*braces"):
            find_source(data, CLASSES, 10)
    assert find_source(f"{tmp_path}/n1.tar", CLASSES, 10).kind == "WebDataset"
    shutil.rmtree(tmp_path / "n1")
    write_hub(tmp_path / "a.parquet", [(b"x", "0.png", 0)])
    with pytest.raises(UserError, match=r"holds \*\.tar files \(n1\.tar …\) and \*\.parquet files \(a\.parquet …\)"):
        find_source(str(tmp_path), CLASSES, 10)


def test_links_are_what_they_lead_to(tmp_path: Path, write_tar: WriteTar, write_hub: Callable[..., None]) -> None:
    """Linked tars, the Hub's cache (a snapshot of links into its blobs), linked class folders and images; a link to
    nothing is none.
    """
    for folder in ("blobs", "tars", "hub", "classes/n5"):
        (tmp_path / folder).mkdir(parents=True)
    write_tar(tmp_path / "blobs" / "0123", [("x.jpg", b"data"), ("x.cls", b"0")])
    write_hub(tmp_path / "blobs" / "4567", [(b"x", "0.png", 0)])
    (tmp_path / "tars" / "a.tar").symlink_to("../blobs/0123")
    (tmp_path / "hub" / "train-00000-of-00001.parquet").symlink_to("../blobs/4567")
    (tmp_path / "classes" / "n5" / "x.jpg").symlink_to("../../blobs/0123")
    (tmp_path / "classes" / "n1").symlink_to("n5")
    assert [s.key for s in read(tmp_path / "tars")] == ["x"]
    assert [s.key for s in read(tmp_path / "hub")] == ["0"]
    assert {(s.key, s.label) for s in read(tmp_path / "classes")} == {("n5-x", 2), ("n1-x", 1)}
    (tmp_path / "tars" / "b.tar").symlink_to("../blobs/nothing")
    assert len(read(tmp_path / "tars")) == 1


def test_fingerprint(world, tmp_path: Path, write_tar: WriteTar) -> None:  # type: ignore[no-untyped-def]
    """It does not depend on where the source lies; it does on every key."""
    classes = load_classes(world.clip / "prompts.yaml")
    shutil.copytree(world.tars, tmp_path / "moved")
    assert (
        find_source(str(tmp_path / "moved"), classes, 12).fingerprint
        == find_source(str(world.tars), classes, 12).fingerprint
    )
    (tmp_path / "moved" / "source-2.tar").unlink()
    assert (
        find_source(str(tmp_path / "moved"), classes, 12).fingerprint
        != find_source(str(world.tars), classes, 12).fingerprint
    )


def test_the_same_keys_in_other_tars_are_another_source(tmp_path: Path, write_tar: WriteTar) -> None:
    """Shards follow the tars: samples regrouped into other tars make other shards, so the fingerprint must tell
    them apart.
    """
    members = [(f"k{n}.jpg", b"data") for n in range(6)]
    for name, cut in (("first", 3), ("second", 4)):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "a.tar", members[:cut])
        write_tar(tmp_path / name / "b.tar", members[cut:])
    first, second = (find_source(str(tmp_path / name), CLASSES, 10) for name in ("first", "second"))
    assert [p.count for p in first.pieces] != [p.count for p in second.pieces]
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("damage", ["half", "flip", "zeros"])
def test_a_damaged_tar_is_named(world, tmp_path: Path, damage: str) -> None:  # type: ignore[no-untyped-def]
    """A source tar that is cut off, or has a header damaged or zeroed in its middle, is refused by name: no sample
    is lost in silence.
    """
    path = tmp_path / "source-0.tar"
    data = bytearray((world.tars / "source-0.tar").read_bytes())
    middle = data.index(b"img_006.jpg") // 512 * 512
    if damage == "half":
        del data[middle + 700 :]
    elif damage == "flip":
        data[middle + 3] ^= 0x40
    else:
        data[middle : middle + 512] = bytes(512)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"source-0\.tar"):
        find_source(str(tmp_path), load_classes(world.clip / "prompts.yaml"), 12)


@pytest.mark.parametrize(
    "data", ["{pipe,pipe}:touch PWNED", "{pip,pip}e:touch PWNED", "pipe:touch PWNED", "x.tar::pipe:touch PWNED"]
)
def test_a_recipe_starts_no_command_however_it_is_spelt(world, tmp_path: Path, data: str) -> None:  # type: ignore[no-untyped-def]
    from pipeline.recipe import load

    target = tmp_path / "pwned"
    text = world.recipe.read_text().replace(str(world.tars), "'" + data.replace("PWNED", str(target)) + "'")
    (tmp_path / "evil.yaml").write_text(text)
    with pytest.raises(UserError, match="a recipe is data and starts no commands"):
        load(str(tmp_path / "evil.yaml"))
    assert not target.exists()


def test_slurm_options_hold_no_line_breaks(world) -> None:  # type: ignore[no-untyped-def]
    """They are written into the job script, where a new line would be a command."""
    with pytest.raises(UserError, match=r"launch\.slurm"):
        world.load('launch.slurm.comment="x\\ntouch pwned"')


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A file name of other bytes is a key like any other."""
    (tmp_path / "n1").mkdir()
    (tmp_path / "n1" / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(b"data")
    samples = read(tmp_path)
    assert len(samples) == 1 and KEY.match(samples[0].key) and samples[0].problem is None


def test_keys_by_place_need_names_of_their_own(tmp_path: Path, write_tar: WriteTar) -> None:
    """Two dots in a name are no reason for equal keys; two files of one name are refused."""
    for name in ("train.000.tar", "train.001.tar"):
        write_tar(tmp_path / name, [("x.jpg", b"data"), ("x.cls", b"0")])
    plan = find_source(str(tmp_path), CLASSES, 10, "place")
    assert len({s.key for piece in plan.pieces for s in piece.samples(CLASSES)}) == 2
    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "b" / "train.000.tar", [("x.jpg", b"data"), ("x.cls", b"0")])
    with pytest.raises(UserError, match="have the same name"):
        find_source(f"{tmp_path}/train.000.tar::{tmp_path}/b/train.000.tar", CLASSES, 10, "place")
