"""Batches for training: two streams read side by side, in the planned order, by any number of loader workers.

The state of the reader is two integers, epoch and global batches consumed: `TrainingReader.batches` starts anywhere.
"""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from manifests import RunInfo, Store, UserError
from manifests.notes import note
from manifests.signals import ignore_sigterm_unless_from_parent, sigterm_blocked

from .cache import TarCache
from .dataset import ShardDataset, StreamName
from .plan import EpochPlan, classes_in_windows, cut, plan_epoch
from .seeds import seeded_generator
from .views import replay, view_of_epoch

READ_AHEAD = 4 * 2**30  # bytes of images that the loader of a rank keeps ready, in shared memory


@dataclass
class StreamBatch:
    """One rank's part of a global batch of one stream."""

    keys: list[str]
    images: torch.Tensor  # uint8 [B, 3, H, W] as stored (the view of this epoch), or what the transform made of it
    labels: torch.Tensor  # int64 [B]
    logits: torch.Tensor  # float16 [B, classes], of this epoch's view; float32 where the run stores the top k only

    def pin_memory(self) -> StreamBatch:
        """The same in page-locked memory, from where a GPU copies while it computes; the loader calls this in a thread of its own."""
        return StreamBatch(self.keys, self.images.pin_memory(), self.labels.pin_memory(), self.logits.pin_memory())


Batch = dict[str, StreamBatch]  # by stream name
Transform = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


class TrainingReader:
    """Reads the streams of a run so that they end together.

    batch_size: clean images of one global batch. Every other stream gives its proportional share to each, which differs by at most one.
    images, temperature: as for `ShardDataset`, images of the clean stream.
    cache_gb: most that remote tars may take on the local disk, in GiB.
    side: pixels of the images that a transform will make, for the memory that may be read ahead; None: as stored.
    Raises UserError when a stream has too few samples for one batch, or the cache cannot hold what is read at one time.
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
        images: str | Path | None = None,
        temperature: float | None = None,
        cache_gb: float = 50,
        side: int | None = None,
    ) -> None:
        cache = None if Store(url).is_local else TarCache(int(cache_gb * 2**30))
        self.datasets: dict[str, ShardDataset] = {
            stream: ShardDataset(
                url, stream, images=images if stream == "clean" else None, temperature=temperature, cache=cache
            )
            for stream in streams
        }
        self.batch_size, self.seed, self.window, self.rank, self.world, self.side = (
            batch_size,
            seed,
            window,
            rank,
            world,
            side,
        )
        first = self.datasets[streams[0]]
        self.classes = first.classes
        self.steps = len(first) // batch_size
        if self.steps == 0:
            raise UserError(
                f"{url}: {len(first)} {streams[0]} samples are fewer than one batch of {batch_size}; lower batch"
            )
        # Samples of each stream in an epoch. Of the first, those that do not fill a batch are left out; they differ from epoch to epoch.
        self.samples = {stream: len(dataset) for stream, dataset in self.datasets.items()} | {
            streams[0]: self.steps * batch_size
        }
        self._plans: dict[str, tuple[int, EpochPlan]] = {}
        if batch_size < world:
            raise UserError(
                f"{url}: a batch of {batch_size} leaves some of {world} processes without a sample; raise batch, or start fewer"
            )
        for stream, dataset in self.datasets.items():
            if len(dataset) < self.steps * world:
                raise UserError(f"{url}: {_too_few(stream, len(dataset), self.steps, len(first), world)}")
        if (
            cache is not None
            and (needed := sum(_three_windows(dataset, window) for dataset in self.datasets.values())) > cache.limit
        ):
            raise UserError(
                f"{url}: three windows of {window} shards take {needed / 2**30:.2g} GiB, the cache may hold {cache_gb:g}; "
                "raise cache_gb, or lower window"
            )
        if rank == 0 and (why := poor_in_classes(first, window)):
            note(f"{url}: {why}")

    @property
    def info(self) -> RunInfo:
        """Of the run directory."""
        return next(iter(self.datasets.values())).info

    @property
    def canvas(self) -> int:
        """Side of the stored images, in pixels."""
        return next(iter(self.datasets.values())).side

    @property
    def views(self) -> int:
        """Views of an image that have soft labels of their own. 1: the whole image, as stored."""
        for dataset in self.datasets.values():
            if (views := dataset.read(0).views) is not None:
                return len(views)
        return 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_plans": {}
        }  # a loader worker that is not forked plans anew: faster than being sent a plan

    def check(self, *, content: bool = True) -> None:
        """Make sure that every tar is whole before the first step. Raises UserError naming the file.

        Every rank reads its share of them. Tars of a remote run are compared as they are fetched; here only their sizes are.
        """
        for dataset in self.datasets.values():
            dataset.check(content=content and dataset.cache is None, part=self.rank, parts=self.world)

    def span(self, stream: str, step: int) -> tuple[int, int]:
        """Where global batch ``step`` begins and ends in the planned order of a stream."""
        return cut(0, self.samples[stream], step, self.steps)

    def sizes(self, step: int) -> dict[str, int]:
        """Samples of each stream in global batch ``step``, those of all ranks."""
        spans = {stream: self.span(stream, step) for stream in self.datasets}
        return {stream: end - begin for stream, (begin, end) in spans.items()}

    def indices(self, stream: str, epoch: int, step: int) -> np.ndarray:
        """Which samples of a stream this rank reads in global batch ``step``."""
        begin, end = cut(*self.span(stream, step), self.rank, self.world)
        return self.plan(stream, epoch).order[begin:end]

    def plan(self, stream: str, epoch: int) -> EpochPlan:
        if self._plans.get(stream, (-1,))[0] != epoch:
            shards = self.datasets[stream].shards
            self._plans[stream] = (
                epoch,
                plan_epoch(shards, seed=self.seed, epoch=epoch, window=self.window, stream=stream),
            )
        return self._plans[stream][1]

    def batches(
        self, epoch: int, start: int = 0, *, workers: int = 0, transform: Transform | None = None, pin: bool = False
    ) -> Iterator[Batch]:
        """The batches of an epoch from global batch ``start`` on; the same whatever the number of workers.

        ``transform(images uint8 [1, 3, H, W], generator)`` runs in the workers, on one sample at a time, with a generator seeded by
        (seed, epoch, stream, key): what it makes of a sample does not depend on the batch, the workers or the ranks.
        pin: deliver batches in page-locked memory, for a GPU.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="This DataLoader will create"
            )  # more workers than cores, for each epoch anew
            loader: DataLoader[Any] = DataLoader(
                _EpochBatches(self, epoch, transform),
                sampler=range(start, self.steps),  # type: ignore[arg-type]
                batch_size=None,
                num_workers=workers,
                prefetch_factor=self.read_ahead(workers) // workers if workers else None,
                pin_memory=pin,
                worker_init_fn=ignore_sigterm_unless_from_parent,
                # It shares the plan; newer Pythons do otherwise
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            )
            with sigterm_blocked():
                batches = iter(loader)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def read_ahead(self, workers: int) -> int:
        """Batches that the loader keeps ready: four a worker, or fewer where these would fill the memory; at least one a worker."""
        side = self.side or self.canvas
        batch = 3 * side**2 * sum(self.samples.values()) // self.steps // self.world  # bytes
        return workers * min(4, max(1, READ_AHEAD // (batch * max(workers, 1))))


class _EpochBatches(Dataset[Any]):
    def __init__(self, reader: TrainingReader, epoch: int, transform: Transform | None) -> None:
        self.reader, self.epoch, self.transform = reader, epoch, transform
        self._near = dict.fromkeys(reader.datasets, -1)  # the last window that was asked for
        for stream in reader.datasets:
            reader.plan(stream, epoch)  # once here, not in every forked worker

    def __len__(self) -> int:
        return self.reader.steps

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            self._read_ahead(step)
            return {stream: self._half(stream, step) for stream in self.reader.datasets}
        except OSError as error:
            return UserError(f"{self.reader.datasets[next(iter(self.reader.datasets))].run}: cannot read: {error}")
        except UserError as error:
            return error  # raised in a worker it would reach the user wrapped in a stack trace

    def _read_ahead(self, step: int) -> None:
        """Ask for the tars of the window that this step is in, and of the next; each worker for its share."""
        worker = get_worker_info()
        share = slice(worker.id, None, worker.num_workers) if worker else slice(None)
        for stream, dataset in self.reader.datasets.items():
            plan = self.reader.plan(stream, self.epoch)
            last = plan.window_at(self.reader.span(stream, step)[0]) + 1
            first = max(self._near[stream] + 1, last - 1)
            wanted = [int(shard) for shards in plan.windows[first : last + 1] for shard in shards[share]]
            self._near[stream] = max(self._near[stream], last)
            if wanted:
                threading.Thread(target=_prefetch, args=(dataset, wanted), daemon=True).start()

    def _half(self, stream: str, step: int) -> StreamBatch:
        reader, dataset = self.reader, self.reader.datasets[stream]
        keys, labels, logits = [], [], []
        images, room = torch.empty(0), np.empty((0, 0, 0, 0), np.uint8)
        indices = reader.indices(stream, self.epoch, step).tolist()
        for place, index in enumerate(indices):
            sample = dataset.read(index)
            pixels, soft = dataset.pixels(index, sample), sample.logits
            if sample.views is not None:
                view = view_of_epoch(sample.key, reader.seed, self.epoch, len(sample.views))
                pixels, soft = replay(pixels, sample.views[view], sample.where), soft[view]
            if self.transform is not None:
                generator = seeded_generator(reader.seed, self.epoch, stream, sample.key)
                image = self.transform(torch.from_numpy(pixels).permute(2, 0, 1)[None], generator)
                pixels = image[0].permute(1, 2, 0).numpy()
            if place == 0:
                images = _empty_batch(len(indices), *pixels.shape)
                room = images.numpy()
            if pixels.shape != room.shape[1:]:
                raise UserError(
                    f"{sample.where}: image of {pixels.shape[1]} x {pixels.shape[0]} pixels among others of {room.shape[2]}"
                )
            room[place] = pixels
            keys.append(sample.key)
            labels.append(sample.label)
            logits.append(soft)
        # Pixels stay in the order they were decoded in: channels_last.
        return StreamBatch(
            keys=keys,
            images=images.permute(0, 3, 1, 2),
            labels=torch.tensor(labels),
            logits=torch.from_numpy(np.stack(logits)),
        )


def _too_few(stream: str, samples: int, steps: int, first: int, world: int) -> str:
    """What to do about a stream that cannot give every rank a sample in every batch. first: samples of the stream that sets the steps."""
    if samples == 0:
        return f"no {stream} samples at all; weaken the attack, or train without them"
    if samples < world:
        return f"only {samples} {stream} samples for {world} processes; start fewer, or weaken the attack"
    enough = -(-first * world // samples)
    return f"only {samples} {stream} samples for {steps} batches an epoch; raise batch to {enough} or more, or weaken the attack"


def poor_in_classes(dataset: ShardDataset, window: int) -> str | None:
    """What to say of batches that hold far fewer classes than shuffled samples would, as those of a source sorted by class do."""
    found, expected = classes_in_windows(dataset.shards, dataset.labels, window=window)
    if 2 * found >= expected:
        return None
    enough = 2 * window
    while 2 * classes_in_windows(dataset.shards, dataset.labels, window=enough)[0] < expected:
        enough *= 2
    return (
        f"a window of {window} shards, from which batches are drawn, holds {found:.0f} classes where {expected:.0f} were to be expected: "
        f"the source seems sorted by class; raise window to {enough}, or make the shards from a shuffled source"
    )


def _empty_batch(*shape: int) -> torch.Tensor:
    """uint8, in a loader worker in shared memory: what is sent to the trainer is then not copied again."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]


def _prefetch(dataset: ShardDataset, shards: list[int]) -> None:
    try:
        dataset.prefetch(shards)
    except (UserError, OSError):
        return  # whoever reads the sample meets the same error, and names it


def _three_windows(dataset: ShardDataset, window: int) -> int:
    """Bytes that three windows of the largest tars take: what a slow worker still reads, what follows, and what a fast one asks for."""
    sizes = sorted((tar.size for tar in dataset.index.tars.values()), reverse=True)
    return sum(sizes[: 3 * window])
