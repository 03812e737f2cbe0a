"""WebDataset tars as a source: local files, fsspec URLs, or the output of a command (``pipe:``)."""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

from tqdm import tqdm

from manifests import UserError
from shards.canvas import IMAGE_EXTENSIONS
from shards.tar import BLOCK, Sample, clean_key, index_tar, iterate_tar, split_name

from .classes import ClassList
from .files import PIPE, NoSuchFile, copy_into, file_name, file_size, is_local, open_file, store_of
from .sample import (
    EXACT,
    SCATTERED,
    SLACK,
    Fingerprint,
    KeyRule,
    Piece,
    Place,
    SourceSample,
    check_label,
    key_hashes,
    place_key,
    refuse_repeated,
)


@dataclass(frozen=True, kw_only=True)
class TarPiece:
    """The samples of one tar whose first header lies in a range of bytes."""

    url: str
    name: str
    count: int
    start: int = 0
    stop: int | None = None  # None: to the end
    first: int | None = 0  # number of the sample whose first header is at `start`; None: no sample begins just there
    keys: KeyRule = "name"

    @property
    def where(self) -> str:
        """The name in messages, which may end up in the record: without the command, which may hold tokens."""
        return _where(self.url, self.name)

    def samples(self, classes: ClassList, part: int = 0, parts: int = 1) -> Iterator[SourceSample]:
        return itertools.islice(self._samples(classes), part, None, parts)

    def called(self, number: int, key: str) -> str:
        return f"{file_name(self.url)}: sample {key}"

    def headers(self, classes: ClassList) -> Iterator[SourceSample]:
        """Of the whole tar, whichever stretch the piece is."""
        with open_tar(self.url, self.where) as file:
            for _, sample in index_tar(file, self.where):
                yield self._checked(sample, clean_key(sample.key), classes, b"")

    def _checked(self, sample: Sample, key: str, classes: ClassList, data: bytes) -> SourceSample:
        label, problem = check_label(sample.members.get("cls"), classes)
        if sample.first(IMAGE_EXTENSIONS) is None:
            problem = f"no image among the members ({', '.join(sample.members) or 'none'})"
        return SourceSample(key, data, label, problem)

    def _samples(self, classes: ClassList) -> Iterator[SourceSample]:
        of = self.name if self.url.startswith(PIPE) else file_name(self.url)
        with open_tar(self.url, self.where) as file:
            found = (self.start, self.first) if self.first is not None else self._find_first(file)
            if found is None:
                return
            start, number = found
            for offset, sample in iterate_tar(file, self.where, start):
                if self.stop is not None and offset >= self.stop:
                    return
                key = clean_key(sample.key) if self.keys == "name" else place_key(of, number)
                yield self._checked(sample, key, classes, sample.first(IMAGE_EXTENSIONS) or b"")
                number += 1

    def _find_first(self, file: IO[bytes]) -> tuple[int, int] | None:
        """(offset, number) of the first sample at or after `start`; None when there is none."""
        offsets = (offset for offset, _ in index_tar(file, self.where))
        return next(((offset, number) for number, offset in enumerate(offsets) if offset >= self.start), None)


def open_tar(url: str, where: str) -> IO[bytes]:
    """A tar as a file that can seek. A remote one, or a command's output, is first copied to the temporary folder.

    where: its name in messages. Raises UserError for a file that is missing or a command that fails.
    """
    if is_local(url):
        return open_file(url)
    spool: IO[bytes] = tempfile.TemporaryFile()
    try:
        if url.startswith(PIPE):
            command = url.removeprefix(PIPE)
            shell = ["bash", "-o", "pipefail", "-c", command]  # a download that fails before a `|` is a failure
            status = subprocess.run(shell, stdout=spool, check=False).returncode
            if status:
                raise UserError(f"{where}: the command ended with status {status}")
        else:
            copy_into(url, spool)
        spool.seek(0)
    except BaseException:
        spool.close()
        raise
    return spool


def tar_places(url: str) -> Iterator[tuple[str, Place]]:
    """(key, place) of every sample of a tar, from its headers."""
    before: tuple[str, int] | None = None
    with open_tar(url, url) as file:
        for offset, sample in index_tar(file, url):
            if before is not None:
                yield before[0], Place(url, before[1], offset - before[1])
            before = clean_key(sample.key), offset
        if before is not None:
            yield before[0], Place(url, before[1], file.seek(0, io.SEEK_END) - before[1])


def read_sample(place: Place) -> Sample:
    """The sample at a place of a tar, in one read of its bytes. Raises UserError when it is no longer there."""
    try:
        data = store_of(place.file).read_range(file_name(place.file), place.offset, place.size)
    except FileNotFoundError as error:
        raise NoSuchFile(f"{place.file}: no such file") from error
    ended = io.BytesIO(data + bytes(2 * BLOCK))  # as a tar of this sample alone ends
    return next(iterate_tar(ended, place.file), (0, Sample("")))[1]


def cut_tars(urls: Sequence[str], shard_size: int, keys: KeyRule) -> tuple[Sequence[Piece], bool, str]:
    """The pieces of a list of tars, whether their counts are exact, and a fingerprint.

    A source of many tars is cut by their sizes and the samples of the first tar, so no piece depends on more than that.
    """
    if any(url.startswith(PIPE) for url in urls):
        return _cut_commands(urls, keys)
    with ThreadPoolExecutor(32) as pool:
        sizes = list(pool.map(file_size, urls))
    with open_tar(urls[0], urls[0]) as file:
        samples = sum(1 for _ in index_tar(file, urls[0]))
    mean = max(sizes[0], 1) / max(samples, 1)  # bytes a sample
    if sum(sizes) / mean <= EXACT and all(is_local(url) for url in urls):
        return _cut_exactly(urls, shard_size, keys)
    return _cut_by_size(urls, sizes, mean, shard_size, keys)


def _cut_exactly(urls: Sequence[str], shard_size: int, keys: KeyRule) -> tuple[Sequence[Piece], bool, str]:
    fingerprint = Fingerprint()
    names: list[tuple[str, str]] = []  # (key, tar)
    pieces: list[Piece] = []
    for url in tqdm(
        urls, desc="reading tar headers", unit="tar", disable=None if len(urls) > 20 else True, leave=False
    ):
        with open_tar(url, url) as file:
            index = [
                (offset, clean_key(sample.key), sample.members.get("cls")) for offset, sample in index_tar(file, url)
            ]
        offsets = [offset for offset, _, _ in index]
        names += [(key, url) for _, key, _ in index]
        for offset, key, label in index:
            fingerprint.add(file_name(url), offset, key, label)
        for first in range(0, len(offsets), shard_size):
            count = min(shard_size, len(offsets) - first)
            stop = offsets[first + count] if first + count < len(offsets) else None
            whole = len(offsets) <= shard_size
            name = file_name(url) if whole else f"{file_name(url)}[{first}:{first + count}]"
            pieces.append(
                TarPiece(url=url, name=name, count=count, start=offsets[first], stop=stop, first=first, keys=keys)
            )
    if keys == "name":
        refuse_repeated(key_hashes(key for key, _ in names), names.__getitem__, mend_within=SCATTERED)
    return pieces, True, fingerprint.value()


def _cut_by_size(
    urls: Sequence[str], sizes: Sequence[int], mean: float, shard_size: int, keys: KeyRule
) -> tuple[Sequence[Piece], bool, str]:
    if keys == "name":
        with ThreadPoolExecutor(
            32
        ) as pool:  # repeated counters (000000.jpg in every tar) show in the first keys already
            names = list(zip(pool.map(_first_key, urls), urls, strict=True))
        refuse_repeated(key_hashes(key for key, _ in names), names.__getitem__)
    fingerprint = Fingerprint()
    pieces: list[Piece] = []
    for url, size in zip(urls, sizes, strict=True):
        fingerprint.add(file_name(url), size)
        estimate = size / mean
        parts = 1 if estimate <= SLACK * shard_size else -(-round(estimate) // shard_size)
        cuts = [size * part // parts for part in range(parts)] + [None]
        for part, (start, stop) in enumerate(itertools.pairwise(cuts)):
            name = file_name(url) if parts == 1 else f"{file_name(url)}[part {part + 1} of {parts}]"
            count, first = round(estimate / parts), 0 if part == 0 else None
            pieces.append(
                TarPiece(url=url, name=name, count=count, start=start or 0, stop=stop, first=first, keys=keys)
            )
    return pieces, False, fingerprint.value()


def _cut_commands(urls: Sequence[str], keys: KeyRule) -> tuple[Sequence[Piece], bool, str]:
    """One piece for each command. Only the first command runs now.

    The fingerprint is made from its output and from the names of tars in all commands. The rest of a command may hold
    tokens that change every day.
    """
    fingerprint = Fingerprint()
    for url in urls:
        fingerprint.add(re.findall(r"[^\s/='\"]+\.tar\b", url))
    where = _where(urls[0], _command_name(0))
    with open_tar(urls[0], where) as file:
        first = [(offset, sample.key, sample.members.get("cls")) for offset, sample in index_tar(file, where)]
    fingerprint.add(first)
    pieces = [
        TarPiece(url=url, name=_command_name(number), count=len(first), keys=keys) for number, url in enumerate(urls)
    ]
    return pieces, len(urls) == 1, fingerprint.value()


def _command_name(number: int) -> str:
    return f"{number:06d}"


def _where(url: str, name: str) -> str:
    return f"{PIPE} command {name}" if url.startswith(PIPE) else url


def _first_key(url: str) -> str:
    """The key in a tar's first header. Raises UserError for an empty tar, whose shard would be empty too."""
    try:
        with open_file(url) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            member = next((member for member in tar if member.isreg()), None)
    except tarfile.TarError as error:
        raise UserError(f"{url}: not a readable tar ({error}); is it whole, and uncompressed?") from error
    if member is None:
        raise UserError(f"{url}: holds no samples; leave it out")
    return clean_key(split_name(member.name)[0])
