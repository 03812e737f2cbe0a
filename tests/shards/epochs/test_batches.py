"""Batches: copies of an image, augmented independently; parts of a batch; page-locked batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shards import TrainingReader, seeded_generator

FIELDS = ("images", "labels", "logits", "partner", "more")


def reader(run: Path | str, batch_size: int = 7, **options) -> TrainingReader:  # type: ignore[no-untyped-def]
    return TrainingReader(str(run), **{"batch_size": batch_size, "seed": 1, "window": 2, "partners": True, **options})


def dice(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers in place of the images, written over what was there."""
    return images.copy_(torch.randint(0, 256, images.shape, generator=generator))


def test_copies(plain_run: Path) -> None:
    """The first copy is what ``copies=1`` gives; each further copy draws from the generator of its own seed."""
    one, three = (
        list(reader(plain_run, partners=False, copies=copies).batches(3, transform=dice)) for copies in (1, 3)
    )
    for single, several in zip(one, three, strict=True):
        clean = several["clean"]
        assert single["clean"].more is None and several["dad"].more is None
        assert all(torch.equal(single[stream].images, several[stream].images) for stream in single)
        assert (
            clean.more is not None and clean.more.shape == (2, *clean.images.shape) and clean.more.dtype == torch.uint8
        )
        for number in (1, 2):
            for key, image in zip(clean.keys, clean.more[number - 1], strict=True):
                expected = dice(torch.empty(1, 3, 8, 8), seeded_generator(1, 3, "clean", key, number))
                assert torch.equal(image, expected[0].to(torch.uint8))


def test_copies_without_a_transform_are_the_image(plain_run: Path) -> None:
    clean = next(reader(plain_run, copies=2).batches(0))["clean"]
    assert clean.more is not None and torch.equal(clean.more[0], clean.images)


def test_parts_of_a_batch(plain_run: Path) -> None:
    """Parts, put together again, are the whole in every field, whatever their number."""
    batch = next(reader(plain_run, copies=3).batches(0))
    for stream, whole in batch.items():
        for parts in (1, 2, 3):
            cut = [whole.cut(part, parts) for part in range(parts)]
            assert [key for part in cut for key in part.keys] == whole.keys
            assert max(len(part.keys) for part in cut) - min(len(part.keys) for part in cut) <= 1
            for name in FIELDS:
                tensors = [getattr(part, name) for part in cut]
                if getattr(whole, name) is None:
                    assert tensors == [None] * parts, stream
                else:
                    assert torch.equal(torch.cat(tensors, 1 if name == "more" else 0), getattr(whole, name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to lock memory for")
def test_pinned_batches(plain_run: Path) -> None:
    """Every tensor of a batch is in page-locked memory."""
    for part in next(reader(plain_run, copies=2).batches(0, workers=1, pin=True)).values():
        assert all(tensor.is_pinned() for name in FIELDS if (tensor := getattr(part, name)) is not None)


@pytest.mark.parametrize(
    "options",
    [{"copies": 0}, {"copies": 2, "streams": ("dad",)}, {"partners": True, "streams": ("clean",)}],
)
def test_what_no_stream_can_give(plain_run: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="copies and partners"):
        reader(plain_run, **{"partners": False, **options})


def test_read_ahead_counts_copies(plain_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of clean images take memory; DAD images have no copies."""
    one, five = (reader(plain_run, 12, copies=copies) for copies in (1, 5))
    clean, dad = (one.samples[stream] for stream in ("clean", "dad"))
    monkeypatch.setattr("shards.epochs.reader.READ_AHEAD", 4 * 3 * 8 * 8 * (clean + dad) // one.steps)
    assert (one.read_ahead(1), five.read_ahead(1)) == (4, 4 * (clean + dad) // (5 * clean + dad))
