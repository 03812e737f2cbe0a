"""Partners: the teacher's logits on the clean image beside each DAD sample."""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from manifests import RunDir, RunInfo, UserError
from manifests.files.cache import cache_folder
from shards import (
    Batch,
    ShardDataset,
    TarWriter,
    TrainingReader,
    ViewSettings,
    draw_views,
    seeded_generator,
    soft_label_members,
)
from shards.codec import encode_array
from shards.epochs.partners import partner_rows
from shards.views import view_of_epoch

MakeRun = Callable[..., Path]
FIELDS = ("images", "labels", "logits", "partner", "more")


def reader(run: Path | str, batch_size: int = 7, **options) -> TrainingReader:  # type: ignore[no-untyped-def]
    return TrainingReader(str(run), **{"batch_size": batch_size, "seed": 1, "window": 2, "partners": True, **options})


def noisy(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random augmentation."""
    return (images.float() + torch.randint(0, 99, images.shape, generator=generator)).to(torch.uint8)


def dice(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers in place of the images, written over what was there."""
    return images.copy_(torch.randint(0, 256, images.shape, generator=generator))


def equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two tensors are equal, or both are missing."""
    return second is None if first is None else second is not None and torch.equal(first, second)


def same(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    """Whether two lists of batches are equal to the bit, in every field."""
    return len(first) == len(second) and all(
        list(a) == list(b)
        and a[stream].keys == b[stream].keys
        and all(equal(getattr(a[stream], name), getattr(b[stream], name)) for name in FIELDS)
        for a, b in zip(first, second, strict=True)
        for stream in a
    )


def test_pairs_are_of_one_key(plain_run: Path) -> None:
    """Beside each DAD sample stand the logits that its clean sample has; the clean stream has no partners."""
    clean = {sample.key: sample.logits for sample in ShardDataset(str(plain_run), "clean")}  # type: ignore[attr-defined]
    seen = set()
    for batch in reader(plain_run).batches(0):
        dad = batch["dad"]
        assert batch["clean"].partner is None and dad.more is None and dad.partner is not None
        assert dad.partner.dtype == torch.float16 and dad.partner.shape == dad.logits.shape
        for key, partner, own in zip(dad.keys, dad.partner, dad.logits, strict=True):
            assert torch.equal(partner, clean[key]) and not torch.equal(partner, own)
            seen.add(key)
    assert seen == {sample.key for sample in ShardDataset(str(plain_run), "dad")}  # type: ignore[attr-defined]


def test_the_dad_stream_alone_has_partners_too(plain_run: Path) -> None:
    """The clean stream is opened for them; the check before training covers its tars."""
    alone = reader(plain_run, 5, streams=("dad",))
    partners = {}
    for batch in alone.batches(0):
        assert batch["dad"].partner is not None
        partners |= dict(zip(batch["dad"].keys, batch["dad"].partner, strict=True))
    clean = {sample.key: sample.logits for sample in ShardDataset(str(plain_run), "clean")}  # type: ignore[attr-defined]
    assert partners and all(torch.equal(partner, clean[key]) for key, partner in partners.items())
    assert [dataset.stream for dataset in alone._all_datasets()] == ["dad", "clean"]


def test_batches_without_partners_are_what_they_were(plain_run: Path) -> None:
    """Digests of the first batches, taken before partners existed."""
    golden = ("9e1e38f1ba7b1bbf", "7016d4735019047e", "82c8f7534b53b533", "ce6055d086c31505")
    batches = reader(plain_run, partners=False).batches(0, transform=noisy)
    found = []
    for batch in (next(batches), next(batches)):
        for part in batch.values():
            digest = hashlib.sha256()
            for tensor in (part.images, part.labels, part.logits):
                digest.update(tensor.contiguous().numpy().tobytes())
            found.append(digest.hexdigest()[:16])
            assert part.partner is None and part.more is None
    assert tuple(found) == golden


def test_both_images_of_a_pair_are_augmented_alike(plain_run: Path) -> None:
    """x and x'' of a key draw equal numbers within an epoch. Other keys and epochs draw others."""

    def drawn(partners: bool, epoch: int) -> dict[str, dict[str, torch.Tensor]]:
        found: dict[str, dict[str, torch.Tensor]] = {"clean": {}, "dad": {}}
        for batch in reader(plain_run, partners=partners).batches(epoch, transform=dice):
            for stream, part in batch.items():
                found[stream] |= dict(zip(part.keys, part.images, strict=True))
        return found

    first, second, apart = drawn(True, 0), drawn(True, 1), drawn(False, 0)
    both = first["clean"].keys() & first["dad"].keys()
    assert len(both) > 20
    for key in both:
        assert torch.equal(first["clean"][key], first["dad"][key])
        assert not torch.equal(apart["clean"][key], apart["dad"][key])
        if key in second["dad"]:
            assert not torch.equal(first["dad"][key], second["dad"][key])
    assert len({tuple(image.flatten().tolist()) for image in first["dad"].values()}) == len(first["dad"])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 4])
def test_workers_and_resuming_change_nothing(plain_run: Path, workers: int, start: int) -> None:
    """Partners and copies are the same with any number of workers, from any step of the epoch on."""
    whole = list(reader(plain_run, copies=3).batches(2, transform=noisy))
    again = reader(plain_run, copies=3).batches(2, start, workers=workers, transform=noisy)
    assert len(whole) == 6 and same(list(again), whole[start:])


def test_ranks_share_pairs_and_copies(plain_run: Path) -> None:
    """Two ranks together, one of them with workers, have what one rank alone has."""
    alone = list(reader(plain_run, copies=2).batches(1, transform=noisy))
    ranks = [
        list(reader(plain_run, copies=2, rank=rank, world=2).batches(1, workers=rank, transform=noisy))
        for rank in range(2)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        for stream, expected in whole.items():
            pieces = [part[stream] for part in parts]
            assert [key for piece in pieces for key in piece.keys] == expected.keys
            if expected.partner is not None:
                assert torch.equal(torch.cat([piece.partner for piece in pieces]), expected.partner)  # type: ignore[misc]
            if expected.more is not None:
                assert torch.equal(torch.cat([piece.more for piece in pieces], 1), expected.more)  # type: ignore[misc]


def views_of(key: str, classes: int, stream: str) -> tuple[np.ndarray, np.ndarray]:
    """(logits, views) of a sample: three views, logits that depend on key and stream."""
    settings = ViewSettings(count=3, scale=0.3)
    views = draw_views(key, 0, settings, 8)
    assert views is not None
    logits = torch.randn(3, classes, generator=seeded_generator(key, stream)).half().numpy()
    return logits, views


def viewed(stream: str, key: str, members: dict[str, bytes]) -> dict[str, bytes]:
    """A sample's members with three views."""
    rest = {name: data for name, data in members.items() if name != "logits.npy"}
    return rest | soft_label_members(*views_of(key, 5, stream), ViewSettings(count=3, scale=0.3))


def test_partners_are_of_the_same_view(make_run: MakeRun, tmp_path: Path) -> None:
    """Where a run stores several views, both logits of a pair are on the same crop."""
    run = make_run(tmp_path / "run", edit=viewed)
    for epoch in range(3):
        for batch in reader(run).batches(epoch):
            dad = batch["dad"]
            assert dad.partner is not None
            for key, partner, own in zip(dad.keys, dad.partner, dad.logits, strict=True):
                view = view_of_epoch(key, 1, epoch, 3)
                assert np.array_equal(partner.numpy(), views_of(key, 5, "clean")[0][view])
                assert np.array_equal(own.numpy(), views_of(key, 5, "dad")[0][view])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("lacking", ["clean", "dad"])
def test_views_of_one_stream_alone_are_refused(make_run: MakeRun, tmp_path: Path, lacking: str, workers: int) -> None:
    run = make_run(tmp_path / "run", edit=lambda s, key, members: members if s == lacking else viewed(s, key, members))
    with pytest.raises(UserError, match=r"dad-00000\d\.tar: s\d-\d\d: its views are not those of .*clean-00000\d\.tar"):
        next(reader(run).batches(0, workers=workers))


def lonely_run(out: Path) -> Path:
    """A sealed run of twelve samples; the fifth has a DAD image and no clean one."""
    run = RunDir(out)
    info = RunInfo(
        recipe={"canvas": 8}, identity={}, fingerprints={"source": "x"}, classes=["a", "b"],
        shards=1, samples=12, versions={},
    )  # fmt: skip
    run.write_info(info)
    writers, rows = {"clean": TarWriter(), "dad": TarWriter()}, []
    for n in range(12):
        row: dict[str, object] = {"key": f"k{n}", "shard": 0, "label": 0, "status": "verified"}
        for stream in ("dad",) if n == 4 else ("clean", "dad"):
            members = {"cls": b"0", "logits.npy": encode_array(np.zeros(2, np.float16))}
            extent = writers[stream].add(f"k{n}", members)
            row |= {f"{stream}_{name}": getattr(extent, name) for name in ("offset", "size", "crc32")}
        rows.append(row)
    tars = {stream: (writer.close(), writer.samples) for stream, writer in writers.items()}
    run.commit(0, rows, tars, source="piece", run=info.fingerprint)
    run.seal(info, range(1))
    return out


def test_a_dad_sample_without_a_clean_one_is_refused(tmp_path: Path) -> None:
    """In one line that names run and key, before training; without partners the run reads."""
    run = lonely_run(tmp_path / "run")
    with pytest.raises(
        UserError, match=f"^{run}: k4 has a dad sample and no clean sample; make the run anew"
    ) as caught:
        reader(run, 4)
    assert "\n" not in str(caught.value)
    assert reader(run, 4, partners=False).steps == 2


def test_a_far_run_with_a_small_cache(
    plain_run: Path, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound counts clean tars twice: they are read in two orders. At the bound, batches equal those of a folder."""
    monkeypatch.setenv("DAD_CACHE", str(tmp_path / "cache"))
    make_run("memory://partners/run")
    sizes: dict[str, list[int]] = {"clean": [], "dad": []}
    for tar in RunDir(plain_run).manifest()[1]:
        sizes[tar.name.split("/")[0]].append(tar.size)
    largest = {stream: sorted(found, reverse=True) for stream, found in sizes.items()}
    needed = sum(largest["clean"][: 3 * 2 * 1]) + sum(largest["dad"][:3])
    with pytest.raises(UserError, match="three windows of 1 shards take"):
        reader("memory://partners/run", window=1, cache_gb=(needed - 1) / 2**30)
    assert needed > sum(largest["clean"][:3]) + sum(largest["dad"][:3])
    for workers in (0, 2):
        far = reader("memory://partners/run", window=1, cache_gb=(needed + 1) / 2**30)
        near = reader(plain_run, window=1)
        assert same(list(far.batches(1, workers=workers)), list(near.batches(1)))


def test_clean_tars_of_partners_are_read_ahead(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first batch, clean tars of the DAD stream's next window arrive before their samples are needed."""
    monkeypatch.setenv("DAD_CACHE", str(tmp_path / "cache"))
    make_run("memory://partners/ahead")
    far = reader("memory://partners/ahead", 5, streams=("dad",), window=1)
    next(far.batches(0))
    assert far.partners is not None
    shards = [int(window[0]) for window in far.plan("dad", 0).windows[:2]]
    tars = [dataset.index.tars[shard] for dataset in far._all_datasets() for shard in shards]
    wanted = [cache_folder("tars") / f"{tar.sha256}.tar" for tar in tars]
    for _ in range(3000):
        if all(path.exists() for path in wanted):
            break
        time.sleep(0.01)
    assert len(wanted) == 4 and all(path.exists() for path in wanted)


def test_rows_are_mapped_and_not_sent(plain_run: Path) -> None:
    """All workers map one file. What a worker that is not forked receives does not grow with the run."""
    made = reader(plain_run)
    assert made.partners is not None and made.partners.rows.dtype == np.int32
    assert not made.partners.rows.flags.owndata and not made.partners.rows.flags.writeable
    data = pickle.dumps(made)
    assert len(data) < 4000
    assert same(list(pickle.loads(data).batches(0)), list(made.batches(0)))


def test_rows_join_by_the_manifest(plain_run: Path) -> None:
    dad, clean = (ShardDataset(str(plain_run), stream) for stream in ("dad", "clean"))  # type: ignore[arg-type]
    rows = partner_rows(dad.run, dad.info)
    assert [dad.key(n) for n in range(len(dad))] == [clean.key(int(row)) for row in rows]
