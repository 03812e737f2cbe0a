"""Soft labels of several views: stage 1 stores the teacher's logits on exactly the crops that stage 2 will replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from manifests import RunDir, UserError
from pipeline.generate import make_shards
from pipeline.verify import problems, reinfer
from shards import ShardDataset, ViewSettings, draw_views, replay


@pytest.fixture(scope="module")
def run(world, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    out = tmp_path_factory.mktemp("views") / "run"
    make_shards(world.load("views.count=3", "views.scale=0.3"), str(out))
    return out


@pytest.mark.parametrize("stream", ["clean", "dad"])
def test_each_view_has_the_teachers_word(run: Path, models, stream: str) -> None:  # type: ignore[no-untyped-def]
    """Logits are [views, classes]: row v is the teacher on view v of the stored image; the key decides the views."""
    dataset = ShardDataset(str(run), stream)  # type: ignore[arg-type]
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.image is not None and sample.views is not None and sample.logits.shape == (3, 5)
        drawn = draw_views(sample.key, RunDir(run).info().recipe["seed"], ViewSettings(count=3, scale=0.3), 32)
        assert np.array_equal(sample.views, drawn)  # type: ignore[arg-type]
        pixels = sample.image.permute(1, 2, 0).numpy()
        crops = (
            torch.from_numpy(np.stack([replay(pixels, view) for view in sample.views])).permute(0, 3, 1, 2).float()
            / 255
        )
        with torch.no_grad():
            torch.testing.assert_close(sample.logits.float(), models.teacher(crops), atol=0.05, rtol=2e-3)


def test_views_change_labels_and_nothing_else(run: Path, finished_run: Path) -> None:
    """The images and verdicts are those of a run without views: verified is judged on the whole canvas."""
    with_views, without = ShardDataset(str(run), "dad"), ShardDataset(str(finished_run), "dad")
    assert [with_views.key(i) for i in range(len(with_views))] == [without.key(i) for i in range(len(without))]
    for i in range(len(without)):
        assert torch.equal(with_views[i].image, without[i].image)  # type: ignore[arg-type]


def test_verify_asks_about_views(run: Path) -> None:
    """A sound run has no problems; a teacher that sees other pixels than the views is found out."""
    assert list(problems(str(run))) == [] and list(reinfer(str(run), 20, 0, ())) == []


def test_the_top_k_alone(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """With topk the label members are records; the k largest logits are the full run's, and verify compares those."""
    out = str(tmp_path / "run")
    make_shards(world.load("views.count=2", "views.topk=2"), out)
    assert list(problems(out)) == [] and list(reinfer(out, 20, 0, ())) == []
    full = str(tmp_path / "full")
    make_shards(world.load("views.count=2"), full)
    for short, whole in zip(
        (ShardDataset(out)[i] for i in range(5)), (ShardDataset(full)[i] for i in range(5)), strict=True
    ):
        best = whole.logits.float().topk(2, dim=1)
        torch.testing.assert_close(short.logits.float().gather(1, best.indices), best.values)


def test_more_than_all_classes_is_refused_before_any_work(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"views\.topk: 5 of 5 classes"):
        make_shards(world.load("views.topk=5"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
