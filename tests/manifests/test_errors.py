"""Messages of libraries within one of our lines; devices that are not there."""

from __future__ import annotations

import pytest

from manifests import UserError, one_line
from manifests.devices import choose_device


@pytest.mark.parametrize(
    ("message", "shortened"),
    [
        ("short", "short"),
        ("two\n  lines", "two lines"),
        ("", ""),
        ("word " * 40, "word " * 6 + "word …"),
        (f"gs://{'a/' * 40}: permission denied", f"gs://{'a/' * 17}…"),
        ("x" * 100, "x" * 39 + "…"),
    ],
)
def test_a_reason_fits_into_a_line(message: str, shortened: str) -> None:
    """The cut falls between words, unless that would lose most of the line."""
    assert one_line(OSError(message), 40) == shortened and len(shortened) <= 40


@pytest.mark.parametrize("name", ["cuda:99", "meta", "cpux"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^device: '{name}' is not usable here \(.*\); set device=auto, or cpu$"
    ) as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)
