"""A location of a stranger opens files of a few protocols, and never a file system that runs what it reads."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from manifests import Location, RunDir, Store, UserError, recipe_dataclass
from manifests.locations import check_location
from manifests.recipe import make_recipe

ATTACKS = {
    "chained": "reference::data:application/json;base64,DATA",
    "option": "reference://?fo=x",
    "data": "data:application/json;base64,DATA",
    "capitals": "Data:application/json;base64,DATA",
    "cached": "simplecache::https://example.org/run",
    "archive": "zip://run::file:///tmp/x.zip",
    "jar": "jar:file:///tmp/x.jar",
    "end": "s3://bucket/run::",
    "github": "github://a:b@main/run",
    "unknown": "nonsense://x/run",
}


@recipe_dataclass
class Inner:
    place: Annotated[str | None, Location] = None
    text: str = ""


@recipe_dataclass
class Outer:
    inner: Inner = Inner()


@pytest.fixture
def touched(tmp_path: Path) -> Iterator[Path]:
    """A file that appears as soon as fsspec makes a `reference` file system, as rendering a template would."""
    marker = tmp_path / "pwned"

    class Touching(LocalFileSystem):  # type: ignore[misc]
        protocol = "reference"
        cachable = False

        def __init__(self, *_: Any, **__: Any) -> None:
            marker.touch()
            super().__init__()

    before = fsspec.get_filesystem_class("reference")
    fsspec.register_implementation("reference", Touching, clobber=True)
    yield marker
    fsspec.register_implementation("reference", before, clobber=True)


def attack(marker: Path, kind: str = "chained") -> str:
    """A location that runs `touch` through the templates of a fsspec without a sandbox."""
    template = "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}".replace("MARKER", str(marker))
    tree = {"version": 1, "templates": {}, "gen": [], "refs": {"run.json": ["{{u}}"], "x": template}}
    return ATTACKS[kind].replace("DATA", base64.b64encode(json.dumps(tree).encode()).decode())


def test_the_attack_would_be_seen(touched: Path) -> None:
    """The other tests prove something only if opening the location leaves a trace."""
    fsspec.core.url_to_fs("reference://x")
    assert touched.exists()


@pytest.mark.parametrize("kind", list(ATTACKS))
def test_a_store_opens_listed_protocols_alone(touched: Path, kind: str) -> None:
    for open_it in (Store, RunDir):
        with pytest.raises(UserError) as caught:
            open_it(attack(touched, kind))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not touched.exists()


def test_what_is_opened(tmp_path: Path) -> None:
    """Paths, also with colons in their names, and each protocol of the list."""
    for location in (
        "a/b",
        "/a/b.tar",
        "~/x",
        "run:1/x",
        "s3://b/x",
        "gs://b/x",
        "az://b/x",
        "hf://datasets/a/b",
        "http://h:1/x",
    ):
        assert check_location(location) == location
    Store(tmp_path / "run:1").write("x", b"1")
    assert Store(f"file://{tmp_path}/run:1").read("x") == b"1"


def test_a_user_adds_a_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how; what was added does not open chains."""
    with pytest.raises(UserError, match=r"shards: sftp://h/x: 'sftp' is none .*DAD_PROTOCOLS=sftp"):
        check_location("sftp://h/x", "shards")
    monkeypatch.setenv("DAD_PROTOCOLS", "ftp, sftp")
    assert check_location("sftp://h/x") == "sftp://h/x"
    with pytest.raises(UserError, match="chained"):
        check_location("sftp://h/x::file://y")


def test_a_recipe_names_the_field(touched: Path) -> None:
    """A field that says where something lies is checked when the recipe is read, from a file as from --set."""
    made = make_recipe(Outer, {"inner": {"text": "a::b", "place": "s3://b/x"}}, "r.yaml")
    assert made.inner.text == "a::b"
    bad = attack(touched)
    with pytest.raises(UserError, match=r"^r\.yaml: inner\.place: reference::"):
        make_recipe(Outer, {"inner": {"place": bad}}, "r.yaml")
    with pytest.raises(UserError, match=r"^--set inner\.place: reference::"):
        make_recipe(Outer, {"inner": {"place": bad}}, "r.yaml", [f"inner.place={bad}"])
    assert not touched.exists()
