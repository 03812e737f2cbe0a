"""Batches for training: exact epochs, whatever the workers and ranks, from wherever one goes on."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from manifests import UserError
from shards import Batch, ImageFormat, ShardDataset, TrainingReader, encode_image
from shards.__main__ import main
from shards.benchmark import BareTars, write_manifest, write_run


def reader(run: Path, batch_size: int = 7, **options) -> TrainingReader:  # type: ignore[no-untyped-def]
    return TrainingReader(str(run), **{"batch_size": batch_size, "seed": 1, "window": 2, **options})


def keys(batches: list[Batch]) -> list[dict[str, list[str]]]:
    return [{stream: half.keys for stream, half in batch.items()} for batch in batches]


def same(first: list[Batch], second: list[Batch]) -> bool:
    """Whether two lists of batches are equal to the bit."""
    return keys(first) == keys(second) and all(
        torch.equal(getattr(a[stream], name), getattr(b[stream], name))
        for a, b in zip(first, second, strict=True)
        for stream in a
        for name in ("images", "labels", "logits")
    )


def test_a_batch(plain_run: Path) -> None:
    """What a batch holds is what the dataset has under these keys."""
    by_key = {stream: {s.key: s for s in ShardDataset(str(plain_run), stream)} for stream in ("clean", "dad")}  # type: ignore[arg-type, attr-defined]
    for batch in reader(plain_run).batches(0):
        assert list(batch) == ["clean", "dad"] and len(batch["clean"].keys) == 7
        for stream, half in batch.items():
            assert half.images.dtype == torch.uint8 and half.images.shape == (len(half.keys), 3, 8, 8)
            assert half.labels.dtype == torch.int64 and half.logits.dtype == torch.float16
            for n, key in enumerate(half.keys):
                sample = by_key[stream][key]
                assert sample.image is not None and torch.equal(half.images[n], sample.image)
                assert half.labels[n] == sample.label and torch.equal(half.logits[n], sample.logits)


@pytest.mark.parametrize("batch_size", [1, 5, 7, 16, 48])
def test_an_epoch_sees_every_sample_once(plain_run: Path, batch_size: int) -> None:
    """Every clean sample once, less a remainder below one batch; both streams end together; every DAD sample, in even shares."""
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
            assert [{s: len(half.keys) for s, half in batch.items()} for batch in batches] == [
                made.sizes(n) for n in range(made.steps)
            ]


def test_who_is_left_out_changes(plain_run: Path) -> None:
    """Over the epochs every sample gets its turn."""
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
        for half in batch.values()
        for image in half.images
    ]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn) > 200


@pytest.mark.parametrize("start", [0, 1, 4, 6])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_mid_epoch(plain_run: Path, start: int, workers: int) -> None:
    """A fresh reader, told (epoch, batches consumed), gives exactly the batches that were still to come."""
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
    """Every rank takes the same number of steps; put together, in order, their parts are the batches of one rank alone."""
    alone = keys(list(reader(plain_run).batches(0)))
    ranks = [keys(list(reader(plain_run, rank=rank, world=world).batches(0))) for rank in range(world)]
    assert {len(found) for found in ranks} == {len(alone)}
    for step, batch in enumerate(alone):
        for stream, expected in batch.items():
            parts = [ranks[rank][step][stream] for rank in range(world)]
            assert [key for part in parts for key in part] == expected
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_resuming_on_other_ranks_and_workers(plain_run: Path) -> None:
    """Begun on 3 ranks, gone on with on 2 with workers: the same samples as without interruption."""
    whole = keys(list(reader(plain_run).batches(0)))
    before = [keys(list(reader(plain_run, rank=rank, world=3).batches(0)))[:2] for rank in range(3)]
    after = [keys(list(reader(plain_run, rank=rank, world=2).batches(0, 2, workers=1))) for rank in range(2)]
    for stream in ("clean", "dad"):
        joined = [[key for part in before for key in part[step][stream]] for step in range(2)]
        joined += [[key for part in after for key in part[step][stream]] for step in range(4)]
        assert joined == [batch[stream] for batch in whole]


def test_windows_bound_what_is_open(plain_run: Path) -> None:
    """With windows of two shards, a stretch of an epoch touches few tars; the first batch at most those of the first window."""
    for epoch in range(5):
        first = next(reader(plain_run, streams=("clean",)).batches(epoch))
        assert len({key.split("-")[0] for key in first["clean"].keys}) <= 2


def test_one_stream_alone(plain_run: Path) -> None:
    """clean alone (plain training, KD) is the clean half of both; dad alone reads too."""
    both = [{"clean": batch["clean"]} for batch in reader(plain_run).batches(0)]
    assert same(list(reader(plain_run, streams=("clean",)).batches(0)), both)
    assert list(next(reader(plain_run, streams=("dad",)).batches(0))) == ["dad"]


def test_too_few_samples(plain_run: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Fewer clean samples than one batch, fewer DAD samples than batches, fewer of a batch than ranks: refused; what is advised works."""
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
    """A tar that is altered, cut off or missing is named by a plain UserError, also from within a worker; no stack trace is inside."""
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
    """Training needs images: a run that stores labels only says so, and how to make it with images."""
    made = reader(make_run(tmp_path / "run", images=False), streams=("clean",))
    with pytest.raises(UserError, match=r"labels only.*output\.clean_images=true"):
        next(made.batches(0, workers=workers))


def test_from_an_object_store(plain_run: Path, make_run: Callable[..., Path]) -> None:
    """The same batches from a URL as from a folder."""
    make_run("memory://reader/run")
    far = TrainingReader("memory://reader/run", batch_size=7, seed=1, window=2)
    assert same(list(far.batches(0)), list(reader(plain_run).batches(0)))


def test_augmentation_belongs_to_the_sample(plain_run: Path) -> None:
    """The augmented image of a key is the same on one rank and on three, in batches of 7 and of 16, with and without workers."""

    def images(**options) -> dict[tuple[str, str], torch.Tensor]:  # type: ignore[no-untyped-def]
        workers, size = options.pop("workers", 0), options.pop("size", 7)
        batches = reader(plain_run, size, **options).batches(2, transform=noisy, workers=workers)
        return {
            (s, key): image
            for batch in batches
            for s, half in batch.items()
            for key, image in zip(half.keys, half.images, strict=True)
        }

    alone = images()
    shared = {name: image for rank in range(3) for name, image in images(rank=rank, world=3, workers=rank).items()}
    assert alone.keys() == shared.keys()
    others = images(size=16)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    assert all(torch.equal(alone[name], image) for name, image in others.items() if name in alone)


def test_images_are_channels_last(plain_run: Path) -> None:
    """The pixels of a batch stay in the order they were decoded in: the layout that the students compute in."""
    half = next(reader(plain_run).batches(0))["clean"]
    assert half.images.is_contiguous(memory_format=torch.channels_last)


def test_bench_prints_all_four(forked: Callable[..., object]) -> None:
    """`python -m shards bench` on a tiny set: four ways, each with its ratio to the bare loop."""
    program = "import sys; from shards.__main__ import main; main(sys.argv[1:])"
    told = forked(
        program, "bench", "--images", "256", "--shards", "2", "--workers", "0,1", "--repeats", "1", "--samples", "2000"
    )
    lines = told.stdout.splitlines()  # type: ignore[attr-defined]
    for name in ("bare loop", "webdataset", "torchvision ImageFolder", "this reader"):
        line = next(line for line in lines if line.startswith(name))
        assert line.count("(") == 2 and (name != "bare loop" or line.count("(1.00)") == 2)
    assert any("one epoch planned" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--workers=-1", "--workers: -1: from 0 to 8"),
        ("--workers=0,3 --shards=2", "--workers: 0,3: from 0 to 2, so that each has a tar; raise --shards"),
        ("--workers=two", "--workers: 'two' is no list of numbers"),
        ("--samples=-5", "'--samples': -5 is not in the range"),
        ("--samples=10", "--samples: 10: fewer than a batch of 1024"),
    ],
)
def test_bench_refuses_before_it_measures(arguments: str, reason: str) -> None:
    told = CliRunner().invoke(main, ["bench", *arguments.split()], prog_name="python -m shards")
    assert told.exit_code == 2 and told.stdout == "" and told.stderr.count("\n") == 1 and reason in told.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_different_sizes(make_run: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    """One published image of another size cannot stand in a batch: named, not a stack trace."""
    odd = encode_image(torch.zeros(3, 9, 7, dtype=torch.uint8), ImageFormat(format="png"))
    run = make_run(
        tmp_path / "run", edit=lambda stream, key, members: members | ({"png": odd} if key == "s1-02" else {})
    )
    with pytest.raises(UserError, match=r"clean-000001\.tar: s\d-\d\d: image of \d x \d pixels among others"):
        list(reader(run, 48, streams=("clean",)).batches(0, workers=workers))


@pytest.mark.parametrize("workers", [1, 2, 12, 100])
def test_read_ahead_is_bounded(plain_run: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Four batches a worker where they are small; where they are not, as many as fit, and never none."""
    made = reader(plain_run)
    assert made.read_ahead(workers) == 4 * workers
    batch = 3 * 8 * 8 * sum(made.samples.values()) // made.steps
    monkeypatch.setattr("shards.reader.READ_AHEAD", 13 * batch)
    assert made.read_ahead(workers) == workers * {1: 4, 2: 4, 12: 1, 100: 1}[workers]
    assert made.read_ahead(0) == 0


def test_the_bare_loop_of_the_benchmark_reads_every_image(tmp_path: Path) -> None:
    """Also those that do not fill a batch: it is what the others are measured against."""
    write_run(tmp_path / "run", tmp_path / "flat", 70, 2)
    batches = list(BareTars(sorted((tmp_path / "run" / "clean").glob("*.tar"))))
    assert [len(labels) for _, labels in batches] == [64, 6]


@pytest.mark.parametrize("sorted_by_class", [False, True])
def test_a_source_sorted_by_class_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sorted_by_class: bool
) -> None:
    """Once, by the first rank, with a window that mends it; shuffled sources, and windows over everything, are not remarked upon."""
    write_manifest(tmp_path / "run", 20_000, 200, sorted_by_class=sorted_by_class)
    for rank in range(2):
        reader(tmp_path / "run", 256, streams=("clean",), window=16, rank=rank, world=2)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == sorted_by_class
    if sorted_by_class:
        assert "a window of 16 shards, from which batches are drawn, holds 80 classes where 798 were" in notes[0]
        window = int(notes[0].partition("raise window to ")[2].partition(",")[0])
        reader(tmp_path / "run", 256, streams=("clean",), window=window)
    assert capsys.readouterr().err == ""


def test_streams_that_no_batch_size_mends(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing verified at all, fewer verified than processes, more processes than samples in a batch: said as it is, on every rank."""
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
    """Four times the side is sixteen times the memory."""
    small, large = (TrainingReader(str(plain_run), batch_size=12, side=side) for side in (None, 4 * 8))
    monkeypatch.setattr("shards.reader.READ_AHEAD", 4 * 3 * 8 * 8 * sum(small.samples.values()) // small.steps)
    assert (small.read_ahead(1), large.read_ahead(1)) == (4, 1)
