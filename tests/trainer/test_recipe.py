"""Recipes of stage 2: choosing a method by name, and what its settings become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from manifests import UserError
from manifests.recipe import identity
from trainer.__main__ import main
from trainer.methods import METHODS, NAMES, Method
from trainer.methods.at import AT
from trainer.methods.dad import DAD
from trainer.methods.kd import KD
from trainer.methods.plain import Plain
from trainer.recipe import SHARED, load, with_shared_settings


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], str]:
    """A recipe file with this text."""

    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


MINE = "student: resnet50\nmethod: {name: dad, temperature: 2, weight: 0.3, smoothing: 0.1}\n"


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        ([], DAD(temperature=2, weight=0.3, smoothing=0.1)),
        (["method.name=dad"], DAD(temperature=2, weight=0.3, smoothing=0.1)),
        (["method.name=kd"], KD(temperature=2, weight=0.3, smoothing=0.1)),
        (["method.name=plain"], Plain(smoothing=0.1)),
        (["method.name=at"], AT(smoothing=0.1)),
        (["method.steps=3", "method.name=at", "method.smoothing=0"], AT(steps=3)),
        (["method.name=at", "method.name=kd", "method.weight=1"], KD(temperature=2, weight=1, smoothing=0.1)),
        (["method={name: kd, weight: 0.9}"], KD(weight=0.9)),
    ],
)
def test_another_method_keeps_the_shared_settings_alone(
    written: Callable[[str], str], overrides: list[str], method: Method
) -> None:
    """Temperature, weight and smoothing mean the same everywhere; steps and radii of one method are not another's."""
    assert load(written(MINE), overrides).method == method


def test_settings_of_one_method_are_not_carried_to_another(written: Callable[[str], str]) -> None:
    """eps, alpha and steps of AdvProp are no default of DAT, whose ball is another."""
    path = written("method: {name: advprop, steps: 3, eps: 0.5, alpha: 0.2, smoothing: 0.2}\n")
    method = load(path, ["method.name=dat"]).method
    assert (method.name, method.smoothing, method.eps) == ("dat", 0.2, 0.1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", METHODS, ids=NAMES)
def test_every_method_is_chosen_by_its_name(kind: type[Method]) -> None:
    method = load("demo", [f"method.name={kind().name}"]).method
    assert type(method) is kind and method == with_shared_settings(kind().name, load("demo").method)
    assert all(getattr(method, name) == getattr(DAD(), name) for name in SHARED if hasattr(method, name))


def test_the_identity_names_the_method_and_its_settings() -> None:
    """Two students of other methods or settings are never seeds of one; where models lie does not count."""
    kept = identity(load("demo", ["method.name=at", "models.teacher.model=here"]))
    of_method = {name: value for name, value in kept.items() if name.startswith("method.")}
    assert of_method == {
        "method.name": "at",
        "method.steps": 10,
        "method.eps": 4 / 255,
        "method.alpha": 1 / 255,
        "method.smoothing": 0.0,
    }
    assert not [name for name in kept if name.startswith("models")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.name=dads", r"^--set: method\.name: 'dads' is not known; did you mean 'dad'"),
        ("method.name=advpropp", r"^--set: method\.name: 'advpropp' is not known; did you mean 'advprop'"),
        ("method.name=3", r"^--set: method\.name: 3 is not known"),
        ("method.temprature=2", r"^--set: unknown field 'method\.temprature'; did you mean 'temperature'\?"),
        ("method.steps=2", r"^--set: unknown field 'method\.steps'; known: name, smoothing, temperature, weight"),
        ("method.temperature=0", r"^--set method\.temperature: .*greater than 0 \(got 0\)"),
        ("method.temperature=hot", r"^--set method\.temperature: .*valid number.*\(got 'hot'\)"),
        ("method.name=[", r"^--set method\.name=\[: '\[' is not a YAML value"),
        ("method.smoothing=1", r"^--set method\.smoothing: .*less than 1 \(got 1\)"),
        ("method=kd", r"^--set: method: write it as method: \{name: kd\}, or --set method\.name=kd$"),
        ("method=null", r"^--set: method: write it as "),
        ("models.techer.model=x", r"^--set models\.techer: .*'teacher' or 'discretizer' \(got 'techer'\)"),
        ("models.teacher=5", r"^--set models\.teacher: .*\(got 5\)"),
        ("loss.temperature=2", r"^--set: loss: is now `method`, for example method: \{name: dad, temperature: 4"),
    ],
)
def test_refusals_name_the_field(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load("demo", [override])
    assert "\n" not in str(caught.value)


def test_an_old_recipe_is_told_the_new_field(written: Callable[[str], str]) -> None:
    path = written("loss: {objective: dad, temperature: 4.0, weight: 0.5}\n")
    with pytest.raises(UserError, match=r"^.*mine\.yaml: loss: is now `method`, for example method: \{name: dad"):
        load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "kdd"], "error: --set: method.name: 'kdd' is not known; did you mean 'kd'"),
        (
            ["--method", "at", "--set", "method.stps=2"],
            "error: --set: unknown field 'method.stps'; did you mean 'steps'",
        ),
        (["--method", "at", "--set", "method.weight=2"], "error: --set: unknown field 'method.weight'; "),
    ],
)
def test_the_command_line_refuses_in_one_line(tiny_run: Path, arguments: list[str], message: str) -> None:
    base = ["train", "--recipe", "demo", "--shards", str(tiny_run), "--student", "test_resnet"]
    told = CliRunner().invoke(main, [*base, *arguments], prog_name="python -m trainer")
    assert told.exit_code == 2 and told.stderr.startswith(message) and len(told.stderr.splitlines()) == 1, told.stderr


def test_the_command_line_trains_by_a_methods_name(tiny_run: Path, tmp_path: Path) -> None:
    """`--method` alone: with that method's own settings, in a directory of its name, and `methods` lists it."""
    small = ["epochs=1", "batch=24", "validation=null", "precision=fp32", "threads=1", "device=cpu", "method.steps=1"]
    base = ["train", "--recipe", "demo", "--shards", str(tiny_run), "--student", "test_resnet", "--method", "at"]
    out = tmp_path / "student"
    options = [*base, "--out", str(out), *(part for each in small for part in ("--set", each))]
    told = CliRunner().invoke(main, options, prog_name="python -m trainer")
    assert told.exit_code == 0, told.output
    assert "test_resnet at, 1 epochs of 2 steps" in told.output and (out / "best.safetensors").exists()
    listed = CliRunner().invoke(main, ["methods"], prog_name="python -m trainer").output
    assert all(f"\n{name} " in listed for name in NAMES)
