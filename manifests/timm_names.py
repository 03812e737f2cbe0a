"""Names of timm models, which recipes and student.json hold: a model of timm's list, with one of its tags or none."""

from __future__ import annotations

import re
from types import ModuleType

from .errors import UserError
from .recipe import nearest


def check_timm_name(name: str, field: str, timm: ModuleType) -> None:
    """Raises UserError, with the nearest name, for an unknown model or tag, and for `hf-hub:` and `local-dir:`.

    field: the recipe field that holds the name, for the message. timm: the package, which the record does without.
    """
    if not re.fullmatch(r"\w+(\.\w+)?", name) or not timm.is_model(name):
        raise UserError(f"{field}: timm knows no model {name!r}{nearest(name.partition('.')[0], timm.list_models())}")
    architecture, _, tag = name.partition(".")
    if tag and name not in (known := timm.list_models(f"{architecture}.*", include_tags=True)):
        tags = [found.partition(".")[2] for found in known]
        raise UserError(f"{field}: timm's {architecture} has no tag {tag!r}{nearest(tag, tags)}")
