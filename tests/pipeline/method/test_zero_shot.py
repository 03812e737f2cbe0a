"""The zero-shot head is computed once and kept, by a fingerprint of all that decides it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manifests.files.cache import cache_folder
from pipeline.method import zero_shot
from pipeline.method.teacher import load_teacher
from pipeline.recipe import Teacher as TeacherSettings
from shards.sources.classes import ClassList, load_classes


@pytest.fixture
def computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An empty cache folder in which every head is kept; a list that grows with every head that is computed."""
    monkeypatch.setenv("DAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zero_shot, "WORTH_KEEPING", 1)
    calls: list[int] = []
    compute = zero_shot.zero_shot_head

    def counted(model: Any, tokenizer: Any, classes: Any, templates: Any) -> torch.Tensor:
        calls.append(len(classes) * len(templates))
        return compute(model, tokenizer, classes, templates)

    monkeypatch.setattr(zero_shot, "zero_shot_head", counted)
    return calls


@pytest.fixture
def clip(world, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    return Path(shutil.copytree(world.clip, tmp_path / "clip"))


def head(clip: Path, classes: ClassList | None = None) -> torch.Tensor:
    settings = TeacherSettings(kind="open_clip", model=f"local-dir:{clip}")
    found = load_teacher(settings, classes or load_classes(clip / "prompts.yaml")).head
    assert found is not None
    return found


def test_computed_once(clip: Path, computed: list[int], tmp_path: Path) -> None:
    """The second time it is read, wherever the model lies; and it is what was computed, to the bit."""
    first = head(clip)
    moved = clip.rename(tmp_path / "moved")
    assert torch.equal(head(moved), first) and computed == [10]
    (kept,) = cache_folder("heads").iterdir()
    assert kept.is_relative_to(tmp_path / "cache") and torch.equal(load_file(kept)["head"], first)
    kept.unlink()
    assert torch.equal(head(moved), first) and computed == [10, 10]


def test_computed_anew_when_anything_differs(clip: Path, computed: list[int]) -> None:
    """Other text weights, names, order, templates or vocabulary give another head; the image tower does not matter."""
    classes = load_classes(clip / "prompts.yaml")
    first = head(clip)
    variants = (
        replace(classes, names=("fox", *classes.names[1:])),
        replace(classes, names=classes.names[::-1]),
        replace(classes, templates=("a drawing of a {}.",)),
        replace(classes, templates=classes.templates[::-1]),
    )
    for number, variant in enumerate(variants, start=2):
        head(clip, variant)
        assert len(computed) == number
    torch.testing.assert_close(head(clip, variants[1]), first.flip(1))
    path = clip / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["visual.proj"] += 1
    save_file(weights, path)
    assert torch.equal(head(clip), first) and len(computed) == 5
    weights["text_projection"][0, 0] += 0.5
    save_file(weights, path)
    assert not torch.equal(head(clip), first) and len(computed) == 6
    import gzip

    with gzip.open(clip / "bpe.txt.gz", "wt") as file:
        file.write("#version: test\na n\no f</w>\nt h\nth e</w>")
    head(clip)
    assert len(computed) == 7


def test_small_heads_are_not_kept(clip: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A few prompts cost less than looking: nothing is written into the user's cache folder."""
    monkeypatch.setattr(zero_shot, "WORTH_KEEPING", 5000)
    head(clip), head(clip)
    assert computed == [10, 10] and not cache_folder("heads").exists()


def test_one_flipped_bit_of_a_kept_head_is_noticed(clip: Path, computed: list[int]) -> None:
    """It could give every image one label: the head is computed anew, and the copy is mended."""
    first = head(clip)
    (kept,) = cache_folder("heads").iterdir()
    data = bytearray(kept.read_bytes())
    data[-3] ^= 0x40
    kept.write_bytes(data)
    assert torch.equal(head(clip), first) and torch.equal(head(clip), first)
    assert len(computed) == 2


def test_a_damaged_copy(clip: Path, computed: list[int]) -> None:
    """A kept head that cannot be read is computed anew, not a stack trace."""
    first = head(clip)
    (kept,) = cache_folder("heads").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    assert torch.equal(head(clip), first) and computed == [10, 10]


def test_a_cache_folder_that_cannot_be_used(
    clip: Path, computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head is used all the same, and a note says that it is not kept."""
    first = head(clip)
    (tmp_path / "file").touch()
    monkeypatch.setenv("DAD_CACHE", str(tmp_path / "file"))
    assert torch.equal(head(clip), first) and computed == [10, 10]
    assert f"not kept for the next time ({tmp_path}/file/" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes a user that the system does not know")
def test_a_user_without_a_home(clip: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number without a name: no folder to keep it in, and no need of one."""
    import open_clip

    classes, model = load_classes(clip / "prompts.yaml"), open_clip.create_model(f"local-dir:{clip}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    for name in ("HOME", "XDG_CACHE_HOME", "DAD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    child = os.fork()
    if not child:
        os.setuid(54321)
        try:
            os._exit(zero_shot.cached_head(model, tokenizer, classes.names, classes.templates, {}).shape != (16, 5))
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
