"""Batches for training: exact epochs, for any workers and ranks, resumed at any step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shards import Batch, ShardDataset, TrainingReader


def reader(run: Path, batch_size: int = 7, **options) -> TrainingReader:  # type: ignore[no-untyped-def]
    return TrainingReader(str(run), **{"batch_size": batch_size, "seed": 1, "window": 2, **options})


def keys(batches: list[Batch]) -> list[dict[str, list[str]]]:
    return [{stream: part.keys for stream, part in batch.items()} for batch in batches]


def same(first: list[Batch], second: list[Batch]) -> bool:
    """Whether two lists of batches are equal to the bit."""
    return keys(first) == keys(second) and all(
        torch.equal(getattr(a[stream], name), getattr(b[stream], name))
        for a, b in zip(first, second, strict=True)
        for stream in a
        for name in ("images", "labels", "logits")
    )


def test_a_batch(plain_run: Path) -> None:
    """A batch holds what the dataset has under its keys."""
    by_key = {stream: {s.key: s for s in ShardDataset(str(plain_run), stream)} for stream in ("clean", "dad")}  # type: ignore[arg-type, attr-defined]
    for batch in reader(plain_run).batches(0):
        assert list(batch) == ["clean", "dad"] and len(batch["clean"].keys) == 7
        for stream, part in batch.items():
            assert part.images.dtype == torch.uint8 and part.images.shape == (len(part.keys), 3, 8, 8)
            assert part.labels.dtype == torch.int64 and part.logits.dtype == torch.float16
            for n, key in enumerate(part.keys):
                sample = by_key[stream][key]
                assert sample.image is not None and torch.equal(part.images[n], sample.image)
                assert part.labels[n] == sample.label and torch.equal(part.logits[n], sample.logits)


@pytest.mark.parametrize("batch_size", [1, 5, 7, 16, 48])
def test_an_epoch_sees_every_sample_once(plain_run: Path, batch_size: int) -> None:
    """Every clean sample comes once, less a remainder below one batch; DAD samples come in even shares, all of them."""
    made = (
        reader(plain_run, batch_size, streams=("clean", "dad"))
        if batch_size > 1
        else reader(plain_run, batch_size, streams=("clean",))
    )
    clean, dad = len(made.datasets["clean"]), len(made.datasets.get("dad", []))  # type: ignore[arg-type]
    for epoch in range(2):
        batches = list(made.batches(epoch))
        assert len(batches) == made.steps == clean // batch_size
        seen = Counter(key for batch in batches for key in batch["clean"].keys)
        assert max(seen.values()) == 1 and clean - len(seen) == clean % batch_size < batch_size
        if dad:
            seen = Counter(key for batch in batches for key in batch["dad"].keys)
            assert max(seen.values()) == 1 and len(seen) == dad
            assert {len(batch["dad"].keys) for batch in batches} <= {dad // made.steps, -(-dad // made.steps)}
            assert [{s: len(part.keys) for s, part in batch.items()} for batch in batches] == [
                made.sizes(n) for n in range(made.steps)
            ]


def test_who_is_left_out_changes(plain_run: Path) -> None:
    """Every sample gets its turn within some epochs."""
    made = reader(plain_run, 13)
    seen = {
        stream: {key for epoch in range(12) for batch in made.batches(epoch) for key in batch[stream].keys}
        for stream in made.datasets
    }
    assert {stream: len(found) for stream, found in seen.items()} == {
        stream: len(d) for stream, d in made.datasets.items()
    }


def test_epochs_and_seeds_differ(plain_run: Path) -> None:
    first = keys(list(reader(plain_run).batches(0)))
    assert first == keys(list(reader(plain_run).batches(0)))
    assert first != keys(list(reader(plain_run).batches(1))) and first != keys(
        list(reader(plain_run, seed=2).batches(0))
    )


def noisy(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random augmentation."""
    return (images.float() + torch.randint(0, 99, images.shape, generator=generator)).to(torch.uint8)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_does_not_matter(plain_run: Path, workers: int) -> None:
    """The same batches, in the same order, with the same random augmentation, for 0 and any number of workers."""
    expected = list(reader(plain_run).batches(3, transform=noisy))
    assert same(list(reader(plain_run).batches(3, workers=workers, transform=noisy)), expected)
    assert not torch.equal(expected[0]["clean"].images, next(reader(plain_run).batches(3))["clean"].images)


def dice(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers in place of the images."""
    return torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)


def test_every_image_is_augmented_differently(plain_run: Path) -> None:
    """Two samples, two epochs, two streams, two seeds: never the same random numbers."""
    drawn = [
        image.flatten()
        for made in (reader(plain_run), reader(plain_run, seed=2))
        for epoch in (0, 1)
        for batch in made.batches(epoch, transform=dice)
        for part in batch.values()
        for image in part.images
    ]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn) > 200


@pytest.mark.parametrize("start", [0, 1, 4, 6])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_mid_epoch(plain_run: Path, start: int, workers: int) -> None:
    """From (epoch, batches consumed), a fresh reader gives exactly the batches that were still to come."""
    whole = list(reader(plain_run).batches(1, transform=noisy))
    assert len(whole) == 6
    assert same(list(reader(plain_run).batches(1, start, workers=workers, transform=noisy)), whole[start:])


def test_the_state_is_two_integers(plain_run: Path) -> None:
    """A reader that has read other epochs, or been left in the middle of one, gives the same as a fresh one."""
    used = reader(plain_run)
    next(used.batches(5))
    list(used.batches(0, 3))
    assert same(list(used.batches(2, 1)), list(reader(plain_run).batches(2, 1)))


def test_two_epochs_at_a_time(plain_run: Path) -> None:
    """Iterators of two epochs of one reader, read in turn, do not disturb each other."""
    shared = reader(plain_run)
    first, second = shared.batches(0), shared.batches(1)
    mixed = [(next(first), next(second)) for _ in range(6)]
    assert same([a for a, _ in mixed], list(reader(plain_run).batches(0)))
    assert same([b for _, b in mixed], list(reader(plain_run).batches(1)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_every_global_batch(plain_run: Path, world: int) -> None:
    """Every rank takes the same number of steps; joined in order, their parts are the batches of one rank alone."""
    alone = keys(list(reader(plain_run).batches(0)))
    ranks = [keys(list(reader(plain_run, rank=rank, world=world).batches(0))) for rank in range(world)]
    assert {len(found) for found in ranks} == {len(alone)}
    for step, batch in enumerate(alone):
        for stream, expected in batch.items():
            parts = [ranks[rank][step][stream] for rank in range(world)]
            assert [key for part in parts for key in part] == expected
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_resuming_on_other_ranks_and_workers(plain_run: Path) -> None:
    """An epoch begun on 3 ranks and resumed on 2 with workers has the samples of an uninterrupted one."""
    whole = keys(list(reader(plain_run).batches(0)))
    before = [keys(list(reader(plain_run, rank=rank, world=3).batches(0)))[:2] for rank in range(3)]
    after = [keys(list(reader(plain_run, rank=rank, world=2).batches(0, 2, workers=1))) for rank in range(2)]
    for stream in ("clean", "dad"):
        joined = [[key for part in before for key in part[step][stream]] for step in range(2)]
        joined += [[key for part in after for key in part[step][stream]] for step in range(4)]
        assert joined == [batch[stream] for batch in whole]


def test_windows_bound_what_is_open(plain_run: Path) -> None:
    """With windows of two shards, the first batch touches at most the two tars of the first window."""
    for epoch in range(5):
        first = next(reader(plain_run, streams=("clean",)).batches(epoch))
        assert len({key.split("-")[0] for key in first["clean"].keys}) <= 2


def test_one_stream_alone(plain_run: Path) -> None:
    """clean alone (plain training, KD) is the clean part of both; dad alone reads too."""
    both = [{"clean": batch["clean"]} for batch in reader(plain_run).batches(0)]
    assert same(list(reader(plain_run, streams=("clean",)).batches(0)), both)
    assert list(next(reader(plain_run, streams=("dad",)).batches(0))) == ["dad"]


def test_from_an_object_store(plain_run: Path, make_run: Callable[..., Path]) -> None:
    """A URL gives the same batches as a folder."""
    make_run("memory://reader/run")
    far = TrainingReader("memory://reader/run", batch_size=7, seed=1, window=2)
    assert same(list(far.batches(0)), list(reader(plain_run).batches(0)))


def test_augmentation_belongs_to_the_sample(plain_run: Path) -> None:
    """The augmented image of a key does not depend on ranks, batch size or workers."""

    def images(**options) -> dict[tuple[str, str], torch.Tensor]:  # type: ignore[no-untyped-def]
        workers, size = options.pop("workers", 0), options.pop("size", 7)
        batches = reader(plain_run, size, **options).batches(2, transform=noisy, workers=workers)
        return {
            (s, key): image
            for batch in batches
            for s, part in batch.items()
            for key, image in zip(part.keys, part.images, strict=True)
        }

    alone = images()
    shared = {name: image for rank in range(3) for name, image in images(rank=rank, world=3, workers=rank).items()}
    assert alone.keys() == shared.keys()
    others = images(size=16)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    assert all(torch.equal(alone[name], image) for name, image in others.items() if name in alone)


def test_images_are_channels_last(plain_run: Path) -> None:
    """The pixels of a batch keep the order of the decoder, the layout that students compute in."""
    part = next(reader(plain_run).batches(0))["clean"]
    assert part.images.is_contiguous(memory_format=torch.channels_last)
