"""One stream of a run directory as a random-access dataset: every read is checked against the manifest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from manifests import RunDir, UserError
from manifests.rows import TarRecord

from .codec import EXTENSIONS, decode_array, decode_image
from .tar import Extent, parse_sample

StreamName = Literal["clean", "dad"]


@dataclass(frozen=True)
class LabelledImage:
    """One sample of a shard."""

    key: str
    label: int  # index into the run's class list
    logits: torch.Tensor  # float16 [classes], the teacher's, before any softmax
    image: torch.Tensor | None  # uint8 [3, H, W]; None where the run stores labels only


class ShardDataset:
    """The samples of one stream of a sealed run: ``dataset[i]`` is a `LabelledImage`, in the order of the source.

    >>> dataset = ShardDataset("data/demo", "dad")
    >>> len(dataset), dataset.classes[dataset[0].label]

    stream: "clean" (every readable source image) or "dad" (verified adversarial ones).
    Raises UserError for a run that is missing or not sealed.
    """

    def __init__(self, url: str, stream: StreamName = "dad") -> None:
        self.run = RunDir(url)
        self.info = self.run.info()
        self.classes = self.info.classes
        self.stream = stream
        table, tars = self.run.manifest()
        table = table.filter(pc.is_valid(table.column(f"{stream}_offset")))
        columns = {name: table.column(name).to_numpy() for name in ("shard", "label")}
        self.shards: np.ndarray = columns["shard"]
        self.labels: np.ndarray = columns["label"]
        self._extents = [table.column(f"{stream}_{name}").to_numpy() for name in ("offset", "size", "crc32")]
        self._keys = table.column("key").combine_chunks()
        self._tars = {int(tar.name.rsplit("-", 1)[1].removesuffix(".tar")): tar for tar in tars if tar.name.startswith(f"{stream}/")}

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, index: int) -> str:
        key: str = self._keys[index].as_py()
        return key

    def __getitem__(self, index: int) -> LabelledImage:
        """Read one sample. Raises UserError naming the tar when it is missing or its bytes are not those that were written."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        tar = self._tars[int(self.shards[index])]
        where = self.run.store.where(tar.name)
        extent = Extent(*(int(column[index]) for column in self._extents))
        try:
            data = self.run.store.read_range(tar.name, extent.offset, extent.size)
        except FileNotFoundError as error:
            raise UserError(f"{where}: missing; restore it, or run `make shards` again") from error
        sample = parse_sample(data, extent, where)
        where = f"{where}: {sample.key}"
        if "cls" not in sample.members or "logits.npy" not in sample.members:
            raise UserError(f"{where}: has no .cls or no .logits.npy")
        if not re.fullmatch(rb"[0-9]{1,9}", sample.members["cls"]) or int(sample.members["cls"]) >= len(self.classes):
            raise UserError(f"{where}: label {sample.members['cls'][:20]!r} is not one of the {len(self.classes)} classes")
        logits = decode_array(sample.members["logits.npy"], np.float16, where)
        if logits.shape != (len(self.classes),):
            raise UserError(f"{where}: logits of shape {logits.shape} for {len(self.classes)} classes")
        pixels = next((sample.members[extension] for extension in EXTENSIONS if extension in sample.members), None)
        return LabelledImage(
            key=sample.key,
            label=int(sample.members["cls"]),
            logits=torch.from_numpy(logits),
            image=None if pixels is None else decode_image(pixels, where),
        )

    def check(self, *, content: bool = True, progress: bool = True) -> None:
        """Make sure that every tar of the stream is the one the manifest describes. Raises UserError naming the first that is not."""
        check_tars(self.run, list(self._tars.values()), content=content, progress=progress, label=f"checking {self.stream} shards")


def check_tars(run: RunDir, tars: list[TarRecord], *, content: bool, progress: bool, label: str) -> None:
    """Compare tars with their records: size, and sha256 if ``content``. Raises UserError naming the first that differs."""
    total = sum(tar.size for tar in tars)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None if progress else True, leave=False) as bar:
        for tar in tars:
            if why := run.tar_damage(tar, content=content):
                raise UserError(f"{why}; run `make shards` again to repair it, or `python -m pipeline verify {run}` for the whole list")
            bar.update(tar.size)
