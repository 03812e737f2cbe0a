"""Partners: beside each adversarial sample the teacher's soft label on the clean image that it was made from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests import RunDir, RunInfo, UserError
from manifests.recipe import fingerprint

from ..dataset import ShardDataset, StoredSample
from ..index import kept_table

VERSION = 1  # of the files in the cache folder


class Partners:
    """The clean sample of each DAD sample.

    dad, clean: the two streams of one run. Raises UserError naming run and key of a DAD sample without a clean one.
    """

    def __init__(self, dad: ShardDataset, clean: ShardDataset) -> None:
        self.dad, self.clean = dad, clean
        name = fingerprint(["partners", dad.index.name, clean.index.name, VERSION])
        table = kept_table(name, lambda: pa.table({"clean": partner_rows(dad.run, dad.info)}))
        self.rows = table.column("clean").chunk(0).to_numpy(zero_copy_only=True)  # int32 [dad samples], memory-mapped

    def __reduce__(self) -> tuple[Any, ...]:
        return Partners, (self.dad, self.clean)  # a loader worker that is not forked maps the rows itself

    def logits(self, index: int, sample: StoredSample) -> np.ndarray:
        """The teacher's logits on the clean image of DAD sample ``index``: [classes], or [views, classes].

        Reads one sample without decoding its image. Raises UserError as `ShardDataset.read` does, and when the clean
        sample has another key or other views.
        """
        clean = self.clean.read(int(self.rows[index]))
        if clean.key != sample.key:
            raise UserError(f"{sample.where}: {clean.where} stands in its clean sample's place; make the run anew")
        boxes = [None if views is None else views.tolist() for views in (clean.views, sample.views)]
        if boxes[0] != boxes[1]:
            raise UserError(f"{sample.where}: its views are not those of {clean.where}; make the run anew")
        return clean.logits


def partner_rows(run: RunDir, info: RunInfo) -> np.ndarray:
    """Place in the clean stream of each DAD sample's clean sample, int32 [dad samples].

    A row of the manifest is one source sample, so the row joins the two.
    Raises UserError naming run and key of a DAD sample without a clean one.
    """
    table, _ = run.manifest(["key", "clean_offset", "dad_offset"], info)
    clean, dad = (pc.is_valid(table.column(f"{stream}_offset")).to_numpy() for stream in ("clean", "dad"))
    if (alone := np.flatnonzero(dad & ~clean)).size:
        key = table.column("key")[int(alone[0])].as_py()
        mend = "make the run anew, or choose a method without partners"
        raise UserError(f"{run}: {key} has a dad sample and no clean sample; {mend}")
    return (np.cumsum(clean, dtype=np.int32) - 1)[dad]
