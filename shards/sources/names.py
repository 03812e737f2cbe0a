"""What the names of a source's files tell: compressed tars, and files of several splits, which are refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from manifests import UserError

from .files import file_name

COMPRESSED = {
    ".tar.gz": "gunzip -c",
    ".tgz": "gunzip -c",
    ".tar.bz2": "bzcat",
    ".tar.xz": "xzcat",
    ".tar.zst": "zstdcat",
}
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
SPLIT = re.compile(rf"(?:^|[^A-Za-z])({'|'.join(SPLITS)})(?![A-Za-z])", re.IGNORECASE)


def refuse_compressed(urls: Sequence[str]) -> None:
    """Raises UserError for a compressed tar: nothing in it can be found by its offset."""
    for url in urls:
        if unpack := next((tool for ending, tool in COMPRESSED.items() if url.lower().endswith(ending)), None):
            raise UserError(
                f"{url}: a compressed tar; unpack it, or give --data 'pipe:{unpack} {url}' on the command line"
            )


def refuse_mixed_splits(root: str, files: Sequence[str]) -> None:
    """Raises UserError for files of several splits in a folder, such as train-… and validation-…."""
    splits: dict[str, list[str]] = {}
    for name in map(file_name, files):
        if found := SPLIT.search(name):
            splits.setdefault(SPLITS[found[1].lower()], []).append(name)
    if len(splits) > 1:
        told = " and ".join(f"{split} ({names[0]})" for split, names in splits.items())
        patterns = " or ".join(f"{root.rstrip('/')}/{as_pattern(names)}" for names in splits.values())
        raise UserError(f"{root}: holds files of {told}, and nothing says which are meant; name them: {patterns}")


def as_pattern(names: Sequence[str]) -> str:
    """Names as one, with braces for a number that counts up: ``train-{00000..00003}-of-4.parquet``.

    Braces hold a list of names that do not count up.
    """
    first = names[0]
    if len(names) == 1:
        return first
    start = _common(names)
    end = _common([name[len(start) :][::-1] for name in names])[::-1]
    start, end = start.rstrip("0123456789"), end.lstrip("0123456789")
    middles = [name[len(start) : len(name) - len(end)] for name in names]
    if all(middle.isdecimal() for middle in middles):
        numbers = [int(middle) for middle in middles]
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len({*map(len, middles)}) == 1:
            return f"{start}{{{middles[0]}..{middles[-1]}}}{end}"
    return f"{start}{{{','.join(middles)}}}{end}"


def _common(names: Sequence[str]) -> str:
    """The letters that all names begin with."""
    columns = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in columns)
