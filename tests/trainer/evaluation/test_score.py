"""Image sets: every sample once and in order, however many threads decode them; what cannot be scored is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manifests import UserError
from shards import TarWriter
from trainer.evaluation.score import score_set
from trainer.evaluation.sets import check_set, read_set, sets_below
from trainer.student import create_student

from ..conftest import CLASSES, SIDE, write_image_set


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_sample_in_order(tmp_path: Path, threads: int, parts: int) -> None:
    """Image n of the set is grey of value 10 * its label."""
    folder = write_image_set(tmp_path / "val", images=31)
    read = [list(read_set(folder, CLASSES, SIDE, part=part, parts=parts, threads=threads)) for part in range(parts)]
    assert [[label for _, label in part] for part in read] == [
        [n % CLASSES for n in range(part, 31, parts)] for part in range(parts)
    ]
    assert all(
        torch.equal(image, torch.full((3, SIDE, SIDE), 10 * label, dtype=torch.uint8))
        for part in read
        for image, label in part
    )


def test_threads_do_not_change_the_score(tmp_path: Path) -> None:
    folder = write_image_set(tmp_path / "val", images=31)
    torch.manual_seed(0)
    student = create_student("test_resnet", CLASSES, SIDE)
    scores = [
        score_set(student, folder, CLASSES, SIDE, torch.device("cpu"), bf16=False, threads=n, batch=8) for n in (1, 4)
    ]
    assert scores[0] == scores[1] and scores[0].images == 31


def write_set(folder: Path, **members: bytes) -> Path:
    folder.mkdir()
    tar = TarWriter()
    if members:
        tar.add("key", members)
    (folder / "set.tar").write_bytes(tar.close())
    return folder


def test_a_set_without_samples_is_a_user_error(tmp_path: Path) -> None:
    student = create_student("test_resnet", CLASSES, SIDE)
    with pytest.raises(UserError, match="val: its tars hold no samples"):
        score_set(student, write_set(tmp_path / "val"), CLASSES, SIDE, torch.device("cpu"), bf16=False)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "val", png=b"no image", cls=b"0")
    with pytest.raises(UserError, match=r"set\.tar: sample key: "):
        list(read_set(folder, CLASSES, SIDE, threads=2))


def test_a_broken_class_list_is_named(tmp_path: Path) -> None:
    folder = write_image_set(tmp_path / "val")
    (tmp_path / "classes.json").write_text("[broken")
    with pytest.raises(UserError, match=r"classes\.json: not a list of class names in JSON \("):
        check_set(folder, ["class 0"])


def test_image_sets_behind_urls_are_refused() -> None:
    for refuse in (lambda folder: check_set(folder, []), sets_below):
        with pytest.raises(UserError, match=r"^s3:/bucket/val: image sets are local folders, not URLs"):
            refuse(Path("s3://bucket/val"))
