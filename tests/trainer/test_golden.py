"""A golden loss curve: what stage 2 computes does not change unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.loop import Hooks, train
from trainer.run import Training
from trainer.step import Losses

from .test_loop import recipe

GOLDEN = {  # loss of each step, written down before methods had files of their own
    "plain": [1.6824231, 1.7834562, 1.7915039, 1.4988996, 1.6529055, 1.5577177],
    "kd": [3.8241711, 4.0106010, 4.0287771, 3.4915028, 3.7840247, 3.5900701],
    "dad": [6.0403643, 6.2681952, 6.2302189, 5.6481609, 5.3929677, 5.0928435],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_are_those_of_before(tiny_run: Path, tmp_path: Path, name: str) -> None:
    """One epoch of the tiny run on a CPU, one thread, float32, seed 0; torch's versions differ in the last bits."""
    losses: list[float] = []

    def look(_run: Training, step: Losses) -> None:
        losses.append(step["loss"].item())

    train(recipe(tiny_run, f"method.name={name}", "epochs=1"), str(tmp_path / "student"), Hooks(after_step=look))
    assert losses == pytest.approx(GOLDEN[name], rel=1e-4)
