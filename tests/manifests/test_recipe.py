"""Recipes: what is refused and how, what is part of a run's identity."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from manifests import Execution, Location, UserError, load_recipe, recipe_dataclass
from manifests.recipe import (
    apply_overrides,
    as_tree,
    fingerprint,
    first_difference,
    flatten,
    identity,
    make_recipe,
    nearest,
)


@recipe_dataclass
class Engine:
    """A nested recipe."""

    power: Annotated[float, Field(ge=0, le=10)] = 1.0
    kind: Literal["steam", "diesel"] = "steam"
    file: Annotated[str | None, Location] = None
    gears: tuple[int, ...] = (1, 2)


@recipe_dataclass
class Car:
    """A recipe."""

    wheels: Annotated[int, Field(ge=1)]
    engine: Engine = Engine()
    spare: Engine | None = None
    data: Annotated[str, Location] = "here"
    threads: Annotated[int | None, Field(ge=1), Execution] = None
    loud: bool = False


@recipe_dataclass
class Walk:
    """A member of a union."""

    name: Literal["walk"] = "walk"
    shoes: str = "old"
    map: Annotated[str | None, Location] = None


@recipe_dataclass
class Ride:
    """Another, with fields of its own and one that both have."""

    name: Literal["ride"] = "ride"
    horses: Annotated[int, Field(ge=1)] = 1
    shoes: str = "iron"


@recipe_dataclass
class Journey:
    """A recipe with a union, whose member is told by its tag."""

    way: Annotated[Walk | Ride, Field(discriminator="name")] = Walk()
    stores: Annotated[dict[str, object], Location] = Field(default_factory=dict)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, wheels in (("city", 4), ("truck", 8)):
        (tmp_path / f"{name}.yaml").write_text(f"wheels: {wheels}\nengine: {{power: 2.5}}\n")
    return tmp_path


def test_file_defaults_and_overrides(folder: Path) -> None:
    """A recipe loads by name or path; fields that it leaves out have defaults; overrides win and are YAML."""
    assert load_recipe(Car, "city", folder) == Car(wheels=4, engine=Engine(power=2.5))
    overrides = [
        "engine.power=3",
        "engine.gears=[1, 2, 3]",
        "loud=true",
        "engine.file=a=b.txt",
        "threads=null",
        "wheels=6",
    ]
    made = load_recipe(Car, str(folder / "truck.yaml"), folder, overrides)
    assert made == Car(wheels=6, engine=Engine(power=3.0, gears=(1, 2, 3), file="a=b.txt"), loud=True)
    assert load_recipe(Car, "city", folder, ["spare.power=4"]).spare == Engine(power=4.0)


def test_a_recipe_is_frozen_and_keyword_only(folder: Path) -> None:
    made = load_recipe(Car, "city", folder)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.wheels = 5  # type: ignore[misc]
    with pytest.raises(Exception, match=r"positional|argument"):
        Car(4)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("whels=3", r"unknown field 'whels'; did you mean 'wheels'\?"),
        ("engine.powr=3", r"unknown field 'engine\.powr'; did you mean 'power'\?"),
        ("spare.gers=[1]", r"unknown field 'spare\.gers'; did you mean 'gears'\?"),
        ("qqqqqq=3", r"unknown field 'qqqqqq'; known: data, engine, loud, spare, threads, wheels"),
        ("wheels=many", r"wheels: .*valid integer.*\(got 'many'\)"),
        ("wheels=1.5", r"wheels: .*integer.*\(got 1\.5\)"),
        ("wheels=[4]", r"wheels: .*integer"),
        ("wheels=null", r"wheels: .*integer.*\(got None\)"),
        ("wheels=0", r"wheels: .*greater than or equal to 1 \(got 0\)"),
        ("threads=0", r"threads: .*greater than or equal to 1"),
        ("engine.power=11", r"engine\.power: .*less than or equal to 10 \(got 11\)"),
        ("engine.power=.nan", r"engine\.power: .*\(got nan\)"),
        ("engine.power=.inf", r"engine\.power: .*\(got inf\)"),
        ("engine.kind=petrol", r"engine\.kind: .*'steam' or 'diesel' \(got 'petrol'\)"),
        ("engine.gears=[1, x]", r"engine\.gears\.1: .*integer.*\(got 'x'\)"),
        ("engine=fast", r"engine: .*\(got 'fast'\)"),
        ("engine.power.more=1", r"--set engine\.power\.more=1: power is a value"),
        ("engine.power", r"--set engine\.power: write it as field=value"),
        ("=3", r"--set =3: write it as field=value"),
        ("engin.power=3", r"unknown field 'engin'; did you mean 'engine'\?"),
        ("wheels=[1", r"--set wheels=\[1: '\[1' is not a YAML value"),
        ("engine.gears=!!python/object/apply:os.mkdir [pwned]", r"is not a YAML value"),
        ("wheels=2020-01-01", r"wheels: .*integer"),
        ("", r"write it as field=value"),
    ],
)
def test_refusals(folder: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt field (with the nearest name), a wrong type or range, a broken override: one line naming the field."""
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(Car, "city", folder, [override])
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--set")
    assert not (folder / "pwned").exists()


def test_the_file_is_named(folder: Path) -> None:
    """A fault of the file names its path; so does a required field that it lacks."""
    path = folder / "city.yaml"
    for content, message in (
        ("engine: {powr: 1}", r"unknown field 'engine\.powr'"), ("engine: {power: 1}", r"wheels: .*required"),
        ("wheels: x", r"wheels: "),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            load_recipe(Car, "city", folder)
        assert str(caught.value).startswith(f"{path}: ")


def test_unknown_recipe_names(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"recipe 'trucks': no such file, and no recipe of that name; did you mean 'truck'\?"
    ):
        load_recipe(Car, "trucks", folder)
    with pytest.raises(UserError, match=r"recipe 'zzz': .*; known: city, truck"):
        load_recipe(Car, "zzz", folder)
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(Car, str(folder), folder)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/name:os.system",
        "!!python/object/new:os.mkdir [pwned]",
    ],
)
def test_python_tags_are_refused_and_not_run(folder: Path, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML that would make Python objects is refused; nothing runs."""
    monkeypatch.chdir(folder)
    (folder / "evil.yaml").write_text(f"wheels: {tag}\n")
    with pytest.raises(UserError, match=r"evil\.yaml: not a plain YAML file") as caught:
        load_recipe(Car, str(folder / "evil.yaml"), folder)
    assert not (folder / "pwned").exists() and "\n" not in str(caught.value)
    yaml.unsafe_load((folder / "evil.yaml").read_text().replace("touch pwned", "true").replace("[pwned]", "[other]"))


def test_overrides_do_not_touch_the_original() -> None:
    tree = {"wheels": 4, "engine": {"power": 1.0}}
    assert apply_overrides(tree, ["engine.power=2"]) == {"wheels": 4, "engine": {"power": 2}}
    assert tree == {"wheels": 4, "engine": {"power": 1.0}}


def test_identity_leaves_out_where_and_how() -> None:
    """Only fields that decide what comes out are part of the identity: no `Location`, no `Execution`, at any depth."""
    car = Car(wheels=4, engine=Engine(file="x"), data="there", threads=3)
    kept = {"wheels", "engine.power", "engine.kind", "engine.gears", "loud", "spare"}
    assert set(identity(car)) == kept
    assert identity(car) == identity(Car(wheels=4, engine=Engine(file="y"), data="elsewhere", threads=None))
    assert identity(car) != identity(Car(wheels=5, engine=Engine(file="x"), data="there", threads=3))
    spare = Car(wheels=4, spare=Engine(file="x"))
    assert "spare.power" in identity(spare) and "spare.file" not in identity(spare)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ("b", 2, 3)),
        ({"a": 1, "gone": 2}, {"a": 1}, ("gone", 2, None)),
        ({"a": 1}, {"new": 2, "a": 1}, ("new", None, 2)),
        ({"gone": 1, "a": 1}, {"new": 1, "a": 2}, ("gone", 1, None)),
    ],
)
def test_first_difference_is_looked_for_on_both_sides(
    old: dict[str, int], new: dict[str, int], found: tuple[str, int | None, int | None] | None
) -> None:
    assert first_difference(old, new) == found


def test_identity_of_the_real_recipe() -> None:
    """Stage 1: paths, device, threads, max_errors and the launcher are free; everything else counts."""
    from pipeline.method.discretizer import Discretizer
    from pipeline.method.teacher import Teacher
    from pipeline.recipe import Launch, Recipe, Source

    launch = Launch(slurm={"partition": "gpu"})
    recipe = Recipe(
        source=Source(data="d", classes="c"), teacher=Teacher(model="m"), discretizer=Discretizer(), launch=launch
    )
    free = {
        "source.data", "source.classes", "teacher.model", "teacher.weights", "teacher.templates", "discretizer.weights",
        "max_errors", "device", "threads", "codec_threads", "launch.launcher", "launch.workers", "launch.retries",
        "launch.slurm.partition",
    }  # fmt: skip
    assert set(flatten(as_tree(recipe))) - set(identity(recipe)) == free


def test_tree_roundtrip() -> None:
    """A recipe as a tree is plain JSON and YAML, and loads as the same recipe."""
    car = Car(wheels=4, engine=Engine(gears=(3, 2), kind="diesel"), spare=Engine(power=0.1))
    assert make_recipe(Car, as_tree(car), "tree") == car
    assert make_recipe(Car, yaml.safe_load(yaml.safe_dump(as_tree(car))), "tree") == car


def test_fingerprint() -> None:
    """The same value gives the same 16 hex digits, whatever the order of keys; another value another."""
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) and len(fingerprint({})) == 16
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_nearest() -> None:
    assert nearest("alpa", ["alpha", "eps"]) == "; did you mean 'alpha'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert nearest("zzz", [f"name{i}" for i in range(100)]) == ""


def test_the_recipes_that_come_with_the_project_load() -> None:
    """Every file in pipeline/recipes is a recipe; so is every one of trainer/recipes."""
    from pipeline.recipe import FOLDER, load

    names = [path.stem for path in FOLDER.glob("*.yaml")]
    assert "demo" in names
    for name in names:
        load(name)


@pytest.mark.parametrize(
    ("tree", "made"),
    [
        ({}, Journey()),
        ({"way": {"name": "walk", "shoes": "new"}}, Journey(way=Walk(shoes="new"))),
        ({"way": {"name": "ride", "horses": 2}}, Journey(way=Ride(horses=2))),
        ({"way": {"name": "ride"}}, Journey(way=Ride())),
    ],
)
def test_the_tag_chooses_the_member_of_a_union(tree: dict[str, object], made: Journey) -> None:
    """Its defaults are its own, and it comes back from its tree."""
    assert make_recipe(Journey, tree, "here") == made
    assert make_recipe(Journey, as_tree(made), "here") == made


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"name": "wlak"}, r"way\.name: 'wlak' is not known; did you mean 'walk'\?"),
        ({"name": "fly"}, r"way\.name: 'fly' is not known; known: ride, walk"),
        ({"name": None}, r"way: has no name; give one of walk, ride"),
        ({"shoes": "new"}, r"way: has no name; give one of walk, ride"),
        ({}, r"way: has no name; give one of walk, ride"),
        ({"name": ["walk"]}, r"way\.name: \['walk'\] is not known"),
        ({"name": "ride", "map": "x"}, r"unknown field 'way\.map'; known: horses, name, shoes"),
        ({"name": "walk", "horses": 1}, r"unknown field 'way\.horses'; "),
        ({"name": "ride", "hroses": 1}, r"unknown field 'way\.hroses'; did you mean 'horses'"),
        ({"name": "ride", "horses": 0}, r"way\.horses: .*greater than or equal to 1 \(got 0\)"),
        ("walk", r"way: write it as way: \{name: walk\}, or --set way\.name=walk"),
        (None, r"way: "),
    ],
)
def test_what_does_not_fit_a_union_is_refused(way: object, message: str) -> None:
    """In one line; the fields that are known are those of the member that the tag names."""
    with pytest.raises(UserError, match=message) as caught:
        make_recipe(Journey, {"way": way}, "here")
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)
    if isinstance(way, dict) and (given := [f"way.{name}={value}" for name, value in way.items()]):
        with pytest.raises(UserError) as caught:
            make_recipe(Journey, {"way": way}, "here", given)
        assert str(caught.value).startswith("--set")


def test_the_identity_of_a_union_is_its_members() -> None:
    """`way.name` tells members apart; locations are free inside a member, and so is a whole mapping."""
    assert identity(Journey(way=Walk(map="a"), stores={"x": {"y": 1}})) == {"way.name": "walk", "way.shoes": "old"}
    ride = {"way.name": "ride", "way.horses": 1, "way.shoes": "iron"}
    assert identity(Journey(way=Ride())) == ride
    assert first_difference(identity(Journey()), ride) == ("way.name", "walk", "ride")
