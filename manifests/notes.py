"""Notes to the user: what is worth knowing and stops nothing. One line each on standard error."""

from __future__ import annotations

import click


def note(text: str) -> None:
    """Print ``note: TEXT`` on standard error. The text names the file or field that it speaks of."""
    click.echo(f"note: {text}", err=True)
