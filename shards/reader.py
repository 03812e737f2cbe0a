"""Batches for training: two streams read side by side, in the planned order, by any number of loader workers.

The state of the reader is two integers, epoch and global batches consumed: `TrainingReader.batches` starts anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from manifests import UserError

from .dataset import LabelledImage, ShardDataset, StreamName
from .plan import epoch_order, rank_slice
from .seeds import seeded_generator


@dataclass
class Half:
    """One rank's part of a global batch of one stream."""

    keys: list[str]
    images: torch.Tensor  # uint8 [B, 3, H, W] as stored, or what the transform made of it
    labels: torch.Tensor  # int64 [B]
    logits: torch.Tensor  # float16 [B, classes]


Batch = dict[str, Half]  # by stream name
Transform = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


class TrainingReader:
    """Reads the streams of a run so that they end together.

    batch_size: clean images of one global batch. Every other stream gives its proportional share to each.
    Raises UserError when a stream has too few samples for one batch.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int,
        streams: tuple[StreamName, ...] = ("clean", "dad"),
        seed: int = 0,
        window: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.datasets: dict[str, ShardDataset] = {stream: ShardDataset(url, stream) for stream in streams}
        self.batch_size, self.seed, self.window, self.rank, self.world = batch_size, seed, window, rank, world
        first = self.datasets[streams[0]]
        self.classes = first.classes
        self.steps = len(first) // batch_size
        if self.steps == 0:
            raise UserError(f"{url}: {len(first)} {streams[0]} samples are fewer than one batch of {batch_size}; lower batch")
        # What does not fill a batch (clean), or a share of every batch (the others), is left out; it differs from epoch to epoch.
        self.sizes = {stream: len(dataset) // self.steps for stream, dataset in self.datasets.items()} | {streams[0]: batch_size}
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        for stream, dataset in self.datasets.items():
            if len(dataset) < self.steps * world:
                raise UserError(
                    f"{url}: only {len(dataset)} {stream} samples for {self.steps} batches an epoch; raise batch to "
                    f"{-(-len(first) * world // max(len(dataset), 1))} or more, or weaken the attack"
                )

    def check(self, *, content: bool = True) -> None:
        """Make sure that every tar is whole before the first step. Raises UserError naming the file."""
        for dataset in self.datasets.values():
            dataset.check(content=content)

    def indices(self, stream: str, epoch: int, step: int) -> np.ndarray:
        """Which samples of a stream this rank reads in global batch ``step``."""
        size = self.sizes[stream]
        begin, end = rank_slice(step * size, (step + 1) * size, self.rank, self.world)
        return self._order(stream, epoch)[begin:end]

    def batches(self, epoch: int, start: int = 0, *, workers: int = 0, transform: Transform | None = None) -> Iterator[Batch]:
        """The batches of an epoch from global batch ``start`` on; the same whatever the number of workers.

        ``transform(images uint8 [B, 3, H, W], generator)`` runs in the workers, with a generator seeded by (seed, epoch, step).
        """
        loader: DataLoader[Any] = DataLoader(
            _EpochBatches(self, epoch, transform),
            sampler=range(start, self.steps),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _order(self, stream: str, epoch: int) -> np.ndarray:
        if self._orders.get(stream, (-1,))[0] != epoch:
            shards = self.datasets[stream].shards
            self._orders[stream] = (epoch, epoch_order(shards, seed=self.seed, epoch=epoch, window=self.window, stream=stream))
        return self._orders[stream][1]


class _EpochBatches(Dataset[Any]):
    def __init__(self, reader: TrainingReader, epoch: int, transform: Transform | None) -> None:
        self.reader, self.epoch, self.transform = reader, epoch, transform
        for stream in reader.datasets:
            reader._order(stream, epoch)  # once here, not in every worker

    def __len__(self) -> int:
        return self.reader.steps

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return {stream: self._half(stream, step) for stream in self.reader.datasets}
        except OSError as error:
            return UserError(f"{self.reader.datasets[next(iter(self.reader.datasets))].run}: cannot read: {error}")
        except UserError as error:
            return error  # raised in a worker it would reach the user wrapped in a stack trace

    def _half(self, stream: str, step: int) -> Half:
        reader = self.reader
        samples = [reader.datasets[stream][int(index)] for index in reader.indices(stream, self.epoch, step)]
        images = _stack_images(samples, stream, reader)
        if self.transform is not None:
            images = self.transform(images, seeded_generator(reader.seed, self.epoch, step, stream, reader.rank))
        return Half(
            keys=[sample.key for sample in samples],
            images=images,
            labels=torch.tensor([sample.label for sample in samples]),
            logits=torch.stack([sample.logits for sample in samples]),
        )


def _stack_images(samples: list[LabelledImage], stream: str, reader: TrainingReader) -> torch.Tensor:
    images = [sample.image for sample in samples if sample.image is not None]
    if len(images) < len(samples):
        run = reader.datasets[stream].run
        raise UserError(f"{run}: its {stream} shards hold labels only, without images; make them anew with output.clean_images=true")
    return torch.stack(images)
