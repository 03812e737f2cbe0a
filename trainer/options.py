"""Options that every training command shares: the recipe, the student and the shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from manifests import RunDir, UserError
from manifests.command import as_overrides, recipe_option_of

from .recipes import DEMO, FOLDER

_OPTIONS = (
    recipe_option_of(FOLDER, None, "demo for the demo's shards, else the student's recipe"),
    click.option("--student", metavar="NAME", help="Any timm model, or the name of a recipe."),
    click.option("--shards", metavar="DIR", help="Run directory to learn from; short for --set shards=DIR."),
)


def choice_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--recipe``, ``--student`` and ``--shards`` to a command, which passes them to `chosen`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chosen(recipe: str | None, student: str | None, shards: str | None) -> tuple[str, list[str]]:
    """(recipe, overrides) that these options stand for. Raises UserError as `choose` does."""
    name, model = choose(recipe, student, shards)
    return name, as_overrides({"student": model, "shards": shards})


def choose(recipe: str | None, student: str | None, shards: str | None) -> tuple[str, str | None]:
    """Choose (recipe, timm model), None meaning the recipe's own. ``student``: a timm model or a recipe's name.

    Without ``recipe``, shards with the demo's classes take the demo's recipe. Other shards take the recipe with the
    student's name, or else the first one that trains this model.
    Raises UserError when no recipe fits, or there are no shards.
    """
    from .recipe import load  # not at the top: it imports torch, and --help must be quick

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
            f"--recipe: {whose} no recipe for {shards}; name one to take settings from: {', '.join([DEMO, *own])}"
        )
    return fitting[0], None


def _are_the_demos(shards: str) -> bool:
    """Whether these are the demo's shards, by their place or by their classes."""
    from .evaluation.sets import classes_of
    from .recipe import load

    demo = load(DEMO)
    if Path(shards) == Path(demo.shards):
        return True
    return RunDir(shards).info().classes == classes_of(str(demo.validation))
