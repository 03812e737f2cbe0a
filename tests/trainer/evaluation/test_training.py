"""``validation`` and ``images`` of a training recipe take every layout and place that stage 1 takes, with the same
result.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from manifests import Store, UserError
from shards import iterate_tar
from trainer.__main__ import main
from trainer.checkpoint import BEST, METRICS
from trainer.evaluation.kept import evaluate_run
from trainer.evaluation.sets import image_set
from trainer.loop import train
from trainer.recipe import load

from ...hub import LAYOUTS, Labelled, write_layout
from ..conftest import NAMES, SIDE, write_run


@pytest.fixture(scope="module")
def labels_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("labels") / "run", clean_images=False)


def stored(run: Path) -> list[Labelled]:
    """The clean images of a run, with their labels."""
    samples = []
    for path in sorted((run / "clean").glob("*.tar")):
        with open(path, "rb") as file:
            for _, sample in iterate_tar(file, str(path)):
                samples.append((sample.key, sample.members["png"], int(sample.members["cls"])))
    return samples


def write_images(where: str, kind: str, samples: list[Labelled]) -> str:
    """Images to join by key: in class folders, the part of a key before its first dash is the folder."""
    if kind != "folders":
        return write_layout(where, kind, samples, NAMES)
    for key, data, _ in samples:
        Store(where).write(f"{key.replace('-', '/', 1)}.png", data)
    return where


def student(shards: Path, out: Path, *overrides: str) -> tuple[dict[str, bytes], str]:
    """(weights, validation's top-1) after an epoch."""
    small = ["student=test_resnet", "epochs=1", "batch=8", "precision=fp32", "threads=1", "device=cpu"]
    train(load("demo", [f"shards={shards}", *small, *overrides]), str(out))
    header, row = (line.split(",") for line in (out / METRICS).read_text().splitlines())
    weights = {name: value.numpy().tobytes() for name, value in load_file(out / BEST).items()}
    return weights, dict(zip(header, row, strict=True))["val_top1"]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_training_is_the_same(
    tiny_run: Path, labels_only: Path, tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    """To the bit, and to the last image of the validation set: own images and validation in three layouts, and
    images in the shards.
    """
    if place == "s3":
        request.getfixturevalue("object_store")
    root = {"local": str(tmp_path), "s3": f"s3://bucket/{tmp_path.name}"}[place]
    samples = stored(tiny_run)
    results = [student(tiny_run, tmp_path / "plain", f"validation={tiny_run / 'clean'}")]
    for kind in LAYOUTS:
        images = write_images(f"{root}/images-{kind}", kind, samples)
        validation = write_layout(f"{root}/sets/{kind}", kind, samples, NAMES)
        settings = [f"images={images}", f"validation={validation}", "workers=1"]
        results.append(student(labels_only, tmp_path / kind, *settings))
    assert results[0] == results[1] == results[2] == results[3] and float(results[0][1]) > 0
    from trainer.checkpoint import StudentDir

    scores = evaluate_run(StudentDir(tmp_path / "folders"), f"{root}/sets", "cpu")
    assert {f"{score.top1:.6g}" for score in scores.values()} == {results[0][1]} and set(scores) == set(LAYOUTS)
    kept = (tmp_path / "folders" / "eval.json").read_bytes()
    assert evaluate_run(StudentDir(tmp_path / "folders"), f"{root}/sets", "cpu") == scores
    assert (tmp_path / "folders" / "eval.json").read_bytes() == kept
    report = tmp_path / "reports"
    told = CliRunner().invoke(main, ["eval", str(tmp_path / "folders"), "--data", f"{root}/sets", "--out", str(report)])
    assert told.exit_code == 0, told.output
    assert all(kind in (report / "report.md").read_text() for kind in LAYOUTS)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_unusable_validation_set_is_refused_before_the_first_step(tiny_run: Path, tmp_path: Path, kind: str) -> None:
    """No step is trained, and nobody gets the demo's advice."""
    cut = [(key, data[:-40] if n == 3 else data, label) for n, (key, data, label) in enumerate(stored(tiny_run)[:20])]
    where = write_layout(tmp_path / kind, kind, cut, NAMES)
    with pytest.raises(
        UserError, match=rf"^validation: {where}: 1 of 20 samples cannot be used.*; set another"
    ) as told:
        student(tiny_run, tmp_path / "student", f"validation={where}")
    assert "renditions" not in str(told.value) and not (tmp_path / "student" / METRICS).exists()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_changed_set_is_measured_again(tmp_path: Path, tiny_run: Path, kind: str) -> None:
    """Other bytes under the same name, or other folders for the classes."""
    samples = stored(tiny_run)[:20]
    where = write_layout(tmp_path / kind, kind, samples, NAMES)
    before = image_set(where, NAMES).stamps()
    assert image_set(where, NAMES).stamps() == before
    write_layout(where, kind, [(key, data + b"\0" * 512, label) for key, data, label in samples], NAMES)
    assert image_set(where, NAMES).stamps() != before


def test_url_s_versions_change_with_the_bytes(tiny_run: Path, object_store: object) -> None:
    for url in ("s3://bucket/versions", "memory://versions"):
        for kind in LAYOUTS:
            samples = stored(tiny_run)[:6]
            where = write_layout(f"{url}/{kind}", kind, samples, NAMES)
            before = image_set(where, NAMES).stamps()
            write_layout(where, kind, [(key, data[:-1] + b"\0", label) for key, data, label in samples], NAMES)
            assert image_set(where, NAMES).stamps() != before
            assert len(list(image_set(where, NAMES).pictures(SIDE))) == 6
