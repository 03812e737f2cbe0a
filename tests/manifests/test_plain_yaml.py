"""YAML of strangers: values come out, bombs do not go off."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from manifests import UserError
from manifests.plain_yaml import load_plain
from pipeline.recipe import load
from shards.sources.classes import load_classes

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "bomb": (BOMB, r"line 2: aliases \(\*name\) are not read; write the value out"),
    "brackets": ("x: " + "[" * 5000, "nested too deeply|did not find|expected"),
    "object": ("x: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "date": ("x: 2026-13-45", "month must be in"),
}


def test_what_people_write_is_read() -> None:
    text = "a: [1, 2.5, yes, null]\nb: {c: 'd e'}\nf: |\n  g\n"
    assert load_plain(text) == yaml.safe_load(text) == {"a": [1, 2.5, True, None], "b": {"c": "d e"}, "f": "g\n"}


@pytest.mark.parametrize("kind", BAD)
def test_bombs_are_one_line_and_go_off_nowhere(kind: str, tmp_path: Path) -> None:
    """As a recipe, as a class list and as an override."""
    text, told = BAD[kind]
    (tmp_path / "bad.yaml").write_text(text)
    for read in (lambda: load(str(tmp_path / "bad.yaml")), lambda: load_classes(tmp_path / "bad.yaml")):
        with pytest.raises(UserError, match=told) as caught:
            read()
        assert "\n" not in str(caught.value) and str(tmp_path / "bad.yaml") in str(caught.value)
    with pytest.raises(UserError, match="--set batch="):
        load("demo", [f"batch={text.partition(': ')[2]}"])


def test_a_file_that_is_too_large() -> None:
    with pytest.raises(yaml.YAMLError, match="at most 16,777,216 are read"):
        load_plain("x" * (16 << 20) + "x")
