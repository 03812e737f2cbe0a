"""Views: a student sees, to the bit, what stage 1 labelled; shortened soft labels keep the mass they leave out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from manifests import UserError
from shards import ShardDataset, TrainingReader, ViewSettings, decode_image, draw_views, replay, soft_label_members
from shards.__main__ import main
from shards.codec import decode_array, encode_array
from shards.shortening import clip_like, shortening_errors, soft_labels_of
from shards.views import VIEW, expand, shorten, view_of_epoch

CLASSES, SIDE, VIEWS = 5, 8, 3
SETTINGS = ViewSettings(count=VIEWS, scale=0.3)
MakeRun = Callable[..., Path]
Members = dict[str, bytes]


def fake_teacher(pixels: np.ndarray) -> np.ndarray:
    """Logits that differ between any two images: float16 [CLASSES], from a hash of the pixels."""
    seed = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:8], "little")
    return np.random.default_rng(seed).normal(size=CLASSES).astype(np.float16)


def label_views(key: str, members: Members, settings: ViewSettings) -> Members:
    """Do what stage 1 does: replay the drawn views on the stored image and label each."""
    pixels = decode_image(members["png"]).permute(1, 2, 0).contiguous().numpy()
    views = draw_views(key, 0, settings, SIDE)
    seen = [pixels] if views is None else [replay(pixels, view) for view in views]
    logits = np.stack([fake_teacher(image) for image in seen])
    return {name: data for name, data in members.items() if name != "logits.npy"} | soft_label_members(
        logits, views, settings
    )


def labelled_run(make_run: MakeRun, out: Path, settings: ViewSettings = SETTINGS) -> Path:
    return make_run(out, edit=lambda stream, key, members: label_views(key, members, settings))


@pytest.mark.parametrize("workers", [0, 2])
def test_replayed_to_the_bit(make_run: MakeRun, tmp_path: Path, workers: int) -> None:
    """Every image is the one whose logits stand beside it, to the bit, and V epochs show all V views."""
    reader = TrainingReader(str(labelled_run(make_run, tmp_path / "run")), batch_size=7, window=2)
    assert reader.views == VIEWS
    seen: dict[tuple[str, str], set[bytes]] = {}
    for epoch in range(VIEWS):
        for batch in reader.batches(epoch, workers=workers):
            for stream, part in batch.items():
                assert part.images.shape[1:] == (3, SIDE, SIDE) and part.logits.dtype == torch.float16
                for key, image, logits in zip(part.keys, part.images, part.logits, strict=True):
                    pixels = image.permute(1, 2, 0).contiguous().numpy()
                    assert np.array_equal(fake_teacher(pixels), logits.numpy())
                    seen.setdefault((stream, key), set()).add(logits.numpy().tobytes())
    assert max(map(len, seen.values())) == VIEWS


def test_each_view_in_its_turn() -> None:
    """Any V epochs in a row show every view once; samples of one batch are at different views."""
    for first in (0, 5):
        assert sorted(view_of_epoch("key", 0, first + epoch, 4) for epoch in range(4)) == [0, 1, 2, 3]
    starts = [view_of_epoch(f"k{n}", 0, 0, 4) for n in range(400)]
    assert min(starts.count(view) for view in range(4)) > 60
    assert starts != [view_of_epoch(f"k{n}", 1, 0, 4) for n in range(400)]


def test_drawn_from_seed_and_key() -> None:
    """Equal (seed, key) give equal views; more views begin with the same ones; boxes lie inside, large enough."""
    views = draw_views("key", 0, ViewSettings(count=50, scale=0.25), 224)
    again = draw_views("key", 0, ViewSettings(count=50, scale=0.25), 224)
    fewer = draw_views("key", 0, ViewSettings(count=2, scale=0.25), 224)
    assert views is not None and np.array_equal(views, again) and np.array_equal(views[:2], fewer)
    for other in (
        draw_views("other", 0, ViewSettings(count=50), 224),
        draw_views("key", 1, ViewSettings(count=50), 224),
    ):
        assert not np.array_equal(views, other)
    high, wide = views["height"].astype(int), views["width"].astype(int)
    assert (views["top"] + high <= 224).all() and (views["left"] + wide <= 224).all()
    assert (high * wide >= 0.24 * 224**2).all() and len(np.unique(views)) == 50 and 10 < views["flip"].sum() < 40
    assert draw_views("key", 0, ViewSettings(), 224) is None


def test_the_record_is_fixed() -> None:
    """A view takes ten bytes, little-endian, on any machine: what is published today must be readable for ever."""
    views = np.array([(1, 2, 3, 4, 1), (258, 0, 8, 8, 0)], VIEW)
    data = encode_array(views)
    assert data.endswith(bytes([1, 0, 2, 0, 3, 0, 4, 0, 1, 0]) + bytes([2, 1, 0, 0, 8, 0, 8, 0, 0, 0]))
    assert np.array_equal(decode_array(data, VIEW, "views"), views)


def test_what_a_replay_gives() -> None:
    """The whole image comes back as it is, or mirrored; a crop has the pixels of PIL's bicubic filter for ever."""
    pixels = (np.arange(16 * 16 * 3) * 7 % 251).astype(np.uint8).reshape(16, 16, 3)
    whole = np.array([(0, 0, 16, 16, 0), (0, 0, 16, 16, 1), (3, 2, 9, 12, 1)], VIEW)
    assert np.array_equal(replay(pixels, whole[0]), pixels)
    assert np.array_equal(replay(pixels, whole[1]), pixels[:, ::-1])
    digest = hashlib.sha256(replay(pixels, whole[2]).tobytes()).hexdigest()
    assert digest[:16] == "fa1e43c635901e4a"
    unmirrored = np.array([(3, 2, 9, 12, 0)], VIEW)[0]
    assert replay(pixels, unmirrored).flags.writeable  # otherwise torch, which shares the memory, warns


@pytest.mark.parametrize("box", [(0, 0, 9, 8, 0), (8, 0, 1, 1, 0), (0, 0, 0, 8, 0), (0, 1, 8, 8, 0), (0, 0, 8, 8, 2)])
def test_boxes_outside_the_image(make_run: MakeRun, tmp_path: Path, box: tuple[int, ...]) -> None:
    """A published view that lies outside its image is refused by tar and key."""
    views = encode_array(np.array([box], VIEW))
    logits = encode_array(np.zeros((1, CLASSES), np.float16))
    run = make_run(
        tmp_path / "run", edit=lambda stream, key, members: members | {"views.npy": views, "logits.npy": logits}
    )
    with pytest.raises(UserError, match=r"clean-00000\d\.tar: s\d-\d\d: view"):
        next(TrainingReader(str(run), batch_size=4).batches(0))


HOSTILE = {
    "views of another type": {"views.npy": encode_array(np.zeros(2, np.int64))},
    "no views": {
        "views.npy": encode_array(np.zeros(0, VIEW)), "logits.npy": encode_array(np.zeros((0, 5), np.float16)),
    },
    "fewer logits than views": {
        "views.npy": encode_array(np.zeros(2, VIEW)), "logits.npy": encode_array(np.zeros((1, 5), np.float16)),
    },
    "logits of views without views": {"logits.npy": encode_array(np.zeros((2, CLASSES), np.float16))},
    "a top-k record of another shape": {"topk.npy": encode_array(np.zeros(1, np.dtype([("classes", "<u2", (2,))])))},
    "a class that is none": {"topk.npy": encode_array(shorten(np.eye(1, 9, 8, dtype=np.float16), 4, (4.0,)))},
    "two rows for one image": {"topk.npy": encode_array(shorten(np.zeros((2, CLASSES), np.float16), 2, (4.0,)))},
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_records_that_do_not_fit(make_run: MakeRun, tmp_path: Path, case: str) -> None:
    run = make_run(tmp_path / "run", edit=lambda stream, key, members: members | HOSTILE[case])
    with pytest.raises(UserError, match=r"dad-000000\.tar: s0-00: ") as caught:
        ShardDataset(str(run), "dad")[0]
    assert "\n" not in str(caught.value)


def test_one_view_is_stored_as_ever(make_run: MakeRun, plain_run: Path, tmp_path: Path) -> None:
    """views: 1 writes the bytes that runs without views have always had."""
    logits = np.arange(CLASSES, dtype=np.float16)[None]
    assert soft_label_members(logits, None, ViewSettings()) == {"logits.npy": encode_array(logits[0])}
    assert TrainingReader(str(plain_run), batch_size=7).views == 1


def softened(logits: np.ndarray, temperature: float) -> torch.Tensor:
    return F.softmax(torch.from_numpy(logits).double() / temperature, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_keeps_probabilities_and_the_rest(temperature: float) -> None:
    """At the stored temperatures the k probabilities are the teacher's, and the others have its remaining mass."""
    logits = clip_like(20)
    records = shorten(logits, 10, (1.0, 4.0))
    found, full = softened(expand(records, 1000, temperature), temperature), softened(logits, temperature)
    top = torch.from_numpy(records["classes"].astype(np.int64))
    torch.testing.assert_close(found.gather(1, top), full.gather(1, top), rtol=1e-5, atol=0)
    torch.testing.assert_close(1 - found.gather(1, top).sum(1), 1 - full.gather(1, top).sum(1), rtol=1e-4, atol=1e-9)


def test_error_of_a_distillation_loss_from_top_k() -> None:
    """At T = 4, the gradient from top-k records is near that from all logits; without the rest's mass it is not."""
    teacher, rng = clip_like(200), np.random.default_rng(1)
    student = F.log_softmax(torch.from_numpy(teacher + 2 * rng.normal(size=teacher.shape)) / 4, dim=1)

    def gradient_error(soft: torch.Tensor) -> float:
        """Relative error of the gradient by the student's logits, q - p."""
        exact = student.exp() - softened(teacher, 4)
        return float((softened(teacher, 4) - soft).norm() / exact.norm())

    errors = [gradient_error(softened(expand(shorten(teacher, k, (4.0,)), 1000, 4.0), 4)) for k in (10, 50, 200)]
    naive = shorten(teacher, 50, (4.0,))
    cut = torch.zeros(len(teacher), 1000, dtype=torch.float64).scatter_(
        1,
        torch.from_numpy(naive["classes"].astype(np.int64)),
        torch.from_numpy(naive["logits"].astype(np.float64)).div(4).softmax(1),
    )
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.5 * gradient_error(cut), (
        errors,
        gradient_error(cut),
    )


def test_top_k_in_a_run(make_run: MakeRun, tmp_path: Path) -> None:
    """Views and top-k records together, at a stored temperature; another one is refused by name."""
    settings = ViewSettings(count=VIEWS, topk=2, temperatures=(4.0, 1.0))
    run = labelled_run(make_run, tmp_path / "run", settings)
    full = ShardDataset(str(labelled_run(make_run, tmp_path / "full", ViewSettings(count=VIEWS))), "dad")
    for temperature in (None, 4.0, 1.0):
        dataset = ShardDataset(str(run), "dad", temperature=temperature)
        for n in (0, 5):
            assert dataset[n].logits.shape == (VIEWS, CLASSES)
            got, expected = (softened(d[n].logits.float().numpy(), temperature or 4.0) for d in (dataset, full))
            top = expected.topk(2).indices
            torch.testing.assert_close(got.gather(1, top), expected.gather(1, top), rtol=1e-5, atol=0)
    with pytest.raises(UserError, match=r"for temperature 1, 4 only, not 2; set method\.temperature"):
        ShardDataset(str(run), "dad", temperature=2.0)[0]
    with pytest.raises(UserError, match=r"views\.topk: 5 of 5 classes"):
        shorten(np.zeros((1, CLASSES), np.float16), 5, (4.0,))
    assert math.isclose(float(softened(expand(shorten(np.zeros((1, 4), np.float16), 1, (4.0,)), 4, 4.0), 4).sum()), 1)


def test_the_price_of_shortening(plain_run: Path) -> None:
    """The loss shrinks with every stored logit and vanishes with all but one, for a run and for a teacher like CLIP."""
    logits = clip_like(50)
    errors = [shortening_errors(logits, k, 4.0) for k in (10, 50, 200, 999)]
    for student in ("untrained", "near"):
        off, alike = zip(*(found[student] for found in errors), strict=True)
        assert sorted(off, key=abs, reverse=True) == list(off) and sorted(alike) == list(alike), student
        assert off[-1] == pytest.approx(0, abs=1e-4) and alike[-1] == pytest.approx(1)
    result = CliRunner().invoke(main, ["topk", str(plain_run), "--k", "1,4"])
    assert result.exit_code == 0 and result.output.count("\n| 1 |") == 1 and "| 4 |" in result.output
    assert soft_labels_of(str(plain_run)).shape[1] == CLASSES
    result = CliRunner().invoke(main, ["topk", str(plain_run), "--k", "5"])
    assert result.exit_code == 2 and "--k: 5: there are 5 classes; from 1 to 4" in result.output
