"""One stream of a run directory as a random-access dataset. Every read is checked against the manifest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from manifests import RunDir, Unreachable, UserError
from manifests.rows import TarRecord
from manifests.rundir import RUN

from .cache import TarCache
from .codec import EXTENSIONS, decode_image, decode_pixels
from .index import open_index
from .own_images import OwnImages
from .tar import Extent, parse_sample
from .views import read_soft_labels

StreamName = Literal["clean", "dad"]


@dataclass(frozen=True)
class LabelledImage:
    """One sample of a shard."""

    key: str
    label: int  # index into the run's class list
    logits: torch.Tensor  # float16 [classes], the teacher's, before softmax; [views, classes] if the run stores views
    image: torch.Tensor | None  # uint8 [3, H, W]; None if the run stores labels only
    views: np.ndarray | None = None  # VIEW records [views]; None for the whole image


@dataclass(frozen=True)
class StoredSample:
    """A sample whose labels are decoded and whose image is not."""

    key: str
    label: int
    logits: np.ndarray
    views: np.ndarray | None
    image: bytes | None
    where: str  # tar and key, for messages


class ShardDataset:
    """The samples of one stream of a sealed run: ``dataset[i]`` is a `LabelledImage`, in the order of the source.

    >>> dataset = ShardDataset("data/demo", "dad")
    >>> len(dataset), dataset.classes[dataset[0].label]

    stream: "clean" (every readable source image) or "dad" (verified adversarial ones).
    images: for runs that store labels only, the user's own images (`OwnImages`), local or at a URL, joined by key.
    temperature: at which a student will use the logits, if the run stores the top k only. None: the first one stored.
    cache: holds remote tars on the local disk; without it, every sample is one ranged read.
    Raises UserError for a run that is missing or not sealed, and for ``images`` that it does not need or cannot find.
    """

    def __init__(
        self,
        url: str,
        stream: StreamName = "dad",
        *,
        images: str | Path | None = None,
        temperature: float | None = None,
        cache: TarCache | None = None,
    ) -> None:
        self._remake: Callable[[], ShardDataset] = partial(
            ShardDataset, url, stream, images=images, temperature=temperature, cache=cache
        )
        self.run = RunDir(url)
        self.info = self.run.info()
        self.classes, self.side = self.info.classes, self._canvas()
        self.stream, self.temperature, self.cache = stream, temperature, cache
        self.index = open_index(self.run, self.info, stream)
        self.shards, self.labels = self.index.shard, self.index.label
        self.images = None if images is None else self._own(images)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._remake, ()  # a loader worker that is not forked maps the index itself and receives no copy

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> str:
        key: str = self.index.keys[index].as_py()
        return key

    def __getitem__(self, index: int) -> LabelledImage:
        """Read one sample. Raises UserError naming the tar if it is missing or its bytes are not what was written."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        stored = self.read(index)
        if self.images is not None:
            image: torch.Tensor | None = torch.from_numpy(self.pixels(index, stored)).permute(2, 0, 1).contiguous()
        else:
            image = None if stored.image is None else decode_image(stored.image, stored.where)
        return LabelledImage(stored.key, stored.label, torch.from_numpy(stored.logits), image, stored.views)

    def read(self, index: int) -> StoredSample:
        """One sample without decoding its image. Raises UserError as ``dataset[index]`` does."""
        tar = self._tar(int(self.shards[index]))
        where = self.run.store.where(tar.name)
        entry = self.index
        extent = Extent(int(entry.offset[index]), int(entry.size[index]), int(entry.crc32[index]))
        data = self._bytes(tar, extent)
        try:
            sample = parse_sample(data, extent, where)
        except UserError:
            if self.cache is None:
                raise
            cached = self.cache.drop(tar)  # the tar was whole when it arrived, so the local disk has damaged it
            sample = parse_sample(self._bytes(tar, extent), extent, f"{cached} (of {where})")
        where = f"{where}: {sample.key}"
        label = sample.members.get("cls")
        if label is None:
            raise UserError(f"{where}: has no .cls")
        if not re.fullmatch(rb"[0-9]{1,9}", label) or int(label) >= len(self.classes):
            raise UserError(f"{where}: label {label[:20]!r} is not one of the {len(self.classes)} classes")
        logits, views = read_soft_labels(sample.members, len(self.classes), self.temperature, where)
        image = sample.first(EXTENSIONS)
        return StoredSample(sample.key, int(label), logits, views, image, where)

    def _bytes(self, tar: TarRecord, extent: Extent) -> bytes:
        try:
            if self.cache is None:
                return self.run.store.read_range(tar.name, extent.offset, extent.size)
            return self.cache.read_range(self.run.store, tar, extent.offset, extent.size)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.run.store.where(tar.name)}: missing; restore it, or run `make shards` again"
            ) from error

    def pixels(self, index: int, stored: StoredSample) -> np.ndarray:
        """The image of a sample, uint8 [H, W, 3]: as stored, or the user's own of the same key. Raises UserError."""
        if stored.image is not None:
            return decode_pixels(stored.image, stored.where)
        if self.images is not None:
            return self.images.pixels(index, self.side)
        raise UserError(
            f"{self.run}: its {self.stream} shards hold labels only, without images; name the folder or URL of your "
            "own (images), or make them anew with output.clean_images=true"
        )

    def _canvas(self) -> int:
        side = self.info.recipe.get("canvas")
        if type(side) is not int or side < 1:
            why = f"recipe.canvas: {side!r} is not a number of pixels"
            raise UserError(f"{self.run.store.where(RUN)}: {why}; restore it or make the run anew")
        return side

    def _own(self, images: str | Path) -> OwnImages:
        if len(self) and self.read(0).image is not None:
            raise UserError(f"images: the {self.stream} shards of {self.run} hold images themselves; leave images out")
        if self.info.identity.get("source.keys") == "place":
            why = "its keys are places in its source (source.keys=place), by which no image can be found"
            raise UserError(
                f"images: {self.run}: {why}; make it anew with source.keys=name, or with output.clean_images=true"
            )
        return OwnImages(images, self.index.keys, self.index.name)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch the tars of shards into the cache; read local tars ahead. Raises UserError as reading does."""
        for shard in shards:
            tar = self._tar(shard)
            if self.cache is not None:
                self.cache.fetch(self.run.store, tar)
            else:
                self.run.store.advise(tar.name)

    def check(self, *, content: bool = True, progress: bool = True, part: int = 0, parts: int = 1) -> None:
        """Make sure that every tar of the stream is what the manifest describes. part, parts: check every parts-th tar.

        Raises UserError naming the first tar that is not.
        """
        tars = list(self.index.tars.values())[part::parts]
        sizes = {} if content else self._sizes()
        label = f"checking {self.stream} shards"
        total = sum(tar.size for tar in tars)
        with tqdm(
            total=total, desc=label, unit="B", unit_scale=True, disable=None if progress else True, leave=False
        ) as bar:
            for tar in tars:
                if sizes.get(tar.name) != tar.size and (why := self.run.tar_damage(tar, content=content)):
                    every = f"`python -m pipeline verify {self.run}` for the whole list"
                    raise UserError(f"{why}; run `make shards` again to repair it, or {every}")
                bar.update(tar.size)

    def _sizes(self) -> dict[str, int]:
        """Bytes of the stream's tars, from one listing; empty if the store forbids listing."""
        try:
            return {f"{self.stream}/{name}": size for name, size in self.run.store.sizes(self.stream).items()}
        except Unreachable:
            return {}

    def _tar(self, shard: int) -> TarRecord:
        if shard not in self.index.tars:
            raise UserError(f"{self.run}: its manifest names no {self.stream} tar for shard {shard}; make the run anew")
        return self.index.tars[shard]
