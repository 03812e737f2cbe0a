"""The class list decides labels; what it must not be."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from manifests import UserError
from shards.sources.classes import find_classes, imagenet_classes, load_classes


def write(folder: Path, text: str) -> Path:
    path = folder / "classes.yaml"
    path.write_text(text)
    return path


def test_order_is_the_file_s(tmp_path: Path) -> None:
    """Label i is the i-th name, however the names sort; folders go with names by position."""
    made = load_classes(write(tmp_path, "classes: [zebra, ant, mole]\nfolders: [n3, n1, n2]\ntemplates: ['a {}']"))
    assert made.names == ("zebra", "ant", "mole") and made.folders == ("n3", "n1", "n2") and made.templates == ("a {}",)
    assert load_classes(write(tmp_path, "classes: [zebra, ant]")).folders == ("zebra", "ant")


def test_a_name_may_stand_twice_where_folders_differ(tmp_path: Path) -> None:
    """ImageNet has two 'crane' and two 'maillot'; their folders tell them apart."""
    made = load_classes(write(tmp_path, "classes: [crane, crane]\nfolders: [n02012849, n03126707]"))
    assert made.names == ("crane", "crane")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [a, b, a]", "'a' stands twice"),
        ("classes: [a, b]\nfolders: [x, x]", "'x' stands twice"),
        ("classes: [a, b]\nfolders: [x]", "1 folders for 2 classes"),
        ("classes: [a, 1]", "list of strings"),
        ("classes: {a: 1}", "list of strings"),
        ("classes: [a, no]", "quote names"),
        ("classes: []", "needs a list `classes`"),
        ("templates: ['a {}']", "needs a list `classes`"),
        ("[a, b]", "expected a mapping"),
        ("", "expected a mapping"),
        ("classes: [a", "not a readable YAML"),
        ("classes: [a]\ntemplates: ['a photo']", "has no {}"),
        ("classes: [!!python/object/apply:os.mkdir [pwned]]", "not a readable YAML"),
    ],
)
def test_refusals_name_the_file(tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one line that names the file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"classes\.yaml") as caught:
        load_classes(write(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_not_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_bytes(b"\xff\xfe\x00classes")
    for path in (tmp_path / "classes.yaml", tmp_path):
        with pytest.raises(UserError, match="not a readable YAML"):
            load_classes(path)


def test_imagenet() -> None:
    """The benchmark's 1000 classes in its order: wnids sorted, names as OpenAI curated them; two pairs of classes
    share a name.
    """
    classes, fingerprint = find_classes("imagenet-1k")
    assert len(classes.names) == len(classes.folders) == len(set(classes.folders)) == 1000
    assert list(classes.folders) == sorted(classes.folders) and all(
        re.fullmatch(r"n\d{8}", folder) for folder in classes.folders
    )
    known = {
        "n01440764": "tench",
        "n02085620": "Chihuahua",
        "n02123045": "tabby cat",
        "n07753592": "banana",
        "n15075141": "toilet paper",
    }
    assert {folder: classes.names[classes.folders.index(folder)] for folder in known} == known
    assert (classes.folders[0], classes.folders[151], classes.folders[999]) == ("n01440764", "n02085620", "n15075141")
    assert find_classes("imagenet-1k") == (classes, fingerprint) and not classes.templates
    assert fingerprint == "7c90f1278b36c9b8"  # every run on ImageNet has it in its run.json


def test_imagenet_as_the_libraries_have_it() -> None:
    """The list is the project's own, so that no new version of a library changes a run; today they agree."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    classes = imagenet_classes()
    assert classes.names == tuple(IMAGENET_CLASSNAMES)
    assert classes.folders == tuple(ImageNetInfo("imagenet-1k").label_names())


def test_imagenet_needs_neither_library(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    program = (
        "import sys; from shards.sources import find_classes; find_classes('imagenet-1k'); print(sorted(sys.modules))"
    )
    told = python(program)
    assert told.returncode == 0, told.stderr
    assert "'torch'" in told.stdout and "'timm'" not in told.stdout and "'open_clip'" not in told.stdout
