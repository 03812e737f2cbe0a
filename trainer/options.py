"""Options of the command line that say what to learn from and what is to learn, the same for every command of stage 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from manifests import RunDir, UserError
from manifests.command import as_overrides, recipe_option_of

from .recipes import DEMO, FOLDER

_OPTIONS = (
    recipe_option_of(FOLDER, None, "the demo's for its shards, else that of the student"),
    click.option("--student", metavar="NAME", help="Any timm model, or one of the recipes."),
    click.option("--shards", metavar="DIR", help="The run directory to read; short for --set shards=DIR."),
)


def choice_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--recipe``, ``--student`` and ``--shards``, for `chosen`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chosen(recipe: str | None, student: str | None, shards: str | None) -> tuple[str, list[str]]:
    """The recipe that these options choose, and what they override in it. Raises UserError as `choose` does."""
    name, model = choose(recipe, student, shards)
    return name, as_overrides({"student": model, "shards": shards})


def choose(recipe: str | None, student: str | None, shards: str | None) -> tuple[str, str | None]:
    """(recipe, timm model or None for the recipe's own) for what a command names. ``student`` is a timm model or one of our recipes.

    Where no recipe is named, shards of the demo's classes are learned from as in the demo, others by the recipe of the student's name,
    or else the first that trains this model. Raises UserError when there is none, or there are no shards.
    """
    from .recipe import load  # not at the top: --help need not wait for torch

    own = {path.stem: load(path.stem).student for path in sorted(FOLDER.glob("*.yaml")) if path.stem != DEMO}
    model = own.get(student, student) if student else None
    if recipe is not None:
        return recipe, model
    if shards is None or _are_the_demos(shards):
        return DEMO, model
    fitting = sorted((name for name in own if student in (name, own[name])), key=lambda name: name != student)
    if not fitting:
        whose = f"{student} has" if student else "there is"
        raise UserError(
            f"--recipe: {whose} no recipe for {shards}; name the one whose settings to take: {', '.join([DEMO, *own])}"
        )
    return fitting[0], None


def _are_the_demos(shards: str) -> bool:
    """Known by their place or, wherever they are, by their classes."""
    from .evaluation.sets import classes_of
    from .recipe import load

    demo = load(DEMO)
    if Path(shards) == Path(demo.shards):
        return True
    return RunDir(shards).info().classes == classes_of(str(demo.validation))
