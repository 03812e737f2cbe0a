"""Names of timm models, which recipes and student.json hold: a model of timm's own list, with one of its tags or none."""

from __future__ import annotations

import re

from .errors import UserError
from .recipe import nearest


def check_timm_name(name: str, field: str) -> None:
    """Raises UserError, with the nearest name, for a model or tag that timm does not know, and for `hf-hub:`, `local-dir:`.

    field: the recipe field that holds the name, for the message.
    """
    import timm  # not at the top: the record works without timm

    if not re.fullmatch(r"\w+(\.\w+)?", name) or not timm.is_model(name):
        raise UserError(f"{field}: timm knows no model {name!r}{nearest(name.partition('.')[0], timm.list_models())}")
    architecture, _, tag = name.partition(".")
    try:
        known = timm.get_pretrained_cfg(name, allow_unregistered=False) is not None or not tag
    except (RuntimeError, ValueError):
        known = not tag
    if not known:
        tags = [found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")]
        raise UserError(f"{field}: timm's {architecture} has no weights of the tag {tag!r}{nearest(tag, tags)}")
