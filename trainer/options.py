"""Options of the command line that say what to learn from and what is to learn, the same for every command of stage 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from manifests.command import as_overrides, recipe_option_of

from .recipe import FOLDER, choose

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
