"""Checkpoints: what is damaged on the disk is never trained on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from manifests import UserError
from manifests.rundir import RUN
from trainer.checkpoint import BEST, LAST, METRICS, STUDENT_INFO, StudentDir
from trainer.export import export
from trainer.loop import train

from .test_loop import recipe


def test_no_flipped_bit_of_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    """Flipped in a tensor, in the pickle, in the archive's names and places; or without effect, in its padding."""
    run = StudentDir(tmp_path)
    state = {
        "student": {"weight": torch.arange(2000.0), "bias": torch.ones(3)},
        "progress": {"epoch": 1, "rows": [{"loss": 0.5}]},
    }
    run.save_last(state)
    sound, draw, refused = (tmp_path / LAST).read_bytes(), random.Random(0), 0
    for place in [*range(0, 1000, 7), *draw.sample(range(len(sound)), 200), *range(len(sound) - 1200, len(sound), 7)]:
        data = bytearray(sound)
        data[place] ^= 1 << draw.randrange(8)
        (tmp_path / LAST).write_bytes(data)
        try:
            loaded = run.load_last()
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / LAST}: not a readable checkpoint; delete it to start again (")
            refused += 1
        else:
            assert str(loaded) == str(state) and torch.equal(loaded["student"]["weight"], state["student"]["weight"]), (
                place
            )
    assert refused > 200


def test_a_checkpoint_stays_readable_by_torch_alone(tmp_path: Path) -> None:
    StudentDir(tmp_path).save_last({"student": {"weight": torch.ones(3)}})
    assert torch.equal(torch.load(tmp_path / LAST, weights_only=True)["student"]["weight"], torch.ones(3))


def test_no_flipped_bit_of_the_best_weights_is_used(tiny_run: Path, tmp_path: Path) -> None:
    """Neither evaluated nor exported; training again puts the last weights there, as where the file is missing."""
    settings = recipe(tiny_run, "epochs=1")
    run = train(settings, str(tmp_path))
    sound, weights = (tmp_path / BEST).read_bytes(), run.load_student().state_dict()
    assert (
        train(recipe(tiny_run, "epochs=1"), str(tmp_path / "again")).store.read(BEST) == sound
    )  # to the byte, metadata too
    draw, start = random.Random(0), 8 + int.from_bytes(sound[:8], "little")
    for place in draw.sample(range(start, len(sound)), 20):
        data = bytearray(sound)
        data[place] ^= 1 << draw.randrange(8)
        (tmp_path / BEST).write_bytes(data)
        with pytest.raises(
            UserError, match=rf"^{tmp_path / BEST}: its checksum is wrong \(damaged or altered\); training again puts"
        ):
            run.load_student()
    for harm in (lambda file: file.write_bytes(sound[:5000]), Path.unlink):
        harm(tmp_path / BEST)
        with pytest.raises(UserError, match=r"training again puts|run `make train` again"):
            export(run, str(tmp_path / "export"))
        train(settings, str(tmp_path))
        mended = run.load_student().state_dict()
        assert all(torch.equal(mended[name], value) for name, value in weights.items())


@pytest.mark.parametrize("name", [RUN, LAST, BEST, METRICS, f"other/{STUDENT_INFO}"])
def test_a_folder_of_something_else_is_left_alone(name: str, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(
        UserError, match=r"(is in the way of a new student|holds other students, such as other).*; choose another --out"
    ):
        train(recipe(tiny_run), str(tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_directory_behind_a_url_is_refused() -> None:
    with pytest.raises(UserError, match=r"^memory://x/y: a student's directory is a local folder, not a URL"):
        StudentDir("memory://x/y")
