"""What every command line of the project shares: user errors in one line, clean interruption, ``--debug`` for stack traces."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Any

import click

from .errors import UserError

USER_ERROR = 2
INTERRUPTED = 130


class ProjectGroup(click.Group):
    """A click group that prints a UserError as one line and exits with status 2; with ``--debug`` it shows the stack trace too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        debug = click.Option(["--debug"], is_flag=True, help="Show the stack trace of an error.")
        self.params.append(debug)

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug", False)
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except UserError as error:
            if debug:
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            sys.exit(USER_ERROR)
        except KeyboardInterrupt:
            if debug:
                traceback.print_exc()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it now
            click.echo("\ninterrupted: finished work is kept; run the same command again to go on", err=True)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # the reader of a pipe (head, less) has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


def _terminate(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override one field of the recipe, e.g. attack.eps=0.2. Repeatable."
)
