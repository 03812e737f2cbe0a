"""Runs that store labels only: the images come from the user's own WebDataset tars, joined by key.

The tars are scanned once; where each image lies is kept in the cache folder as a memory-mapped file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from manifests import UserError
from manifests.recipe import fingerprint

from .canvas import IMAGE_EXTENSIONS, BadImage, load_canvas
from .index import kept_table
from .tar import Sample, clean_key, index_tar, iterate_tar


class OwnImages:
    """The images of a stream, in its order, wherever they lie in a folder of tars.

    Raises UserError for a folder without tars, or one that lacks a key of the stream or holds it twice.
    """

    def __init__(self, folder: str | Path, keys: pa.StringArray, stream: str) -> None:
        """``stream``: fingerprint of the keys."""
        self.tars = sorted(Path(folder).expanduser().glob("*.tar"))
        if not self.tars:
            keyed = "a local folder of WebDataset tars (*.tar) whose keys are the names of the images that the run was made from"
            raise UserError(f"images: {folder}: holds no tars; give {keyed}")
        found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.tars]
        table = kept_table(fingerprint([str(folder), found, stream]), lambda: _join(self.tars, keys, folder))
        self._keys = keys
        self._tar, self._offset = (
            table.column(name).chunk(0).to_numpy(zero_copy_only=True) for name in ("tar", "offset")
        )

    def pixels(self, index: int, side: int) -> np.ndarray:
        """The canvas of a sample, uint8 [side, side, 3], as stage 1 made it. Raises UserError naming tar and key."""
        path, key = self.tars[int(self._tar[index])], self._keys[index].as_py()
        with open(path, "rb") as file:
            _, sample = next(iterate_tar(file, str(path), int(self._offset[index])), (0, Sample("")))
        if clean_key(sample.key) != key:
            raise UserError(
                f"{path}: {key} is no longer where it was; the tar was changed while it is read: start again"
            )
        data = sample.first(IMAGE_EXTENSIONS)
        if data is None:
            raise UserError(f"{path}: {sample.key}: no image among the members ({', '.join(sample.members)})")
        try:
            return load_canvas(data, side).permute(1, 2, 0).contiguous().numpy()
        except BadImage as error:
            raise UserError(f"{path}: {sample.key}: {error}") from error


def _join(tars: list[Path], keys: pa.StringArray, folder: str | Path) -> pa.Table:
    """Where each key lies: columns tar (number in the sorted list) and offset (of its first header)."""
    wanted = keys.to_pylist()
    of_the_run = frozenset(wanted)
    if repeated := len(wanted) - len(of_the_run):
        why = f"{repeated} samples of the run have the key of another, and no telling which image is whose"
        raise UserError(f"images: {why}; make it anew with output.clean_images=true")
    place: dict[str, tuple[int, int]] = {}
    for number, path in enumerate(
        tqdm(tars, desc="reading tar headers", unit="tar", disable=None if len(tars) > 20 else True, leave=False)
    ):
        with open(path, "rb") as file:
            for offset, sample in index_tar(file, str(path)):
                if (key := clean_key(sample.key)) in place:
                    both = f"{tars[place[key][0]]} and again in {path}"
                    raise UserError(f"images: {key} is in {both}; name a folder that holds the images of the run alone")
                if key in of_the_run:
                    place[key] = (number, offset)
    if missing := [key for key in wanted if key not in place]:
        raise UserError(
            f"images: {folder}: {len(missing)} of {len(wanted)} images of the run are not here, the first is {missing[0]}"
        )
    columns = np.array([place[key] for key in wanted], np.int64).reshape(-1, 2)
    return pa.table({"tar": columns[:, 0], "offset": columns[:, 1]})
