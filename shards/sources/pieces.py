"""What a source is and how it is cut: the one place that tells folders, tars and Parquet files apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manifests import Store, UserError

from .classes import ClassList
from .files import PIPE, NoSuchFile, common_extension, expand, file_name, list_files
from .folder import cut_folder
from .names import refuse_compressed, refuse_mixed_splits
from .parquet import cut_parquet
from .sample import KeyRule, Piece, SourceSample
from .tars import cut_tars

Kind = Literal["ImageFolder", "WebDataset", "Parquet"]
EXPECTED = "expected WebDataset tars (*.tar), Parquet files (*.parquet), or one sub-folder of images per class"


@dataclass(frozen=True)
class ImageSource:
    """The pieces of a source, in order."""

    kind: Kind
    pieces: Sequence[Piece]
    samples: int
    exact: bool  # False: counts are estimated from the sizes of the tars
    fingerprint: str  # of the source's names, and labels or sizes

    def first_samples(self, classes: ClassList, count: int) -> list[SourceSample]:
        """The first ``count`` samples, over as many pieces as it takes."""
        samples = itertools.chain.from_iterable(piece.samples(classes) for piece in self.pieces)
        return list(itertools.islice(samples, count))


def find_source(data: str, classes: ClassList, shard_size: int, keys: KeyRule = "name") -> ImageSource:
    """Cut a source into pieces that become shards.

    data: as in `find_layout`, or ``pipe:COMMAND`` for each tar. keys: `recipe.Source.keys`.
    Raises UserError for a missing or empty source, one of several kinds, an unknown class folder, or a repeated key.
    """
    kind, urls = find_layout(data, classes.folders)
    if (kind == "WebDataset" and keys == "place") or kind == "Parquet":  # rows may be without names
        refuse_namesakes(urls)
    if kind == "WebDataset":
        pieces, exact, fingerprint = cut_tars(urls, shard_size, keys)
        samples = sum(piece.count for piece in pieces)
    elif kind == "Parquet":
        pieces, exact, fingerprint = cut_parquet(urls, classes, shard_size, keys)
        samples = sum(piece.count for piece in pieces)
    else:
        pieces, samples, fingerprint = cut_folder(urls[0], classes, shard_size)
        exact = True
    if not samples:
        raise UserError(f"{data}: holds no images; {EXPECTED}")
    return ImageSource(kind, pieces, samples, exact, fingerprint)


def find_layout(data: str, folders: Sequence[str] = ()) -> tuple[Kind, list[str]]:
    """What ``data`` is, and its tars or Parquet files, or the one folder whose sub-folders are classes.

    data: a folder (local or URL) of tars, of Parquet files or of class folders; or tars or Parquet files as a list with
    braces and ``::``. folders: names of class folders, which must not lie beside tars or Parquet files.
    Raises UserError for a list or a folder of several kinds, and NoSuchFile for a folder that is not there.
    """
    urls = expand(data)
    found = common_extension(urls)
    if found is None and len(urls) > 1:
        raise UserError(
            f"{data}: a list must name tars or Parquet files, all of one kind; it has {urls[0]} and {urls[-1]}"
        )
    if found is None:
        refuse_compressed(urls[:1])
        found, urls = _look_into(urls[0], folders)
    kinds: dict[str | None, Kind] = {"tar": "WebDataset", "parquet": "Parquet", None: "ImageFolder"}
    return kinds[found], urls


def _look_into(root: str, folders: Sequence[str]) -> tuple[str | None, list[str]]:
    """(extension, files) of a folder; (None, [root]) for one without tars and Parquet files."""
    store = Store(root)
    if not store.exists():
        raise NoSuchFile(f"{root}: no such file or folder")
    if store.is_local and not Path(store.root).is_dir():
        raise UserError(f"{root}: is a file, and no tar or Parquet file; {EXPECTED}")
    refuse_compressed([store.where(name) for name in store.names("")])
    files = {kind: found for kind in ("tar", "parquet") if (found := list_files(root, kind))}
    kinds = [f"*.{kind} files ({file_name(found[0])} …)" for kind, found in files.items()]
    if files and (classes := sorted(set(Store(root).folders("")) & set(folders))):
        kinds.append(f"class folders ({classes[0]} …)")
    if len(kinds) > 1:
        raise UserError(
            f"{root}: holds {' and '.join(kinds)}, and nothing says which are meant; move the others elsewhere, "
            "or name the files: a list with braces such as train-{000..127}.tar, joined by ::"
        )
    for found in files.values():
        refuse_mixed_splits(root, found)
    return next(iter(files.items()), (None, [root]))


def refuse_namesakes(urls: Sequence[str]) -> None:
    """Raises UserError when two files have the same name, from which keys are made."""
    seen: dict[str, str] = {}
    for url in urls:
        if not url.startswith(PIPE) and (other := seen.setdefault(file_name(url), url)) is not url:
            raise UserError(f"{other} and {url} have the same name, from which keys are made; rename one")
