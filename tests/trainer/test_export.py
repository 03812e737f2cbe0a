"""What is exported is the student: timm and ONNX compute its logits, and the card holds its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml

from manifests import UserError
from trainer.checkpoint import StudentDir
from trainer.evaluation.kept import evaluate_run
from trainer.export import CARD, CONFIG, ONNX, WEIGHTS, export, read_scores
from trainer.loop import train
from trainer.recipe import load
from trainer.student import create_student

from .conftest import CLASSES, SIDE, write_image_set

STUDENTS = ["test_resnet", "test_vit"]


SETTINGS = ["student=test_resnet", "epochs=1", "batch=8", "precision=fp32", "threads=1", "validation=null"]


def trained(name: str, run: Path, out: Path, *more: str) -> StudentDir:
    return train(load("demo", [*SETTINGS, f"shards={run}", f"student={name}", *more]), str(out))


@pytest.fixture(scope="module", params=STUDENTS)
def student(request: pytest.FixtureRequest, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> StudentDir:
    return trained(request.param, tiny_run, tmp_path_factory.mktemp("students") / request.param)


def test_timm_loads_the_directory_and_computes_the_same(student: StudentDir, tmp_path: Path) -> None:
    """With the preprocessing that the directory itself names."""
    assert set(export(student, str(tmp_path / "out"))) == {CONFIG, WEIGHTS, CARD}
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    settings = timm.data.resolve_data_config(model=model)
    assert (
        tuple(settings["input_size"]) == (3, SIDE, SIDE)
        and settings["crop_pct"] == 1.0
        and model.num_classes == CLASSES
    )
    images = torch.rand(3, 3, SIDE, SIDE)
    mean, std = (torch.tensor(settings[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        difference = model((images - mean) / std) - student.load_student()(images)
    assert difference.abs().max() < 1e-4


def test_onnx_computes_the_same_for_any_batch(student: StudentDir, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install '.[onnx]'")
    pytest.importorskip("onnxscript", reason="needs pip install '.[onnx]'")
    export(student, str(tmp_path / "out"), onnx=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / ONNX), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.rand(batch, 3, SIDE, SIDE)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(logits) - student.load_student()(images)).abs().max() < 1e-4


def test_card_holds_the_numbers_once_they_are_measured(tiny_run: Path, tmp_path: Path) -> None:
    run = trained("test_resnet", tiny_run, tmp_path / "student", f"validation={write_image_set(tmp_path / 'val')}")
    export(run, str(tmp_path / "out"))
    assert "Not evaluated yet" in (tmp_path / "out" / CARD).read_text()
    write_image_set(tmp_path / "sets" / "sketch", images=20)
    score = evaluate_run(run, tmp_path / "sets", "cpu")["sketch"]
    export(run, str(tmp_path / "out"))
    card = (tmp_path / "out" / CARD).read_text()
    assert f"| sketch | {score.top1:.1f} ± {score.error:.1f} | 20 |" in card
    assert str(tmp_path) not in card  # no place on this machine is published
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "timm" and front["pipeline_tag"] == "image-classification"


def test_numbers_of_other_weights_are_not_published(tiny_run: Path, tmp_path: Path) -> None:
    run, other = (trained("test_resnet", tiny_run, tmp_path / name) for name in ("student", "other"))
    evaluate_run(run, write_image_set(tmp_path / "sets" / "sketch").parent, "cpu")
    kept = run.store.read("eval.json")
    other.store.write("eval.json", kept)
    assert read_scores(other) == read_scores(run) != {}  # same seed, same weights
    other.save_best(create_student("test_resnet", CLASSES, SIDE))
    assert read_scores(other) == {}


def test_exports_repeat_to_the_byte(tiny_run: Path, tmp_path: Path) -> None:
    run = trained("test_resnet", tiny_run, tmp_path / "student")
    for out in ("a", "b"):
        export(run, str(tmp_path / out))
    for name in (CONFIG, WEIGHTS, CARD):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["label_names"] == run.info().classes


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CARD])
def test_what_others_have_there_is_not_overwritten(student: StudentDir, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        UserError, match=rf"^{tmp_path / name}: was not exported from this student .*; choose an empty folder"
    ):
        export(student, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "{}"


def test_an_export_is_replaced_by_the_same_student_alone(student: StudentDir, tiny_run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        export(student, str(tmp_path / "out"))
    (tmp_path / "out" / WEIGHTS).unlink()  # as if it had been killed in between
    export(student, str(tmp_path / "out"))
    other = trained("test_resnet", tiny_run, tmp_path / "other", "seed=1")
    with pytest.raises(UserError, match=r"config\.json: was not exported from this student"):
        export(other, str(tmp_path / "out"))


def test_a_run_without_a_finished_epoch_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no student here"):
        export(StudentDir(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
