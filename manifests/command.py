"""Shared by all command lines: user errors in one line, clean interruption, ``--debug`` for stack traces."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click
import yaml

from .errors import UserError
from .recipe import as_tree
from .signals import SIGNALS

USER_ERROR = 2
INTERRUPTED = 130
FAREWELL = "\ninterrupted; what was finished is kept, and the same command goes on from there"


class ProjectGroup(click.Group):
    """A click group that prints a UserError as one line and exits with status 2; ``--debug`` adds the stack trace."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        debug = click.Option(["--debug"], is_flag=True, help="Show the stack trace of an error.")
        self.params.append(debug)

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        arguments = list(sys.argv[1:] if args is None else args)
        if "--debug" in arguments:  # click takes it before the command only; users also write it behind
            arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
        try:
            status = super().main(arguments, prog_name, **(extra | {"standalone_mode": False}))
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(USER_ERROR)
        except click.UsageError as error:  # an option before the command is wrong; click itself would print four lines
            click.echo(f"error: {_message(error)}", err=True)
            sys.exit(USER_ERROR)
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug", False)
        for number in SIGNALS:
            signal.signal(number, _leave)
        try:
            return super().invoke(ctx)
        except (UserError, click.UsageError, OSError) as error:
            if isinstance(error, BrokenPipeError):  # the reader of a pipe (head, less) has closed it
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            if debug:
                traceback.print_exc()
            click.echo(f"error: {_message(error)}", err=True)
            sys.exit(USER_ERROR)
        except KeyboardInterrupt:
            if debug:
                traceback.print_exc()
            click.echo(FAREWELL, err=True)
            sys.exit(INTERRUPTED)


def _message(error: Exception) -> str:
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "the command"
        return f"{error.format_message().rstrip('.')}; see {command} --help"
    if isinstance(error, OSError) and error.strerror:
        hint = "; free some space and run the same command again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.filename or 'file system'}: {error.strerror.lower()}{hint}"
    return str(error)


def _leave(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    while frame is not None:
        # some libraries abort when an exception interrupts their import
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            click.echo(FAREWELL, err=True)
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def as_overrides(named: Mapping[str, object]) -> list[str]:
    """Turn options such as ``--student NAME`` into overrides; None: not given. Quotes keep values from being YAML."""
    return [f"{field}={json.dumps(value)}" for field, value in named.items() if value is not None]


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Override one field of the recipe, e.g. seed=1. Repeatable.",
)


def recipe_option_of(
    folder: Path, default: str | None = "demo", shown_default: str | bool = True
) -> Callable[[Any], Any]:
    """A `--recipe` option whose help lists the recipes in `folder`. `shown_default`: default to show in the help."""
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    return click.option(
        "--recipe",
        default=default,
        show_default=shown_default,
        metavar="FILE|NAME",
        help=f"A YAML file, or one of: {names}.",
    )


def add_recipe_command(group: click.Group, load: Callable[[str, Sequence[str]], Any]) -> None:
    """Add the command ``recipe`` to a command line. load: makes a recipe from a file or name and overrides."""

    @group.command("recipe")
    @click.argument("recipe", metavar="FILE|NAME", default="demo")
    @set_option
    def show_recipe(recipe: str, overrides: tuple[str, ...]) -> None:
        """Print a recipe with every field resolved."""
        click.echo(yaml.safe_dump(as_tree(load(recipe, overrides)), sort_keys=False), nl=False)
