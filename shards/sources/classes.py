"""The class list: names in label order, and what folders and prompts go with them. Labels never come from directory order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from manifests import UserError, find_file, one_line
from manifests.recipe import fingerprint

IMAGENET = "imagenet-1k"


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Names in label order; ``folders[i]`` is the ImageFolder folder of class i."""

    names: tuple[str, ...]
    folders: tuple[str, ...]
    templates: tuple[str, ...]  # prompts with {} for the name; empty when the file has none


def find_classes(name: str) -> tuple[ClassList, str]:
    """The class list that a recipe's ``source.classes`` names, and the fingerprint of its names and folders; templates, where they are
    used, are part of the teacher's. Raises UserError when there is none.
    """
    classes = imagenet_classes() if name == IMAGENET else load_classes(find_file(name, "source.classes"))
    return classes, fingerprint([classes.names, classes.folders])


def imagenet_classes() -> ClassList:
    """The 1000 classes of ImageNet: open_clip's names (OpenAI's, curated) and the wnids as folders, in the benchmark's order."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return ClassList(
        names=tuple(IMAGENET_CLASSNAMES), folders=tuple(ImageNetInfo("imagenet-1k").label_names()), templates=()
    )


def load_classes(path: Path) -> ClassList:
    """Read a class list. Raises UserError for a file that is not one, or with names that occur twice."""
    tree = _read(path)
    names = _strings(tree, "classes", path)
    if not names:
        raise UserError(f"{path}: needs a list `classes` of class names, in label order")
    folders = _strings(tree, "folders", path) or names
    if len(folders) != len(names):
        raise UserError(
            f"{path}: {len(folders)} folders for {len(names)} classes; give one folder per class, in the same order"
        )
    twice = (
        next((name for i, name in enumerate(folders) if name in folders[:i]), None)
        if len(set(folders)) < len(folders)
        else None
    )
    if twice is not None:
        raise UserError(f"{path}: {twice!r} stands twice; classes (or folders) must be distinct")
    return ClassList(names=names, folders=folders, templates=load_templates(path, required=False))


def load_templates(path: Path, *, required: bool = True) -> tuple[str, ...]:
    """Prompt templates of a YAML file. Raises UserError when one lacks ``{}``."""
    templates = _strings(_read(path), "templates", path)
    if required and not templates:
        raise UserError(f"{path}: needs a list `templates`, such as 'a photo of a {{}}.'")
    bad = next(
        (
            template
            for template in templates
            if template.count("{}") != 1 or set("{}") & set(template.replace("{}", ""))
        ),
        None,
    )
    if bad is not None:
        raise UserError(f"{path}: template {bad!r} has no {{}} for the class name, or other braces")
    return templates


def _read(path: Path) -> dict[str, object]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable YAML file: {one_line(error, 300)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping with a list `classes`")
    return tree


def _strings(tree: dict[str, object], field: str, path: Path) -> tuple[str, ...]:
    value = tree.get(field) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{path}: {field} must be a list of strings (quote names such as 'no' or '1')")
    return tuple(value)
