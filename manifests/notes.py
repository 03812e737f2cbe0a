"""Notes to the user, one line each on standard error. A note stops nothing."""

from __future__ import annotations

import click


def note(text: str) -> None:
    """Print ``note: TEXT`` on standard error. The text names the file or field that it is about."""
    click.echo(f"note: {text}", err=True)
