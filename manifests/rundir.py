"""A run directory: its files, which shards are done, and sealing.

A shard is done exactly when its part file exists and the tars it names have that size and sha256.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pydantic

from .errors import Unreachable, UserError, one_line
from .files.store import Store
from .recipe import fingerprint, first_difference, flatten
from .rows import SCHEMA, PartRecord, TarRecord, decode_part, decode_table, decode_tars, encode_part, encode_table

MANIFEST = "manifest.parquet"
RUN = "run.json"
CARD = "README.md"
GALLERY = "gallery.png"
# everything a run directory may hold, besides run.json, which is written first
CONTENTS = ("clean", "dad", "manifest", "work", MANIFEST, CARD, GALLERY)
PART_NAME = re.compile(r"part-([0-9]{6,})\.parquet")
FORMAT = 1  # version of the run directory's layout; readers refuse others


def part_name(shard: int) -> str:
    return f"manifest/part-{shard:06d}.parquet"


def tar_name(stream: str, shard: int) -> str:
    """``stream`` is "clean" or "dad"."""
    return f"{stream}/{stream}-{shard:06d}.tar"


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """``run.json``: the recipe, the models and versions that made the run, and the counts."""

    recipe: dict[str, Any]
    identity: dict[str, Any]  # the recipe's fields that decide the bytes, flat
    fingerprints: dict[str, str]  # teacher, discretizer, classes, source
    classes: list[str]
    shards: int
    samples: int  # counted in the source; once sealed, the rows of manifest.parquet
    versions: dict[str, str]  # version of each package; "2.6.0 and 2.7.1" if it changed while the run was made
    counts: dict[str, int] | None = None  # number of samples by status; None until sealed
    manifest_sha256: str | None = None  # sha256 of manifest.parquet; None until sealed
    missing: dict[str, str] | None = None  # shards that --allow-missing left out, with the reason
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """Fingerprint of everything that decides the bytes; every part file carries it."""
        return fingerprint([self.identity, self.fingerprints])


class RunDir:
    """A run directory under a local path or any fsspec URL."""

    def __init__(self, url: str | Path) -> None:
        if not str(url):
            raise UserError("OUT: the name is empty; name a folder or a URL")
        self.store = Store(url)

    def __str__(self) -> str:
        return str(self.store)

    def info(self) -> RunInfo:
        """Read run.json. Raises UserError when it is missing, damaged or of another format."""
        try:
            data = self.store.read(RUN)
        except NotADirectoryError as error:
            raise UserError(
                f"{self.store}: is a file, not a run directory; name the folder that holds {RUN}"
            ) from error
        except FileNotFoundError as error:
            where = f"make one with `make shards OUT={self.store}`"
            raise UserError(f"{self.store}: no run directory here (no {RUN}); {where}") from error
        try:
            tree = json.loads(data)
            if tree.get("format") != FORMAT:
                what = f"format {tree.get('format')!r}, this version reads format {FORMAT}"
                raise UserError(f"{self.store.where(RUN)}: {what}; restore it or make the run anew")
            info: RunInfo = pydantic.TypeAdapter(RunInfo).validate_json(data, strict=True)
        except (ValueError, TypeError, AttributeError) as error:
            reason = one_line(error)
            raise UserError(f"{self.store.where(RUN)}: damaged ({reason}); restore it or make the run anew") from error
        recipe = flatten(info.recipe)
        if odd := next((name for name, value in info.identity.items() if recipe.get(name, value) != value), None):
            what = f"recipe.{odd} is {recipe[odd]!r}, identity says {info.identity[odd]!r}"
            raise UserError(f"{self.store.where(RUN)}: was edited ({what}); restore it or make the run anew")
        return info

    def shards_with_parts(self) -> set[int]:
        """Shards whose part file exists, from one listing. `damage` says whether a part is sound."""
        return {int(match[1]) for name in self.store.names("manifest") if (match := PART_NAME.fullmatch(name))}

    def commit(
        self,
        shard: int,
        rows: Sequence[Mapping[str, Any]],
        tars: Mapping[str, tuple[bytes, int]],
        *,
        source: str,
        run: str,
    ) -> None:
        """Write the tars of a shard and, last, its part file: the shard is done.

        tars: stream ("clean", "dad") -> (bytes, number of samples).
        source: name of the piece of the source that the shard was made from.
        run: fingerprint of the run.
        """
        records = []
        for stream, (data, samples) in tars.items():
            name = tar_name(stream, shard)
            self.store.write(name, data)
            records.append(
                TarRecord(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), samples=samples)
            )
        record = PartRecord(shard=shard, source=source, run=run, samples=len(rows), tars=tuple(records))
        self.store.write(part_name(shard), encode_part(rows, record))

    def withdraw(self, shard: int) -> None:
        """Remove the part file of a damaged shard, so that it counts as not done."""
        self.store.remove(part_name(shard))

    def write_info(self, info: RunInfo) -> None:
        self.store.write(RUN, _encode_info(info))

    def check_place(self) -> None:
        """Raise UserError where a run cannot be written, or where it would overwrite files that are not its own."""
        if not self.store.exists(MANIFEST):
            self.store.check_writable()
        if self.store.exists(RUN):
            return
        taken = [name for name in CONTENTS if self.store.exists(name)]
        if taken and not self.store.exists(RUN):  # again: another command may have begun the run meanwhile
            raise UserError(
                f"{self.store.where(taken[0])}: is in the way of a new run (there is no {RUN} here); choose another OUT"
            )

    def begin(self, info: RunInfo) -> None:
        """Write run.json for a fresh run, or check that the run already here is the same one.

        Raises UserError naming the first field that differs.
        """
        if not self.store.exists(RUN) and self.store.create(RUN, _encode_info(info)):
            return
        old = self.info()
        for section in ("identity", "fingerprints"):
            if difference := first_difference(getattr(old, section), getattr(info, section)):
                name, was, now = difference
                what = name if section == "identity" else f"the {name} (its content's fingerprint)"
                raise UserError(
                    f"{self.store}: already holds shards made with another recipe: {what} was {was!r}, "
                    f"now {now!r}; choose another OUT, or set it back"
                )

    def damage(self, shard: int, run: str, *, content: bool = True) -> str | None:
        """Why a shard is not done; None when it is. Reads every byte of its tars unless ``content`` is False."""
        try:
            _, record = self.part(shard, run)
        except FileNotFoundError:
            return f"{self.store.where(part_name(shard))}: missing"
        except Unreachable:  # a file out of reach is not damaged
            raise
        except UserError as error:
            return str(error)
        return next((why for tar in record.tars if (why := self.tar_damage(tar, content=content))), None)

    def tar_damage(self, tar: TarRecord, *, content: bool = True) -> str | None:
        """How a tar differs from its record, naming the file; None when it agrees."""
        where = self.store.where(tar.name)
        try:
            size = self.store.size(tar.name)
        except (FileNotFoundError, NotADirectoryError):
            return f"{where}: missing"
        if size != tar.size:
            return f"{where}: {size} bytes, the manifest says {tar.size} (truncated or replaced)"
        if content and self.store.sha256(tar.name) != tar.sha256:
            return f"{where}: its sha256 is not the one in the manifest (altered or damaged)"
        return None

    def part(
        self, shard: int, run: str | None = None, columns: Sequence[str] = tuple(SCHEMA.names)
    ) -> tuple[pa.Table, PartRecord]:
        """Read a shard's rows and record.

        Raises FileNotFoundError, and UserError for a part file that is damaged or of another shard or run.
        """
        where = self.store.where(part_name(shard))
        rows, record = decode_part(self.store.read(part_name(shard)), where, columns)
        if run is not None and (record.shard, record.run) != (shard, run):
            raise UserError(f"{where}: belongs to another run or shard (shard {record.shard}, run {record.run})")
        return rows, record

    def read_parts(self, shards: Iterable[int]) -> tuple[pa.Table, list[TarRecord]]:
        """Concatenate the rows and the tars' records of several part files, as sealing does."""
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(self.part, shards))
        table = pa.concat_tables([rows for rows, _ in parts]).replace_schema_metadata(None).combine_chunks()
        return table, [tar for _, record in parts for tar in record.tars]

    def seal(
        self, info: RunInfo, shards: Iterable[int], missing: Mapping[int, str] | None = None
    ) -> tuple[pa.Table, list[TarRecord]]:
        """Write ``manifest.parquet`` from the part files of ``shards``, and the final ``run.json``.

        missing: shards that are left out, with the reason; ``run.json`` records them, and their tars are removed.
        Returns the rows and the tars' records.
        """
        table, tars = self.read_parts(shards)
        counts = Counter(table.column("status").to_pylist())
        meta = {"run": info.fingerprint, "classes": fingerprint(info.classes), "tars": [asdict(tar) for tar in tars]}
        data = encode_table(table, meta)
        self.store.write(MANIFEST, data)
        sealed = replace(
            info,
            samples=table.num_rows,
            counts=dict(sorted(counts.items())),
            manifest_sha256=hashlib.sha256(data).hexdigest(),
            missing={str(shard): why for shard, why in sorted(missing.items())} if missing else None,
        )
        self.write_info(sealed)
        for stream in ("clean", "dad") if missing else ():
            present = {f"{stream}/{name}" for name in self.store.names(stream)}
            for name in present & {tar_name(stream, shard) for shard in missing or ()}:
                self.store.remove(name)
        return table, tars

    def manifest(
        self, columns: Sequence[str] = tuple(SCHEMA.names), info: RunInfo | None = None
    ) -> tuple[pa.Table, list[TarRecord]]:
        """Read the sealed manifest: all rows (all columns or some) and the record of every tar.

        info: the run.json, if the caller has read it already. Raises UserError when the run is not sealed or damaged.
        """
        info = info or self.info()
        if info.counts is None or not self.store.exists(MANIFEST):
            raise UserError(
                f"{self.store}: not complete yet; `python -m pipeline status {self.store}` says what is missing"
            )
        data = self.store.read(MANIFEST)
        if hashlib.sha256(data).hexdigest() != info.manifest_sha256:
            raise UserError(
                f"{self.store.where(MANIFEST)}: is not the one that was sealed (edited or damaged); "
                "run `make shards` again to rebuild it from its parts"
            )
        table, meta = decode_table(data, self.store.where(MANIFEST), columns)
        if meta.get("run") != info.fingerprint:
            differ = f"{meta.get('run')}, {info.fingerprint}"
            raise UserError(f"{self.store.where(MANIFEST)}: belongs to another run than {RUN} ({differ})")
        if meta.get("classes") not in (None, fingerprint(info.classes)):  # None: sealed by an earlier version
            why = "its class names are not those that were sealed"
            raise UserError(f"{self.store.where(RUN)}: {why}; restore it or make the run anew")
        if table.num_rows != info.samples:
            raise UserError(
                f"{self.store.where(MANIFEST)}: holds {table.num_rows} rows, {RUN} says {info.samples} samples"
            )
        return table, decode_tars(meta, self.store.where(MANIFEST))


def _encode_info(info: RunInfo) -> bytes:
    return (json.dumps(asdict(info), indent=2) + "\n").encode()


def count_statuses(counts: Mapping[str, int]) -> str:
    """``"4,310 verified, 1,688 rejected, 2 errors"``."""
    verified, rejected, errors = (counts.get(status, 0) for status in ("verified", "rejected", "error"))
    return f"{verified:,} verified, {rejected:,} rejected, {errors:,} error{'' if errors == 1 else 's'}"
