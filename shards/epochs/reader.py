"""Batches for training: the streams of a run read side by side, in the planned order, by any number of loader workers.

The state of the reader is two integers, epoch and global batches consumed: `TrainingReader.batches` starts anywhere.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from manifests import RunInfo, Store, UserError
from manifests.signals import ignore_sigterm_unless_from_parent, sigterm_blocked

from ..cache import TarCache
from ..dataset import ShardDataset, StreamName
from ..seeds import seeded_generator
from ..views import replay, view_of_epoch
from .batches import Batch, BatchBuilder, StreamBatch, Transform
from .fit import bytes_at_a_time, poor_in_classes, too_few
from .partners import Partners
from .plan import EpochPlan, cut, plan_epoch

READ_AHEAD = 4 * 2**30  # bytes of images that the loader of a rank keeps ready, in shared memory


class TrainingReader:
    """Reads the streams of a run so that they end together.

    batch_size: clean images of one global batch. Every other stream adds its proportional share; shares differ by at
        most one image.
    images, temperature: as for `ShardDataset`; the images are those of the clean stream.
    cache_gb: disk space that remote tars may take on this machine, in GiB.
    side: pixels of the images that a transform makes; the reader estimates memory by it. None: as stored.
    partners: deliver, beside each DAD sample, the teacher's logits on its clean image. Both images of a pair are
        augmented alike.
    copies: independently augmented copies of each clean image.
    Raises UserError when a stream has too few samples for one batch, when the cache cannot hold what workers read at
    one time, or when a DAD sample lacks its partner.
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
        partners: bool = False,
        copies: int = 1,
    ) -> None:
        if copies < 1 or (copies > 1 and "clean" not in streams) or (partners and "dad" not in streams):
            raise ValueError(f"{copies} copies and partners={partners} of the streams {', '.join(streams)}")
        cache = None if Store(url).is_local else TarCache(int(cache_gb * 2**30))

        def dataset(stream: StreamName) -> ShardDataset:
            own = images if stream == "clean" else None
            return ShardDataset(url, stream, images=own, temperature=temperature, cache=cache)

        self.datasets: dict[str, ShardDataset] = {stream: dataset(stream) for stream in streams}
        self.url, self.batch_size, self.seed, self.window = url, batch_size, seed, window
        self.rank, self.world, self.side, self.copies = rank, world, side, copies
        first = self.datasets[streams[0]]
        self.classes = first.classes
        self.steps = len(first) // batch_size
        if self.steps == 0:
            many = f"{len(first)} {streams[0]} samples are"
            raise UserError(f"{url}: {many} fewer than one batch of {batch_size}; lower batch")
        # Samples per stream and epoch. The first stream drops its incomplete last batch (other samples every epoch).
        self.samples = {stream: len(dataset) for stream, dataset in self.datasets.items()}
        self.samples[streams[0]] = self.steps * batch_size
        self._plans: dict[str, tuple[int, EpochPlan]] = {}
        if batch_size < world:
            few = f"a batch of {batch_size} leaves some of {world} processes without a sample"
            raise UserError(f"{url}: {few}; raise batch, or start fewer")
        for stream in streams:
            if (samples := len(self.datasets[stream])) < self.steps * world:
                raise UserError(f"{url}: {too_few(stream, samples, self.steps, len(first), world)}")
        self.partners: Partners | None = None
        if partners:
            clean = self.datasets["clean"] if "clean" in self.datasets else dataset("clean")
            self.partners = Partners(self.datasets["dad"], clean)
        if cache is not None and (needed := self._bytes_at_a_time()) > cache.limit:
            takes = f"three windows of {window} shards take {needed / 2**30:.2g} GiB, the cache may hold {cache_gb:g}"
            raise UserError(f"{url}: {takes}; raise cache_gb, or lower window")

    @property
    def info(self) -> RunInfo:
        """The run's ``run.json``."""
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
        # a loader worker that is not forked makes the plan itself; sending it would take longer
        return self.__dict__ | {"_plans": {}}

    def notes(self) -> list[str]:
        """Notes for the user, one line each, as of batches that hold far fewer classes than shuffled samples would."""
        why = poor_in_classes(next(iter(self.datasets.values())), self.window)
        return [f"{self.url}: {why}"] if why else []

    def check(self, *, content: bool = True) -> None:
        """Make sure that every tar is whole before the first step. Raises UserError naming the file.

        Every rank checks its share. For a remote run only sizes are compared; content is compared after fetching a tar.
        """
        for dataset in self._all_datasets():
            dataset.check(content=content and dataset.cache is None, part=self.rank, parts=self.world)

    def span(self, stream: str, step: int) -> tuple[int, int]:
        """(begin, end) of global batch ``step`` in the planned order of a stream."""
        return cut(0, self.samples[stream], step, self.steps)

    def sizes(self, step: int) -> dict[str, int]:
        """Samples of each stream in global batch ``step``, all ranks together."""
        spans = {stream: self.span(stream, step) for stream in self.datasets}
        return {stream: end - begin for stream, (begin, end) in spans.items()}

    def indices(self, stream: str, epoch: int, step: int) -> np.ndarray:
        """Samples of a stream that this rank reads in global batch ``step``, int64 [its part of the batch]."""
        begin, end = cut(*self.span(stream, step), self.rank, self.world)
        return self.plan(stream, epoch).order[begin:end]

    def plan(self, stream: str, epoch: int) -> EpochPlan:
        """The order of a stream in an epoch. Only the latest plan of each stream stays in memory."""
        if self._plans.get(stream, (-1,))[0] != epoch:
            shards = self.datasets[stream].shards
            plan = plan_epoch(shards, seed=self.seed, epoch=epoch, window=self.window, stream=stream)
            self._plans[stream] = (epoch, plan)
        return self._plans[stream][1]

    def batches(
        self, epoch: int, start: int = 0, *, workers: int = 0, transform: Transform | None = None, pin: bool = False
    ) -> Iterator[Batch]:
        """The batches of an epoch from global batch ``start`` on; the same whatever the number of workers.

        ``transform(images uint8 [1, 3, H, W], generator)`` runs in the workers, on one copy of one sample at a time.
        Its generator is seeded by (seed, epoch, stream, key), so that batch, workers and ranks change nothing.
        Further copies add their number to the seed; with partners, the seed leaves the stream out.
        pin: deliver batches in page-locked memory, for a GPU.
        """
        with warnings.catch_warnings():
            # torch would warn of more workers than cores in every epoch
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader: DataLoader[Any] = DataLoader(
                _EpochBatches(self, epoch, transform),
                sampler=range(start, self.steps),  # type: ignore[arg-type]
                batch_size=None,
                num_workers=workers,
                prefetch_factor=self.read_ahead(workers) // workers if workers else None,
                pin_memory=pin,
                worker_init_fn=ignore_sigterm_unless_from_parent,
                # fork: workers share the plan's memory; Python 3.14 no longer forks by default
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            )
            with sigterm_blocked():
                batches = iter(loader)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def read_ahead(self, workers: int) -> int:
        """Batches that the loader keeps ready: four per worker, fewer if memory is short, at least one per worker."""
        side = self.side or self.canvas
        images = sum(samples * self.copies_of(stream) for stream, samples in self.samples.items())  # of an epoch
        batch = 3 * side**2 * images // self.steps // self.world  # bytes
        return workers * min(4, max(1, READ_AHEAD // max(batch * workers, 1)))

    def copies_of(self, stream: str) -> int:
        """Images that a batch holds of each sample of a stream."""
        return self.copies if stream == "clean" else 1

    def generator(self, epoch: int, stream: str, key: str, number: int) -> torch.Generator:
        """The generator for one copy of a sample. With partners, both images of a pair get the same numbers."""
        name = () if self.partners else (stream,)
        return seeded_generator(self.seed, epoch, *name, key, *((number,) if number else ()))

    def _all_datasets(self) -> list[ShardDataset]:
        beside = [] if self.partners is None or "clean" in self.datasets else [self.partners.clean]
        return [*self.datasets.values(), *beside]

    def _bytes_at_a_time(self) -> int:
        orders = dict.fromkeys(self.datasets, 1)
        if self.partners:
            orders["clean"] = orders.get("clean", 0) + 1  # partners are read in the DAD stream's order
        return sum(bytes_at_a_time(each, self.window, orders[each.stream]) for each in self._all_datasets())


class _EpochBatches(Dataset[Any]):
    def __init__(self, reader: TrainingReader, epoch: int, transform: Transform | None) -> None:
        self.reader, self.epoch, self.transform = reader, epoch, transform
        self._near = dict.fromkeys(reader.datasets, -1)  # last window whose tars this worker asked for
        for stream in reader.datasets:
            reader.plan(stream, epoch)  # here, once; forked workers share it

    def __len__(self) -> int:
        return self.reader.steps

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            self._read_ahead(step)
            return {stream: self._stream_batch(stream, step) for stream in self.reader.datasets}
        except OSError as error:
            return UserError(f"{self.reader.url}: cannot read: {error}")
        except UserError as error:
            return error  # torch would wrap an exception of a worker in a stack trace

    def _read_ahead(self, step: int) -> None:
        """Fetch the tars of this step's window and of the next, each worker its share."""
        worker = get_worker_info()
        share = slice(worker.id, None, worker.num_workers) if worker else slice(None)
        for stream, dataset in self.reader.datasets.items():
            plan = self.reader.plan(stream, self.epoch)
            last = plan.window_at(self.reader.span(stream, step)[0]) + 1
            first = max(self._near[stream] + 1, last - 1)
            wanted = [int(shard) for shards in plan.windows[first : last + 1] for shard in shards[share]]
            self._near[stream] = max(self._near[stream], last)
            partners = self._partners_of(stream)
            datasets = [dataset, partners.clean] if partners else [dataset]
            if wanted:
                threading.Thread(target=_prefetch, args=(datasets, wanted), daemon=True).start()

    def _stream_batch(self, stream: str, step: int) -> StreamBatch:
        reader, dataset, partners = self.reader, self.reader.datasets[stream], self._partners_of(stream)
        indices = reader.indices(stream, self.epoch, step).tolist()
        builder = BatchBuilder(len(indices), reader.copies_of(stream))
        for index in indices:
            sample = dataset.read(index)
            pixels, logits = dataset.pixels(index, sample), sample.logits
            partner = partners.logits(index, sample) if partners else None
            if sample.views is not None:
                view = view_of_epoch(sample.key, reader.seed, self.epoch, len(sample.views))
                pixels, logits = replay(pixels, sample.views[view], sample.where), logits[view]
                partner = None if partner is None else partner[view]
            images = [self._augment(pixels, stream, sample.key, number) for number in range(builder.copies)]
            builder.add(sample.key, sample.label, logits, images, partner, sample.where)
        return builder.batch()

    def _augment(self, pixels: np.ndarray, stream: str, key: str, number: int) -> np.ndarray:
        if self.transform is None:
            return pixels
        if number + 1 < self.reader.copies_of(stream):
            pixels = pixels.copy()  # a transform may work in place, and the next copy needs these pixels
        generator = self.reader.generator(self.epoch, stream, key, number)
        image = self.transform(torch.from_numpy(pixels).permute(2, 0, 1)[None], generator)
        return image[0].permute(1, 2, 0).numpy()

    def _partners_of(self, stream: str) -> Partners | None:
        return self.reader.partners if stream == "dad" else None


def _prefetch(datasets: list[ShardDataset], shards: list[int]) -> None:
    try:
        for shard in shards:
            for dataset in datasets:
                dataset.prefetch([shard])
    except (UserError, OSError):
        return  # reading the sample meets the same error, and reports it
