"""The contract, checked on a finished run that is read with other tools than the project's."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.job.prepare import prepare
from pipeline.job.shard import run_shard
from pipeline.method.attack import attack, draw_noise
from shards.sources import find_source
from shards.sources.classes import load_classes

Members = dict[str, dict[str, bytes]]  # by key, then by extension


def read_stream(run: Path, stream: str) -> Members:
    """Read a stream with the standard library's tarfile; checks that members of a sample follow each other."""
    samples: Members = {}
    for path in sorted((run / stream).glob("*.tar")):
        last = None
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                assert key == last or key not in samples
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(key, {})[extension] = file.read()
                last = key
    return samples


@pytest.fixture(scope="module")
def rows(finished_run: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(finished_run / "manifest.parquet").to_pylist()}


@pytest.fixture(scope="module")
def streams(finished_run: Path) -> dict[str, Members]:
    return {stream: read_stream(finished_run, stream) for stream in ("clean", "dad")}


def pixels(data: bytes) -> torch.Tensor:
    """A stored image as a teacher takes it: float [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1).float() / 255


def logits_of(members: dict[str, bytes]) -> np.ndarray:
    return np.load(io.BytesIO(members["logits.npy"]), allow_pickle=False)  # type: ignore[no-any-return]


def test_every_source_sample_has_one_row(world, finished_run: Path, rows) -> None:  # type: ignore[no-untyped-def]
    """No sample is dropped in silence: every source sample has a row with its label; the broken one says why."""
    table = pq.read_table(finished_run / "manifest.parquet")
    assert table.num_rows == 36 and {key: row["label"] for key, row in rows.items()} == world.labels
    errors = {key: row["reason"] for key, row in rows.items() if row["status"] == "error"}
    assert len(errors) == 1 and next(iter(errors)).endswith("img_017") and "truncated" in next(iter(errors.values()))


def test_statuses_fit_a_useful_run(rows) -> None:  # type: ignore[no-untyped-def]
    """The parts these tests are made of do reject and verify: otherwise the tests below would prove nothing."""
    statuses = [row["status"] for row in rows.values()]
    assert statuses.count("verified") >= 15 and statuses.count("rejected") >= 3


def test_streams_hold_exactly_what_the_rows_say(rows, streams) -> None:  # type: ignore[no-untyped-def]
    """clean: every readable sample; dad: exactly the verified ones."""
    assert set(streams["clean"]) == {key for key, row in rows.items() if row["status"] != "error"}
    assert set(streams["dad"]) == {key for key, row in rows.items() if row["status"] == "verified"}


def test_members(rows, streams) -> None:  # type: ignore[no-untyped-def]
    """Every sample of a stream has the same members, labels are ASCII integers, logits float16, codes uint16."""
    assert {tuple(members) for members in streams["clean"].values()} == {("jpg", "cls", "logits.npy")}
    assert {tuple(members) for members in streams["dad"].values()} == {("jpg", "cls", "logits.npy", "codes.npy")}
    for stream in streams.values():
        for key, members in stream.items():
            assert members["cls"] == str(rows[key]["label"]).encode()
            logits = logits_of(members)
            assert logits.dtype == np.float16 and logits.shape == (5,)
            image = Image.open(io.BytesIO(members["jpg"]))
            assert image.format == "JPEG" and image.size == (32, 32) and image.mode == "RGB"
    for members in streams["dad"].values():
        codes = np.load(io.BytesIO(members["codes.npy"]), allow_pickle=False)
        assert codes.dtype == np.uint16 and codes.shape == (16, 16) and codes.max() < 64


def test_logits_are_the_teachers_on_the_stored_image(streams, models) -> None:  # type: ignore[no-untyped-def]
    """The soft label belongs to the image as a reader decodes it, not to the tensor before compression."""
    for stream in streams.values():
        for members in stream.values():
            with torch.no_grad():
                now = models.teacher(pixels(members["jpg"])[None])[0].numpy()
            np.testing.assert_allclose(logits_of(members).astype(np.float32), now, atol=2e-2, rtol=2e-3)


def test_verified_means_the_stored_label_agrees(streams, models) -> None:  # type: ignore[no-untyped-def]
    """For every sample in dad, both the stored logits and the teacher give the label as top-1."""
    for members in streams["dad"].values():
        label = int(members["cls"])
        assert logits_of(members).argmax() == label
        with torch.no_grad():
            assert models.teacher(pixels(members["jpg"])[None]).argmax() == label


def test_stored_codes_decode_to_the_stored_image(streams, models) -> None:  # type: ignore[no-untyped-def]
    """KEY.codes.npy are the codes of x'': decoding them gives the image, but for the JPEG's loss."""
    for members in list(streams["dad"].values())[:10]:
        codes = torch.from_numpy(np.load(io.BytesIO(members["codes.npy"])).astype(np.int64))
        with torch.no_grad():
            image = models.discretizer_model.decode(codes[None])[0]
        assert (image - pixels(members["jpg"])).abs().mean() < 0.03


def again(world, models, key_filter) -> list[tuple[str, int, torch.Tensor, torch.Tensor, torch.Tensor]]:  # type: ignore[no-untyped-def]
    """The method once more, one image at a time: (key, label, x, attacked before Q, x'')."""
    recipe = world.load()
    classes = load_classes(world.clip / "prompts.yaml")
    found = []
    for piece in find_source(str(world.tars), classes, 12).pieces:
        for sample in prepare(piece, recipe, classes):
            if sample.clean is None or not key_filter(sample.source.key):
                continue
            x = sample.clean[None].float() / 255
            noise = draw_noise([sample.source.key], (3, 32, 32), recipe.attack, recipe.seed)
            made = attack(
                x, torch.tensor([sample.source.label]), models.teacher, models.discretizer, recipe.attack, noise
            )
            found.append((sample.source.key, sample.source.label, x[0], made.perturbed[0], made.adversarial[0]))
    return found


def test_rejected_rows_are_really_misclassified(world, models, rows) -> None:  # type: ignore[no-untyped-def]
    """The teacher does not see the label on a rejected image, made and stored again; the row says what it sees."""
    rejected = {key for key, row in rows.items() if row["status"] == "rejected"}
    for key, label, _, _, adversarial in again(world, models, rejected.__contains__):
        buffer = io.BytesIO()
        picture = (adversarial * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=0)
        with torch.no_grad():
            sees = models.teacher(pixels(buffer.getvalue())[None]).argmax().item()
        assert (
            sees != label and rows[key]["dad_pred"] == sees and rows[key]["reason"] == f"the teacher sees class {sees}"
        )
        assert (
            abs(rows[key]["bytes"] - len(buffer.getvalue())) < 50
        )  # another batch size: the last bits of the pixels may differ
        assert rows[key]["dad_offset"] is None


def test_stored_images_are_the_methods(world, models, rows, streams) -> None:  # type: ignore[no-untyped-def]
    """x is the stored clean image; x'' is the attack's, made from it with the noise of (seed, key)."""
    some = set(list(streams["dad"])[::4])
    for key, _, x, _, adversarial in again(world, models, some.__contains__):
        assert torch.equal(pixels(streams["clean"][key]["jpg"]), x)
        assert (pixels(streams["dad"][key]["jpg"]) - adversarial).abs().mean() < 0.03


def test_measurements_of_a_row(world, models, rows, streams) -> None:  # type: ignore[no-untyped-def]
    """Losses, predictions, probabilities, the perturbation's length and changed codes are what their names say."""
    some = set(list(streams["dad"])[::5])
    for key, label, x, perturbed, _ in again(world, models, some.__contains__):
        row, y = rows[key], torch.tensor([label])
        with torch.no_grad():
            discrete, codes = models.discretizer(x[None])
            _, codes_after = models.discretizer(perturbed[None])
            attacked = torch.nn.functional.cross_entropy(models.teacher(perturbed[None]), y).item()
        for stream, name in (("clean", "clean"), ("dad", "dad")):
            stored = torch.from_numpy(logits_of(streams[stream][key])).float()
            assert row[f"{name}_pred"] == stored.argmax().item()
            assert row[f"{name}_prob"] == pytest.approx(stored.softmax(0).max().item(), abs=1e-3)
            assert row[f"loss_{name}"] == pytest.approx(-stored.log_softmax(0)[label].item(), abs=1e-2)
        assert row["loss_attacked"] == pytest.approx(attacked, abs=1e-2)
        assert (
            row["delta_l2"] == pytest.approx((perturbed - discrete[0]).norm().item(), abs=1e-3)
            and row["delta_l2"] <= 1.0 + 1e-4
        )
        assert row["codes_changed"] == pytest.approx((codes != codes_after).float().mean().item(), abs=0.02)
        assert row["bytes"] == len(streams["dad"][key]["jpg"])


def test_extents_point_at_samples(finished_run: Path, rows) -> None:  # type: ignore[no-untyped-def]
    """offset, size and crc32 of a row cut exactly its sample out of the tar; with an end added, that is a tar."""
    for key, row in rows.items():
        for stream in ("clean", "dad"):
            if row[f"{stream}_offset"] is None:
                continue
            data = (finished_run / stream / f"{stream}-{row['shard']:06d}.tar").read_bytes()
            piece = data[row[f"{stream}_offset"] : row[f"{stream}_offset"] + row[f"{stream}_size"]]
            assert zlib.crc32(piece) == row[f"{stream}_crc32"]
            with tarfile.open(fileobj=io.BytesIO(piece + bytes(1024))) as tar:
                assert {name.split(".")[0] for name in tar.getnames()} == {key}


def test_run_json_says_what_was_asked_and_what_came(world, finished_run: Path, rows) -> None:  # type: ignore[no-untyped-def]
    """The frozen recipe, fingerprints, class list in order, versions and counts."""
    info = json.loads((finished_run / "run.json").read_text())
    assert info["recipe"]["attack"]["eps"] == 1.0 and info["samples"] == 36 and info["shards"] == 3
    assert set(info["fingerprints"]) == {"teacher", "discretizer", "classes", "source"}
    assert info["classes"] == list(load_classes(world.clip / "prompts.yaml").names)
    statuses = [row["status"] for row in rows.values()]
    assert info["counts"] == {status: statuses.count(status) for status in sorted(set(statuses))}
    assert (
        info["versions"]["torch"] == torch.__version__.split("+")[0] or info["versions"]["torch"] == torch.__version__
    )


def run_one(world, models, out: Path, *overrides: str) -> list[dict[str, Any]]:  # type: ignore[no-untyped-def]
    """The job of shard 0 alone."""
    from manifests import RunDir

    recipe = world.load(*overrides)
    classes = load_classes(world.clip / "prompts.yaml")
    piece = find_source(str(world.tars), classes, 12).pieces[0]
    return run_shard(0, piece, recipe, classes, models, RunDir(out), "run", lambda rows: None)


def test_labels_only(world, models, tmp_path: Path, streams) -> None:  # type: ignore[no-untyped-def]
    """clean_images: false stores no clean image, but label and soft label of each."""
    run_one(world, models, tmp_path, "output.clean_images=false")
    clean = read_stream(tmp_path, "clean")
    assert {tuple(members) for members in clean.values()} == {("cls", "logits.npy")} and len(clean) == 12
    for key, members in clean.items():
        assert members["cls"] == streams["clean"][key]["cls"]


@pytest.mark.parametrize(("form", "quality", "lossless"), [("png", 95, True), ("webp", 100, True), ("webp", 60, False)])
def test_storage_formats(world, models, tmp_path: Path, form: str, quality: int, lossless: bool) -> None:  # type: ignore[no-untyped-def]
    """Lossless formats store x'' = Q(x_K) to the pixel; in any format the verdict is that on the stored image."""
    rows = run_one(world, models, tmp_path, f"output.image.format={form}", f"output.image.quality={quality}")
    dad = read_stream(tmp_path, "dad")
    assert set(dad) == {row["key"] for row in rows if row["status"] == "verified"} and {
        next(iter(m)) for m in dad.values()
    } == {form}
    for members in dad.values():
        image = pixels(members[form])
        with torch.no_grad():
            assert models.teacher(image[None]).argmax() == int(members["cls"])
            if lossless:
                codes = torch.from_numpy(np.load(io.BytesIO(members["codes.npy"])).astype(np.int64))
                assert (models.discretizer_model.decode(codes[None])[0] - image).abs().max() <= 0.51 / 255


def test_report_sees_every_row_once(world, models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Progress counts what is done, batch by batch: 5, 5 and 2 of 12."""
    from manifests import RunDir

    recipe, classes = world.load(), load_classes(world.clip / "prompts.yaml")
    reported: list[list[str]] = []
    piece = find_source(str(world.tars), classes, 12).pieces[0]
    rows = run_shard(
        0,
        piece,
        recipe,
        classes,
        models,
        RunDir(tmp_path),
        "run",
        lambda new: reported.append([row["key"] for row in new]),
    )
    assert [len(keys) for keys in reported] == [5, 5, 2]
    assert [key for keys in reported for key in keys] == [row["key"] for row in rows]


def test_a_shard_of_bad_samples_only(world, models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Nothing usable: two empty tars, rows with reasons, no crash."""
    from manifests import RunDir

    for n in range(3):
        (tmp_path / "images" / "n09").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "n09" / f"{n}.jpg").write_bytes(b"no image")
    recipe, classes = world.load(), load_classes(world.clip / "prompts.yaml")
    piece = find_source(str(tmp_path / "images"), classes, 12).pieces[0]
    rows = run_shard(0, piece, recipe, classes, models, RunDir(tmp_path / "run"), "run", lambda new: None)
    assert [row["status"] for row in rows] == ["error"] * 3 and all("unreadable" in row["reason"] for row in rows)
    assert read_stream(tmp_path / "run", "clean") == read_stream(tmp_path / "run", "dad") == {}
