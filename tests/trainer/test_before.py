"""Students and tables of earlier versions, with `loss.objective` for `method.name`, are read as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from manifests import UserError
from manifests.recipe import identity
from trainer.checkpoint import STUDENT_INFO, StudentDir
from trainer.export import CARD, export
from trainer.loop import Hooks, train
from trainer.tables.compare import compare, result_of
from trainer.tables.results import REFERENCE, from_json, groups, to_json

from .conftest import write_image_set
from .test_loop import assert_equal_runs, interrupted, recipe

OLD = Path(__file__).parent / "before" / STUDENT_INFO  # of `recipe(tiny_run)`, as the version before wrote it


@pytest.fixture
def old_student(tiny_run: Path, tmp_path: Path) -> StudentDir:
    """A student that was stopped after its first epoch, with the student.json of the version before."""
    with pytest.raises(InterruptedError):
        train(recipe(tiny_run), str(tmp_path / "runs" / "old"), Hooks(after_epoch=interrupted))
    shutil.copy(OLD, tmp_path / "runs" / "old" / STUDENT_INFO)
    return StudentDir(tmp_path / "runs" / "old")


def test_it_is_the_old_form() -> None:
    kept = json.loads(OLD.read_text())
    assert kept["recipe"]["loss"]["objective"] == kept["identity"]["loss.objective"] == "dad"
    assert "method" not in kept["recipe"] and not [name for name in kept["identity"] if name.startswith("method")]


def test_its_identity_is_todays(tiny_run: Path, old_student: StudentDir) -> None:
    info = old_student.info()
    assert info.identity == identity(recipe(tiny_run))
    assert info.recipe["method"] == {"name": "dad", "temperature": 4.0, "weight": 0.5, "smoothing": 0.0}
    assert "loss" not in info.recipe


def test_training_goes_on_to_the_same_weights(tiny_run: Path, tmp_path: Path, old_student: StudentDir) -> None:
    """The second epoch follows in its directory; another temperature is refused by today's name of the field."""
    with pytest.raises(UserError, match=r"method\.temperature was 4\.0, now 2\.0"):
        train(recipe(tiny_run, "method.temperature=2"), str(old_student))
    with pytest.raises(UserError, match=r"method\.name was 'dad', now 'kd'"):
        train(recipe(tiny_run, "method.name=kd"), str(old_student))
    train(recipe(tiny_run), str(old_student))
    train(recipe(tiny_run), str(tmp_path / "whole"))
    assert_equal_runs(tmp_path / "whole", tmp_path / "runs" / "old")


def test_tables_and_card_take_it(
    tiny_run: Path, tmp_path: Path, old_student: StudentDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new student of the same recipe and another seed stands in its row: two seeds of one thing."""
    write_image_set(tmp_path / "data" / "val")
    train(recipe(tiny_run, "seed=1"), str(tmp_path / "runs" / "new"))
    compare([str(tmp_path / "runs")], str(tmp_path / "data"), str(tmp_path / "reports"))
    assert "| test_resnet dad | 2 |" in (tmp_path / "reports" / "report.md").read_text()
    export(old_student, str(tmp_path / "out"))
    card = (tmp_path / "out" / CARD).read_text()
    assert "# test_resnet, Discrete Adversarial Distillation\n" in card and "method.temperature: 4.0\n" in card
    old, new = (result_of(StudentDir(tmp_path / "runs" / name), str(tmp_path / "data")) for name in ("old", "new"))
    assert old.recipe == new.recipe and old.method == "dad"


@pytest.mark.parametrize("objective", ["plain", "kd"])
def test_settings_that_a_method_does_not_have_are_left_out(tmp_path: Path, objective: str) -> None:
    """The old form gave every student a temperature, plain ones too."""
    kept = json.loads(OLD.read_text())
    kept["recipe"]["loss"]["objective"] = kept["identity"]["loss.objective"] = objective
    (tmp_path / STUDENT_INFO).write_text(json.dumps(kept))
    info = StudentDir(tmp_path).info()
    expected = {"name": objective, "smoothing": 0.0} | (
        {"temperature": 4.0, "weight": 0.5} if objective == "kd" else {}
    )
    assert info.recipe["method"] == expected
    of_method = {name: value for name, value in info.identity.items() if name.startswith(("method.", "loss."))}
    assert of_method == {f"method.{name}": value for name, value in expected.items()}


@pytest.mark.parametrize("damage", ["objective", "loss"])
def test_a_damaged_old_form_is_one_line(tmp_path: Path, damage: str) -> None:
    kept = json.loads(OLD.read_text())
    if damage == "objective":
        del kept["recipe"]["loss"]["objective"]
    else:
        kept["recipe"]["loss"]["objective"] = "of nowhere"
    (tmp_path / STUDENT_INFO).write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"student\.json: damaged \(.*\); restore it, or train again") as caught:
        StudentDir(tmp_path).info()
    assert "\n" not in str(caught.value)


def test_the_committed_table_of_the_demo_is_read() -> None:
    """Its rows name an objective, those of today a method; both are one thing, and stand in the registry's order."""
    text = REFERENCE.read_text()
    known = from_json(text, reference=True)
    assert "objective" in json.loads(text)[0] and len(known) == len(json.loads(text))
    methods = [label.split()[1] for label in groups([row for row in known if row.student == "resnet18"])]
    assert methods == [name for name in ("plain", "kd", "dad") if name in methods]
    again = from_json(to_json(known), reference=True)
    assert again == known and "method" in json.loads(to_json(known))[0]
