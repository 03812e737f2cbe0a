"""Scores: the same in every layout and place, however work is shared out; unusable samples are counted and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from manifests import Store, UserError
from shards import TarWriter
from trainer.evaluation.score import Score, evaluate, score_set
from trainer.evaluation.sets import check_set, image_set, sets_below
from trainer.student import create_student

from ...hub import LAYOUTS, Labelled, write_layout
from ...world import draw_pictures, jpeg
from ..conftest import CLASSES, NAMES, SIDE, write_image_set

CPU = torch.device("cpu")


def photographs(count: int = 31) -> list[Labelled]:
    """Images of a photograph's shape, whose labels follow no order."""
    return [(f"k{n:03d}", jpeg(picture[:, :, :25]), n * n % CLASSES) for n, picture in enumerate(draw_pictures(count))]


def score(where: str | Path, threads: int = 1, batch: int = 8) -> Score:
    torch.manual_seed(0)
    student = create_student("test_resnet", CLASSES, SIDE)
    return score_set(student, image_set(where, NAMES), SIDE, CPU, bf16=False, threads=threads, batch=batch)


@pytest.mark.parametrize("place", ["local", "s3", "memory"])
def test_the_layout_does_not_matter(tmp_path: Path, request: pytest.FixtureRequest, place: str) -> None:
    """The same pixels with the same labels, and the same score, whole and as the sum of two parts."""
    if place == "s3":
        request.getfixturevalue("object_store")
    root = {"local": str(tmp_path), "s3": f"s3://bucket/{tmp_path.name}", "memory": f"memory://{tmp_path.name}"}[place]
    seen, scores = [], []
    for kind in LAYOUTS:
        where = write_layout(f"{root}/{kind}", kind, photographs(), NAMES, "jpg")
        images = image_set(where, NAMES)
        images.check()
        parts = [list(images.pictures(SIDE, part=part, parts=2, threads=2)) for part in range(2)]
        assert {len(part) for part in parts} == {15, 16}
        whole, shared = (
            sorted(
                (picture.label, picture.image.numpy().tobytes()) for picture in pictures if picture.image is not None
            )
            for pictures in (images.pictures(SIDE), parts[0] + parts[1])
        )
        assert whole == shared and len({image for _, image in whole}) == 31
        seen.append(whole)
        scores.append(score(where))
    assert seen[0] == seen[1] == seen[2] and [label for label, _ in seen[0]] == sorted(n * n % 5 for n in range(31))
    assert scores[0] == scores[1] == scores[2] and scores[0].images == 31
    assert sets_below(root) == sorted(LAYOUTS)
    student = create_student("test_resnet", CLASSES, SIDE)
    below = evaluate(student, root, NAMES, SIDE, CPU, bf16=False, label="student")
    assert list(below) == sorted(LAYOUTS) and len(set(below.values())) == 1


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_sample_in_order(tmp_path: Path, threads: int, parts: int) -> None:
    """Image n of the set is grey of value 10 * its label."""
    images = image_set(write_image_set(tmp_path / "val", images=31), NAMES)
    read = [list(images.pictures(SIDE, part=part, parts=parts, threads=threads)) for part in range(parts)]
    assert [[picture.label for picture in part] for part in read] == [
        [n % CLASSES for n in range(part, 31, parts)] for part in range(parts)
    ]
    for picture in (picture for part in read for picture in part):
        grey = torch.full((3, SIDE, SIDE), 10 * picture.label, dtype=torch.uint8)
        assert picture.image is not None and torch.equal(picture.image, grey)


def test_threads_do_not_change_the_score(tmp_path: Path) -> None:
    folder = write_image_set(tmp_path / "val", images=31)
    assert score(folder) == score(folder, threads=4) and score(folder).images == 31


def test_a_set_without_samples_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "set.tar").write_bytes(TarWriter().close())
    for refuse in (score, lambda folder: check_set(folder, NAMES)):
        with pytest.raises(UserError, match=r"val: holds no images; expected"):
            refuse(tmp_path / "val")


def spoil(samples: list[Labelled], *numbers: int) -> list[Labelled]:
    return [(key, b"no image" if n in numbers else data, label) for n, (key, data, label) in enumerate(samples)]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_one_bad_image_is_left_out_by_name(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to one percent: the others count, and a note says which is missing."""
    grey = jpeg(torch.full((3, 8, 8), 99, dtype=torch.uint8))
    samples: list[Labelled] = [(f"k{n:03d}", grey, n % CLASSES) for n in range(120)]
    where = write_layout(tmp_path / kind, kind, spoil(samples, 40), NAMES, "jpg")
    check_set(where, NAMES)
    assert (score(where).images, score(where).left_out) == (119, 1)
    first = {"folders": "class 0/k040.jpg", "tars": "set-0.tar: sample k040", "parquet": "set-0.parquet: row 40"}[kind]
    (told,) = set(capsys.readouterr().err.splitlines())
    assert told.startswith(f"note: {where}: 1 of 120 samples cannot be used, the first is {first}: unreadable image")
    more = write_layout(tmp_path / "more" / kind, kind, spoil(samples, 40, 110), NAMES, "jpg")
    with pytest.raises(UserError, match=r": 2 of 120 samples cannot be used, the first is .*: unreadable image") as e:
        score(more)
    assert "\n" not in str(e.value) and "renditions" not in str(e.value)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_small_set_with_a_bad_image_is_refused_before_it_is_used(tmp_path: Path, kind: str) -> None:
    """In a set of at most 100 images one is more than a percent: the check reads them all."""
    where = write_layout(tmp_path / kind, kind, spoil(photographs(), 30), NAMES, "jpg")
    with pytest.raises(UserError, match=r": 1 of 31 samples cannot be used, the first is .*: unreadable image.*1%"):
        check_set(where, NAMES)


def add_member(folder: Path, **members: bytes) -> Path:
    tar = TarWriter()
    tar.add("zz", members)
    (folder / "zz.tar").write_bytes(tar.close())
    return folder


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"jpg": b"", "json": b"{}"}, r"zz\.tar: sample zz: no label \(KEY\.cls\)"),
        ({"jpg": b"", "cls": b"first"}, r"zz\.tar: sample zz: label b'first' is not an integer"),
        ({"md": b"hello"}, r"zz\.tar: sample zz: no image among the members \(md\)"),
    ],
)
def test_headers_tell_before_any_image_is_read(tmp_path: Path, members: dict[str, bytes], problem: str) -> None:
    folder = add_member(write_image_set(tmp_path / "val"), **members)
    with pytest.raises(UserError, match=rf"^{folder}: 1 of 21 samples cannot be used, the first is .*{problem}"):
        check_set(folder, NAMES)


@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_one_label_of_another_list_is_refused(tmp_path: Path, kind: str) -> None:
    """However many others fit: such a set is of other classes."""
    names = [*NAMES, "one more"]
    samples = [*photographs(120), ("zz", jpeg(draw_pictures(1)[0]), CLASSES)]
    where = write_layout(tmp_path / kind, kind, samples, names if kind == "tars" else (), "jpg")
    for refuse in (score, lambda where: check_set(where, NAMES)):
        with pytest.raises(
            UserError, match=rf"{where}: set-1.*: label 5 is outside the class list \(0 to 4\); is the set"
        ):
            refuse(where)


def test_a_broken_class_list_is_named(tmp_path: Path) -> None:
    folder = write_image_set(tmp_path / "val")
    (tmp_path / "classes.json").write_text("[broken")
    with pytest.raises(UserError, match=r"classes\.json: not a list of class names in JSON \("):
        check_set(folder, ["class 0"])


@pytest.mark.parametrize("file", ["classes.yaml", "classes.json"])
@pytest.mark.parametrize("url", ["", "memory://beside"])
def test_folders_of_classes_beside_the_sets(tmp_path: Path, file: str, url: str) -> None:
    """Without a list beside them, folders are called as the classes; with one, as it says."""
    root = url or str(tmp_path)
    folders = ["n4", "n3", "n2", "n1", "n0"]
    named = write_layout(f"{root}/named", "folders", photographs(), NAMES, "jpg")
    other = write_layout(f"{root}/other", "folders", photographs(), folders, "jpg")
    check_set(named, NAMES)
    advice = r"/other/n0: this folder is not in the class list.* \(list `classes` and the `folders` .*/classes\.yaml\)"
    with pytest.raises(UserError, match=advice):
        check_set(other, NAMES)
    Store(root).write(file, json.dumps({"classes": NAMES, "folders": folders}).encode())
    assert score(other).images == 31
    labels = sorted(picture.label for picture in image_set(other, NAMES).pictures(SIDE))
    assert labels == sorted(n * n % 5 for n in range(31))
    with pytest.raises(UserError, match=rf"/named/class 0: this folder is not .* \(correct `folders` in .*/{file}\)"):
        check_set(named, NAMES)
    Store(root).remove(file)


def test_classes_of_one_name_need_their_folders(tmp_path: Path) -> None:
    where = write_layout(tmp_path / "val", "folders", [("a", b"", 0)], ["crane"])
    with pytest.raises(UserError, match=r"val: two classes have the name 'crane', .*classes\.yaml"):
        check_set(where, ["crane", "crane"])


def test_imagenet_s_folders_are_known(tmp_path: Path) -> None:
    """By the names of its classes; nothing has to lie beside the sets."""
    from shards.sources.classes import imagenet_classes

    wnids = ["n01440764", "n02085620", "n15075141"]
    where = write_layout(tmp_path / "a", "folders", [(f"k{n}", jpeg(draw_pictures(1)[0]), n) for n in range(3)], wnids)
    pictures = image_set(where, list(imagenet_classes().names)).pictures(8)
    assert [picture.label for picture in pictures] == [0, 151, 999]


def test_a_command_is_no_image_set() -> None:
    with pytest.raises(UserError, match=r"^pipe:cat a\.tar: image sets are read many times"):
        check_set("pipe:cat a.tar", NAMES)


def test_what_is_below_a_folder(tmp_path: Path) -> None:
    """Folders that hold no set are passed over, and a set in the place of the folder above it gets advice."""
    write_image_set(tmp_path / "val")
    write_image_set(tmp_path / "train")
    write_layout(tmp_path / "a", "folders", photographs(3), NAMES)
    (tmp_path / "notes" / "old").mkdir(parents=True)
    (tmp_path / "notes" / "old" / "a.txt").write_text("x")
    (tmp_path / ".cache" / "x").mkdir(parents=True)
    assert sets_below(tmp_path) == ["val", "a"]
    for wrong in ("notes", "a"):
        with pytest.raises(UserError, match=r"holds no evaluation sets .*folder above"):
            sets_below(tmp_path / wrong)
