"""Measurements of training: losses stay on the device and are read rarely; scalars go to TensorBoard and W&B."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from manifests import UserError, one_line
from manifests.recipe import as_tree, fingerprint
from shards import Batch

from .ranks.distributed import gather, is_first, sum_over_ranks
from .recipe import Recipe

NAMED = 16  # most samples that a message names


class Meter:
    """Losses of the steps since the last reading. Reading waits for the device; adding does not."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, dict[str, torch.Tensor], list[str]]] = []

    def add(self, step: int, losses: Mapping[str, torch.Tensor], batch: Batch) -> None:
        """losses: scalars on the device. batch: the samples to name if one of them is not finite."""
        self._pending.append((step, dict(losses), [key for part in batch.values() for key in part.keys]))

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """(step, losses) of every step since the last reading, in order, summed over ranks.

        Raises UserError, naming the samples, at the first step whose loss or gradient is not finite. The weights are
        useless after such a step, so read before saving.
        """
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        own = torch.stack([torch.stack(list(losses.values())) for _, losses, _ in pending])
        values = sum_over_ranks(own).tolist()  # wait once for all steps
        read = []
        for (step, losses, keys), row in zip(pending, values, strict=True):
            named = dict(zip(losses, row, strict=True))
            if not all(map(math.isfinite, row)):
                what = "gradient" if math.isfinite(named["loss"]) else "loss"
                raise UserError(
                    f"the {what} became {named['grad_norm' if what == 'gradient' else 'loss']} at step {step}; "
                    f"lower optimizer.lr, or look at the samples: {_suspects(keys, bool(losses['loss'].isfinite()))}"
                )
            read.append((step, named))
        return read


def _suspects(keys: list[str], fine: bool) -> str:
    """The samples of ranks whose loss is not finite; of all ranks if only the gradient, which they share, is not.

    keys, fine: this rank's samples, and whether its loss is finite.
    """
    parts = gather((keys, fine))
    found = [key for part, its_fine in parts if not its_fine for key in part]
    found = found or [key for part, _ in parts for key in part]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more


class Log:
    """Writes scalars, on rank 0, to TensorBoard and, if the recipe names a project, to Weights & Biases."""

    def __init__(self, folder: Path, recipe: Recipe, start: int) -> None:
        """start: the step to go on from; points that an interrupted run logged from there on are purged."""
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start) if is_first() else None
        self._wandb = _wandb_run(folder, recipe, recipe.wandb) if recipe.wandb and is_first() else None

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)

    def flush(self) -> None:
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_wandb(recipe: Recipe) -> None:
    """Raises UserError when the recipe asks for Weights & Biases and it cannot be imported."""
    if recipe.wandb is None:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"wandb: is not installed ({one_line(error)}); pip install '.[wandb]', or --set wandb=null"
        ) from error


def _wandb_run(folder: Path, recipe: Recipe, project: str) -> Any:
    """Start or resume the run of this folder. It stays on disk unless WANDB_MODE=online."""
    import wandb

    return wandb.init(
        project=project,
        name=folder.name,
        id=fingerprint(str(folder.resolve())),
        resume="allow",
        dir=str(folder),
        config=as_tree(recipe),
        mode=os.environ.get("WANDB_MODE", "offline"),
    )


def to_csv(rows: list[dict[str, float]]) -> str:
    """A column for every name in any row; floats with six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(
        {name: str(value) if isinstance(value, int) else f"{value:.6g}" for name, value in row.items()} for row in rows
    )
    return text.getvalue()
