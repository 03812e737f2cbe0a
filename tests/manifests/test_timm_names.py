"""A misspelt model or tag is one line with the nearest name; other places than timm's own list are refused."""

from __future__ import annotations

import pytest
import timm

from manifests import UserError
from manifests.timm_names import check_timm_name


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet18.a1_in1k", "vit_large_patch14_clip_224.openai_ft_in1k", "test_vit"]
)
def test_known_names(name: str) -> None:
    check_timm_name(name, "student", timm)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt18", r"^student: timm knows no model 'resnt18'; did you mean .*'resnet18'"),
        ("resnet18.a1_in1K", r"^student: timm's resnet18 has no tag 'a1_in1K'; did you mean 'a1_in1k'"),
        ("test_resnet.nonsense", r"^student: timm's test_resnet has no tag 'nonsense'"),
        ("hf-hub:timm/resnet18.a1_in1k", r"^student: timm knows no model 'hf-hub:timm"),
        ("local-dir:resnet18", r"^student: timm knows no model 'local-dir:resnet18'"),
        ("resnet18.x:y/z", r"^student: timm knows no model"),
        ("../resnet18", r"^student: timm knows no model"),
        ("", r"^student: timm knows no model"),
    ],
)
def test_refused_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_timm_name(name, "student", timm)
    assert "\n" not in str(caught.value)
