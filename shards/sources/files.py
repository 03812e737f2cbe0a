"""Names of a source's files: lists with braces, folders and URLs; and opening them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from manifests import Store, UserError
from manifests.locations import check_location

PIPE = "pipe:"
VERSIONS = (
    "ETag",
    "etag",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)  # what stores call a file's version


class NoSuchFile(UserError):
    """A source that is not there. Whoever knows the field that names it says which to set."""


def expand(data: str) -> list[str]:
    """``a-{000..127}.tar::b.tar`` as a list of paths and URLs, as `webdataset` understands it (braces, ``::``)."""
    from webdataset.shardlists import expand_urls

    if data.startswith(PIPE) and "::" not in data and "{" not in data:
        return [data]
    try:
        urls = expand_urls(data)
    except ValueError as error:
        raise UserError(f"{data}: {error}; write ranges as {{000000..000127}}") from error
    for url in urls:
        if not url.startswith(PIPE):
            check_location(url)
    return [str(Path(url).expanduser()) if "://" not in url and not url.startswith(PIPE) else url for url in urls]


def without_secrets(data: str) -> str:
    """``source.data`` for the record, which others will read.

    Commands, which may hold tokens, are left out, and so are the user, the password and the query of a URL.
    """
    if any(url.startswith(PIPE) for url in expand(data)):
        return f"{PIPE}(a command, not recorded)"
    without_users = re.sub(r"://(?:[^/@:]*:[^@]*|[^/@]*)@", "://", data)
    return re.sub(r"(://[^?]*?)\?.*?(?=::|$)", r"\1", without_users)  # a query may hold a token, or a signature


def store_of(url: str) -> Store:
    """The folder that a file lies in."""
    folder, slash, _ = url.rpartition("/")
    return Store(folder or (slash or "."))


def is_local(url: str) -> bool:
    return not url.startswith(PIPE) and store_of(url).is_local


def file_name(url: str) -> str:
    """The last part of a path or URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def file_size(url: str) -> int:
    """Bytes. Raises UserError when there is no such file."""
    try:
        return store_of(url).size(file_name(url))
    except FileNotFoundError as error:
        raise _missing(url) from error


def open_file(url: str) -> IO[bytes]:
    """A file that can seek. Raises UserError when there is none."""
    try:
        return store_of(url).open(file_name(url))
    except FileNotFoundError as error:
        raise _missing(url) from error


def copy_into(url: str, target: IO[bytes]) -> None:
    """Copy a file in large pieces. Raises UserError when there is none."""
    with open_file(url) as file:
        shutil.copyfileobj(file, target, 16 << 20)


def list_files(folder: str, extension: str) -> list[str]:
    """Sorted paths or URLs of the files directly in a folder that end in ``.extension``; without hidden ones."""
    store = Store(folder)
    return [
        store.where(name) for name in store.names("") if name.endswith(f".{extension}") and not name.startswith(".")
    ]


def common_extension(urls: Sequence[str]) -> str | None:
    """``tar`` or ``parquet`` when all names of a list end so (a command counts as tar); else None."""
    found = {"tar" if url.startswith(PIPE) else url.rpartition(".")[2].lower() for url in urls}
    return found.pop() if len(found) == 1 and found <= {"tar", "parquet"} else None


def stamps(urls: Sequence[str]) -> list[tuple[str, int, object]]:
    """(name, bytes, version) of each file, which show a change. The version of a local file is its time in nanoseconds.

    Raises UserError when a file is missing.
    """
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(_stamp, urls))


def _stamp(url: str) -> tuple[str, int, object]:
    store = store_of(url)
    try:
        if store.is_local:
            found = Path(store.root, file_name(url)).stat()
            return file_name(url), found.st_size, found.st_mtime_ns
        return file_name(url), *version(store.info(file_name(url)))
    except FileNotFoundError as error:
        raise _missing(url) from error


def version(entry: Mapping[str, Any]) -> tuple[int, str]:
    """(bytes, version) of a remote file, from what fsspec says of it: its ETag, else its time of change."""
    return int(entry.get("size") or 0), str(next((entry[name] for name in VERSIONS if entry.get(name)), ""))


def _missing(url: str) -> UserError:
    return NoSuchFile(f"{url}: no such file")
