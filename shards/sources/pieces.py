"""What a source is and how it is cut: the one place that tells folders, tars and Parquet files apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from manifests import Store, UserError

from .classes import ClassList
from .files import PIPE, common_extension, expand, file_name, list_files
from .folder import plan_folder
from .parquet import plan_parquet
from .sample import KeyRule, Piece, SourceSample
from .tars import plan_tars

EXPECTED = "expected WebDataset tars (*.tar), Parquet files (*.parquet), or one sub-folder of images per class"


@dataclass(frozen=True)
class SourcePlan:
    """The pieces of a source, in order."""

    kind: str  # "ImageFolder", "WebDataset" or "Parquet"
    pieces: Sequence[Piece]
    samples: int
    exact: bool  # False: counts are estimated from the sizes of the tars
    fingerprint: str  # of the source's names, and labels or sizes

    def first_samples(self, classes: ClassList, count: int) -> list[SourceSample]:
        """The first ``count`` samples, over as many pieces as it takes."""
        samples = itertools.chain.from_iterable(piece.samples(classes) for piece in self.pieces)
        return list(itertools.islice(samples, count))


def plan_source(data: str, classes: ClassList, shard_size: int, keys: KeyRule = "name") -> SourcePlan:
    """Find what a source holds.

    data: a folder (local or URL) of tars, of Parquet files or of class folders; or tars or Parquet files as a list with braces and
    ``::``; or ``pipe:COMMAND`` for each tar. keys: `recipe.Source.keys`.
    Raises UserError for a missing or empty source, one of several kinds, an unknown class folder, or a key that occurs twice.
    """
    urls = expand(data)
    kind = common_extension(urls)
    if kind is None and len(urls) > 1:
        raise UserError(
            f"source.data: {data}: a list must name tars or Parquet files, all of one kind; it has {urls[0]} and {urls[-1]}"
        )
    if kind is None:
        root = urls[0]
        if not Store(root).exists():
            raise UserError(
                f"source.data: {root}: no such file or folder; set DATA=FOLDER (or --set source.data=FOLDER)"
            )
        kind, urls = _look_into(root, classes)
    if (kind == "tar" and keys == "place") or kind == "parquet":  # whose rows may be without names
        _refuse_namesakes(urls)
    if kind == "tar":
        pieces, exact, fingerprint = plan_tars(urls, shard_size, keys)
        samples = sum(piece.count for piece in pieces)
    elif kind == "parquet":
        pieces, exact, fingerprint = plan_parquet(urls, classes, shard_size, keys)
        samples = sum(piece.count for piece in pieces)
    else:
        pieces, samples, fingerprint = plan_folder(urls[0], classes, shard_size)
        exact = True
    if not samples:
        raise UserError(f"source.data: {data}: holds no images; {EXPECTED}")
    return SourcePlan(
        {"tar": "WebDataset", "parquet": "Parquet", None: "ImageFolder"}[kind], pieces, samples, exact, fingerprint
    )


def _look_into(root: str, classes: ClassList) -> tuple[str | None, list[str]]:
    """(kind, files) of a folder; (None, [root]) for one of class folders, or of nothing. Raises UserError for several kinds at once."""
    files = {kind: found for kind in ("tar", "parquet") if (found := list_files(root, kind))}
    kinds = [f"*.{kind} files ({file_name(found[0])} …)" for kind, found in files.items()]
    if files and (folders := sorted(set(Store(root).folders("")) & set(classes.folders))):
        kinds.append(f"class folders ({folders[0]} …)")
    if len(kinds) > 1:
        raise UserError(
            f"source.data: {root}: holds {' and '.join(kinds)}, and nothing says which are meant; move the others elsewhere, or name "
            "the files: a list with braces such as train-{000..127}.tar, joined by ::"
        )
    return next(iter(files.items()), (None, [root]))


def _refuse_namesakes(urls: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for url in urls:
        if not url.startswith(PIPE) and (other := seen.setdefault(file_name(url), url)) is not url:
            raise UserError(f"source.data: {other} and {url} have the same name, from which keys are made; rename one")
