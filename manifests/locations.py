"""Which locations may be opened: local paths, and URLs of the protocols listed here.

fsspec opens far more than files: `reference://` renders templates, and `::` chains file systems that interpret what
the next one holds. A stranger's recipe or run.json may name a location, so fsspec sees only what the list allows.
"""

from __future__ import annotations

import os
import re

from .errors import UserError

PROTOCOLS = frozenset(
    {
        "file", "local", "memory", "http", "https", "hf",
        "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl",
    }
)  # fmt: skip
ENVIRONMENT = "DAD_PROTOCOLS"
CHAIN = "::"
_SHOWN = 120  # characters of a location in a message; an attack may be long


def check_location(location: str, field: str | None = None) -> str:
    """Return a location that may be opened: a path, or one URL of `PROTOCOLS` or of $DAD_PROTOCOLS.

    field: the recipe field or option that names it, for the message.
    Raises UserError for chained URLs (`::`), `data:` URIs and any other protocol.
    """
    shown = location if len(location) <= _SHOWN else f"{location[:_SHOWN]}…"
    place = f"{field}: {shown}" if field else shown
    if CHAIN in location:
        raise UserError(f"{place}: chained URLs (`{CHAIN}`) are not opened; name one path or URL")
    protocol = _protocol(location)
    if protocol is not None and protocol not in PROTOCOLS | _added():
        known = ", ".join(sorted(PROTOCOLS))
        raise UserError(
            f"{place}: {protocol!r} is none of the protocols that are opened ({known}); if you trust it, "
            f"set the environment variable {ENVIRONMENT}={protocol}, or copy the files to a folder"
        )
    return location


def _protocol(location: str) -> str | None:
    """The protocol that fsspec would open a location with; None for a local path."""
    name, separator, _ = location.partition("://")
    if separator and len(name) > 1:
        return name
    return "data" if re.match(r"data:", location, re.IGNORECASE) else None


def _added() -> frozenset[str]:
    """Protocols that the user allows on top, separated by commas; no recipe can set an environment variable."""
    return frozenset(name.strip() for name in os.environ.get(ENVIRONMENT, "").split(",") if name.strip())
