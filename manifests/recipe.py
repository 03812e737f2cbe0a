"""Recipes: one YAML file becomes one frozen dataclass tree; a misspelt field is refused with the nearest name.

A recipe class is a `recipe_dataclass`. pydantic checks types and bounds; this module puts its findings into one line.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import pydantic.dataclasses
import yaml
from typing_extensions import dataclass_transform

from .errors import UserError, one_line
from .locations import check_location
from .plain_yaml import load_plain

R = TypeVar("R")
Positive = Annotated[int, pydantic.Field(ge=1)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
TAG = "name"  # the field that tells the members of a union apart
PROJECT = Path(__file__).resolve().parents[1]


class Location:
    """Marks a field that names a place. Its content has a fingerprint, so the path itself may change between runs."""


class Locations:
    """Marks a `Location` that names several at once, with braces and `::`; whoever expands it checks each of them."""


class Execution:
    """Marks a field that says how to run (device, threads, limits) and leaves the result as it is."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def recipe_dataclass(cls: type[R]) -> type[R]:
    """Class decorator: a frozen, keyword-only pydantic dataclass that refuses unknown fields and keeps docstrings."""
    config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)  # type: ignore[return-value]


def load_recipe(
    cls: type[R],
    name: str,
    folder: Path,
    overrides: Sequence[str] = (),
    adapt: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> R:
    """Load a recipe by file or by name (``folder/NAME.yaml``) and apply ``field.sub=value`` overrides.

    adapt: changes the file's mapping before the overrides are applied.
    Raises UserError for a missing file, broken YAML, an unknown field (with the nearest name) or an ill-typed value.
    """
    path = _find(name, folder)
    try:
        tree = load_plain(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a plain YAML file: {one_line(error, 300)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of fields, this is {type(tree).__name__}")
    return make_recipe(cls, apply_overrides(adapt(tree), overrides), str(path), overrides)


def find_file(name: str, field: str) -> Path:
    """Find a recipe's path: first as given, then below the project's folder, so that its recipes work from anywhere.

    Raises UserError naming the recipe field when neither exists.
    """
    for path in (Path(name).expanduser(), PROJECT / name):
        if path.exists():
            return path
    raise UserError(
        f"{field}: {name}: no such file or folder; correct the path in the recipe or with --set {field}=PATH"
    )


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Copy a recipe's mapping and apply ``field.sub=value`` overrides; values are YAML. Raises UserError."""
    changed: dict[str, Any] = copy.deepcopy(dict(tree))
    for override in overrides:
        _set(changed, override)
    return changed


def make_recipe(cls: type[R], tree: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> R:
    """Validate a mapping as `cls`. Errors name `where` (a file), or `--set` for fields that an override set."""
    _refuse_unknown(cls, tree, where, "", overrides)
    try:
        recipe = pydantic.TypeAdapter(cls).validate_python(dict(tree))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(_path(tree, first["loc"]))
        got = "" if first["type"] == "missing" else f" (got {first['input']!r})"
        place = "--set " if _comes_from(field, overrides) else f"{where}: "
        raise UserError(f"{place}{field}: {first['msg'][0].lower()}{first['msg'][1:]}{got}") from error
    for field, value in flatten(as_tree(recipe)).items():
        if isinstance(value, str) and Location in _marks(recipe, field):
            check_location(value, f"{'--set ' if _comes_from(field, overrides) else f'{where}: '}{field}")
    return recipe


def as_tree(recipe: Any) -> dict[str, Any]:
    """Turn a recipe into nested plain dicts and lists, ready for JSON or YAML."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
    return tree


def identity(recipe: Any) -> dict[str, Any]:
    """The fields that decide the result, flat (``attack.eps`` -> value): all but `Location` and `Execution` ones."""
    flat = flatten(as_tree(recipe))
    return {name: value for name, value in flat.items() if not _is_free(recipe, name)}


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field that differs between two identities: (field, old value, new value); None when all agree.

    A field that one of them lacks has the value None there.
    """
    names = {**old, **new}
    return next(((name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)), None)


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the sha256 of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message: ``; did you mean 'eps'?``, or the list of known names when none is near."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.55)
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    return f"; known: {', '.join(sorted(known))}" if len(known) <= 30 else ""


def _find(name: str, folder: Path) -> Path:
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.exists() and not path.is_dir():
            return path
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    what = "is a folder" if Path(name).is_dir() else "no such file"
    raise UserError(f"recipe {name!r}: {what}, and no recipe of that name{nearest(name, names)}")


def _set(tree: dict[str, Any], override: str) -> None:
    field, separator, text = override.partition("=")
    if not separator or not field:
        raise UserError(f"--set {override}: write it as field=value, for example seed=1")
    *parents, last = field.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent} is a value, it has no fields below it")
        node = child
    try:
        node[last] = load_plain(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: {text!r} is not a YAML value") from error


def _refuse_unknown(cls: Any, tree: Mapping[str, Any], where: str, prefix: str, overrides: Sequence[str]) -> None:
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [field.name for field in dataclasses.fields(cls)]
    for name, value in tree.items():
        field = f"{prefix}{name}"
        place = "--set" if _comes_from(field, overrides) else where
        if name not in known:
            if why := getattr(cls, "RETIRED", {}).get(name):
                raise UserError(f"{place}: {field}: {why}")
            raise UserError(f"{place}: unknown field {field!r}{nearest(str(name), known)}")
        members = list(_dataclasses_in(hints[name]))
        if not isinstance(value, Mapping):
            if len(members) > 1:
                raise UserError(
                    f"{place}: {field}: write it as {field}: {{{TAG}: {value}}}, or --set {field}.{TAG}={value}"
                )
            continue
        if len(members) > 1 and (tag := value.get(TAG)) not in (names := [member().name for member in members]):
            if tag is None:
                raise UserError(f"{place}: {field}: has no {TAG}; give one of {', '.join(names)}")
            raise UserError(f"{place}: {field}.{TAG}: {tag!r} is not known{nearest(str(tag), names)}")
        if child := _member(members, value):
            _refuse_unknown(child, value, where, f"{field}.", overrides)


def _path(tree: Any, location: Sequence[int | str]) -> Iterator[str]:
    """The names of a field and its parents. pydantic adds the tags of unions and a word for keys of mappings."""
    for part in location:
        if part == "[key]" or (isinstance(tree, Mapping) and part not in tree and part == tree.get(TAG)):
            continue
        yield str(part)
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            tree = None


def _comes_from(field: str, overrides: Sequence[str]) -> bool:
    """Whether an override set this field, one of its parents or one of its children; if not, it came from the file."""
    given = [f"{override.partition('=')[0].strip()}." for override in overrides]
    return any(f"{field}.".startswith(name) or name.startswith(f"{field}.") for name in given)


def _dataclasses_in(hint: Any) -> Iterator[Any]:
    """The dataclasses that a field may hold: itself, or the members of a union."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _dataclasses_in(part)


def _member(members: Sequence[Any], value: Mapping[str, Any]) -> Any:
    """The one of them that a mapping is to become: by its tag where there are several; None where there is none."""
    if len(members) < 2:
        return next(iter(members), None)
    return next((member for member in members if member().name == value.get(TAG)), None)


def _is_free(recipe: Any, name: str) -> bool:
    return not {Location, Locations, Execution}.isdisjoint(_marks(recipe, name))


def _marks(recipe: Any, name: str) -> set[Any]:
    """The marks of a field of a nested recipe, by its dotted name."""
    head, _, rest = name.partition(".")
    hint, value = typing.get_type_hints(type(recipe), include_extras=True)[head], getattr(recipe, head)
    if rest and dataclasses.is_dataclass(value):
        return _marks(value, rest)
    return {mark for mark in typing.get_args(hint) if mark in (Location, Locations, Execution)}
