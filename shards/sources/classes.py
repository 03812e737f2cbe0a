"""The class list: names in label order, with their folders and prompts. Labels never come from directory order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import yaml

from manifests import Store, UserError, find_file, one_line
from manifests.plain_yaml import load_plain
from manifests.recipe import fingerprint

from .files import common_extension, expand, store_of

IMAGENET = "imagenet-1k"
LISTS = ("classes.yaml", "classes.json")  # names of a class list's file beside image sets


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Names in label order; ``folders[i]`` is the ImageFolder folder of class i."""

    names: tuple[str, ...]
    folders: tuple[str, ...]
    templates: tuple[str, ...] = ()  # prompts with {} for the name; empty when the file has none
    mend: str = "add it to source.classes under `folders`"  # advice for a folder that is not in the list


def find_classes(name: str) -> tuple[ClassList, str]:
    """The class list that a recipe's ``source.classes`` names, and the fingerprint of its names and folders.

    Raises UserError when there is none.
    """
    classes = imagenet_classes() if name == IMAGENET else load_classes(find_file(name, "source.classes"))
    return classes, fingerprint([classes.names, classes.folders])


@lru_cache(maxsize=1)
def namesakes(names: Sequence[str]) -> str:
    """For people: names that a text tower reads alike (case and spaces do not count), with their classes."""
    classes: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        classes.setdefault(" ".join(name.lower().split()), []).append(number)
    return ", ".join(f"{names[same[0]]!r} {tuple(same)}" for same in classes.values() if len(same) > 1)


def imagenet_classes() -> ClassList:
    """ImageNet's 1000 classes: names as CLIP's authors curated them, wnids as folders, in the benchmark's order."""
    return load_classes(Path(__file__).parent / f"{IMAGENET}.yaml")


def classes_for(names: Sequence[str], images: str) -> ClassList:
    """The class list by which to read the image set ``images``. names: the classes of a run or student, in label order.

    Folders come from a ``classes.yaml`` or ``classes.json`` in the folder above ``images``. Without one, ImageNet's
    names have the wnids, and other classes have folders of their own names. Raises UserError when the file lists
    other classes.
    """
    names = tuple(names)
    mend = f"list `classes` and the `folders` of their images, in label order, in {above(images).where(LISTS[0])}"
    if found := classes_beside(images):
        listed, where = found
        if listed.names != names:
            raise UserError(f"{images}: is of another class list than the shards ({where})")
        if listed.folders:
            return replace(listed, mend=f"correct `folders` in {where}")
    if len(names) == 1000 and names == imagenet_classes().names:
        return replace(imagenet_classes(), mend=mend)
    return ClassList(names=names, folders=names, mend=mend)


def classes_beside(images: str) -> tuple[ClassList, str] | None:
    """The class list in the folder above an image set, and its place; None where there is no such file.

    ``classes.yaml`` (or JSON) holds ``classes`` and ``folders`` as `load_classes` reads them. ``classes.json`` may
    also be a plain list of names, which leaves ``folders`` empty. Raises UserError for a file that is neither.
    """
    folder = above(images)
    for name in LISTS:
        try:
            text = folder.read(name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        where = folder.where(name)
        if not name.endswith(".json"):
            return _class_list(_parsed(text, where), where), where
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: not a list of class names in JSON ({error}); correct or remove it") from error
        if isinstance(tree, dict):
            return _class_list(tree, where), where
        return ClassList(names=_strings({"the file": tree}, "the file", where), folders=()), where
    return None


def above(images: str) -> Store:
    """The folder above an image set, where the other sets and their class list lie; of listed files, above theirs."""
    first = expand(images)[0].rstrip("/")
    return store_of(store_of(first).url if common_extension([first]) else first)


def load_classes(path: Path) -> ClassList:
    """Read a class list. Raises UserError for a file that is not one, or with names that occur twice."""
    return _class_list(_read(path), path)


def _class_list(tree: dict[str, object], path: Path | str) -> ClassList:
    names = _strings(tree, "classes", path)
    if not names:
        raise UserError(f"{path}: needs a list `classes` of class names, in label order")
    folders = _strings(tree, "folders", path) or names
    if len(folders) != len(names):
        raise UserError(
            f"{path}: {len(folders)} folders for {len(names)} classes; give one folder per class, in the same order"
        )
    if (twice := repeated(folders)) is not None:
        raise UserError(f"{path}: {twice!r} stands twice; classes (or folders) must be distinct")
    return ClassList(names=names, folders=folders, templates=_templates(tree, path))


def repeated(names: Sequence[str]) -> str | None:
    """The first name that stands there a second time."""
    if len(set(names)) == len(names):
        return None
    return next(name for i, name in enumerate(names) if name in names[:i])


def load_templates(path: Path) -> tuple[str, ...]:
    """Prompt templates of a YAML file. Raises UserError when it has none, or one without ``{}``."""
    templates = _templates(_read(path), path)
    if not templates:
        raise UserError(f"{path}: needs a list `templates`, such as 'a photo of a {{}}.'")
    return templates


def _templates(tree: dict[str, object], path: Path | str) -> tuple[str, ...]:
    templates = _strings(tree, "templates", path)
    for template in templates:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise UserError(f"{path}: template {template!r} has no {{}} for the class name, or other braces")
    return templates


def _read(path: Path) -> dict[str, object]:
    try:
        return _parsed(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: not a readable YAML file: {one_line(error, 300)}") from error


def _parsed(text: bytes, path: Path | str) -> dict[str, object]:
    try:
        tree = load_plain(text.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable YAML file: {one_line(error, 300)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping with a list `classes`")
    return tree


def _strings(tree: dict[str, object], field: str, path: Path | str) -> tuple[str, ...]:
    value = tree.get(field) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{path}: {field} must be a list of strings (quote names such as 'no' or '1')")
    return tuple(value)
