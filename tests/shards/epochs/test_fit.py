"""Whether a run fits: too few samples, damaged tars, missing images and too little memory are refused or bounded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from manifests import UserError
from shards import ImageFormat, TrainingReader, encode_image
from shards.benchmark import write_manifest


def reader(run: Path, batch_size: int = 7, **options) -> TrainingReader:  # type: ignore[no-untyped-def]
    return TrainingReader(str(run), **{"batch_size": batch_size, "seed": 1, "window": 2, **options})


def test_too_few_samples(plain_run: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Too few clean samples, DAD samples or samples per rank are refused; the advice in the message works."""
    with pytest.raises(UserError, match="48 clean samples are fewer than one batch of 49; lower batch"):
        reader(plain_run, 49)
    with pytest.raises(
        UserError, match=r"only \d+ dad samples for 48 batches an epoch; raise batch to (\d+) or more"
    ) as caught:
        reader(plain_run, 1)
    advised = int(str(caught.value).split("raise batch to ")[1].split()[0])
    assert reader(plain_run, advised).steps > 1
    with pytest.raises(UserError, match="raise batch"):
        reader(plain_run, 2, world=3, streams=("clean",))
    nothing = make_run(tmp_path / "run", sizes=(2, 2), edit=None)
    assert reader(nothing, 2).steps == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_stops_training_by_name(plain_run: Path, tmp_path: Path, damage: str, workers: int) -> None:
    """A UserError names a tar that is altered, cut off or missing, even from a worker, without a stack trace."""
    copy = Path(shutil.copytree(plain_run, tmp_path / "run"))
    path = copy / "clean" / "clean-000002.tar"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[700] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:1000])
    else:
        path.unlink()
    made = reader(copy)
    with pytest.raises(UserError, match=f"^{path}: ") as caught:
        made.check()
    with pytest.raises(UserError, match=f"^{path}: ") as caught:
        list(made.batches(0, workers=workers))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_only_runs_are_refused(make_run: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    """Training needs images: for a run of labels only, the message says how to make it with images."""
    made = reader(make_run(tmp_path / "run", images=False), streams=("clean",))
    with pytest.raises(UserError, match=r"labels only.*output\.clean_images=true"):
        next(made.batches(0, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_different_sizes(make_run: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    """An image of another size cannot stand in a batch: one line names it."""
    odd = encode_image(torch.zeros(3, 9, 7, dtype=torch.uint8), ImageFormat(format="png"))
    run = make_run(
        tmp_path / "run", edit=lambda stream, key, members: members | ({"png": odd} if key == "s1-02" else {})
    )
    with pytest.raises(UserError, match=r"clean-000001\.tar: s\d-\d\d: image of \d x \d pixels among others"):
        list(reader(run, 48, streams=("clean",)).batches(0, workers=workers))


@pytest.mark.parametrize("workers", [1, 2, 12, 100])
def test_read_ahead_is_bounded(plain_run: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """The loader keeps four batches per worker; of large ones as many as fit, and at least one per worker."""
    made = reader(plain_run)
    assert made.read_ahead(workers) == 4 * workers
    batch = 3 * 8 * 8 * sum(made.samples.values()) // made.steps
    monkeypatch.setattr("shards.epochs.reader.READ_AHEAD", 13 * batch)
    assert made.read_ahead(workers) == workers * {1: 4, 2: 4, 12: 1, 100: 1}[workers]
    assert made.read_ahead(0) == 0


@pytest.mark.parametrize("sorted_by_class", [False, True])
def test_a_source_sorted_by_class_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sorted_by_class: bool
) -> None:
    """The note names a window that mends it. Shuffled sources and large windows get no note, and nothing prints."""
    write_manifest(tmp_path / "run", 20_000, 200, sorted_by_class=sorted_by_class)
    notes = reader(tmp_path / "run", 256, streams=("clean",), window=16).notes()
    assert len(notes) == sorted_by_class
    if sorted_by_class:
        assert "a window of 16 shards, from which batches are drawn, holds 80 classes; 798 would be usual" in notes[0]
        window = int(notes[0].partition("raise window to ")[2].partition(",")[0])
        assert reader(tmp_path / "run", 256, streams=("clean",), window=window).notes() == []
    assert capsys.readouterr() == ("", "")


def test_streams_that_no_batch_size_mends(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """No DAD sample, fewer of them than processes, more processes than samples in a batch: every rank says which."""
    write_manifest(tmp_path / "rejected", 2000, 2)
    with pytest.raises(UserError, match=r"no dad samples at all; weaken the attack, or train without them$"):
        reader(tmp_path / "rejected", 48)
    eleven = make_run(tmp_path / "eleven", sizes=(12,))
    for rank in (0, 7):
        with pytest.raises(
            UserError, match="a batch of 6 leaves some of 8 processes without a sample; raise batch, or start fewer"
        ):
            reader(eleven, 6, streams=("clean",), world=8, rank=rank)
        with pytest.raises(UserError, match="only 7 dad samples for 8 processes; start fewer, or weaken the attack"):
            reader(eleven, 11, world=8, rank=rank)


def test_read_ahead_counts_the_images_that_are_made(plain_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the side takes sixteen times the memory."""
    small, large = (TrainingReader(str(plain_run), batch_size=12, side=side) for side in (None, 4 * 8))
    monkeypatch.setattr("shards.epochs.reader.READ_AHEAD", 4 * 3 * 8 * 8 * sum(small.samples.values()) // small.steps)
    assert (small.read_ahead(1), large.read_ahead(1)) == (4, 1)
