"""The image sets that students are scored on: which there are, and whether they fit the class list of the shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manifests import Store, UserError
from shards.sources import ImageSet, NoSuchFile, classes_for, open_set
from shards.sources.classes import classes_beside
from shards.sources.files import list_files
from shards.sources.folder import is_image

TRAINED_ON = "train"  # a folder of this name is no evaluation set
FIRST = ("val", "v2")  # columns that stand before the others


def image_set(where: str | Path, names: Sequence[str]) -> ImageSet:
    """The image set at ``where``, in any layout and at any URL that stage 1 takes.

    names: classes of the shards, in label order; `classes_for` says in which folders they lie.
    Raises UserError where there is no set, or one of another class list.
    """
    data = _expanded(where)
    try:
        return open_set(data, classes_for(names, data))
    except NoSuchFile as error:
        raise UserError(f"{error}; no image set is here") from error


def check_set(where: str | Path, names: Sequence[str]) -> None:
    """Make sure that a set can be scored, by its headers and labels. Raises UserError as `ImageSet.check` does."""
    image_set(where, names).check()


def classes_of(where: str | Path) -> list[str] | None:
    """Class names from the list beside an image set, in label order; None where there is no list.

    Raises UserError for a broken list.
    """
    found = classes_beside(_expanded(where))
    return None if found is None else list(found[0].names)


def sets_below(data: str | Path) -> list[str]:
    """Names of the evaluation sets in a data folder, local or at a URL; val and v2 come first.

    A set is a sub-folder of tars, of Parquet files or of class folders, but not ``train``. Raises UserError for none.
    """
    folder = Store(_expanded(data))
    if not folder.exists():
        raise UserError(f"{data}: no such folder; name one whose sub-folders are evaluation sets")
    names = [
        name
        for name in folder.folders("")
        if name != TRAINED_ON and not name.startswith(".") and _is_set(folder.where(name))
    ]
    if not names:
        raise UserError(
            f"{data}: holds no evaluation sets (sub-folders of *.tar, *.parquet, or class folders with images); "
            "is it a set itself? Then name the folder above"
        )
    return sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def set_in(data: str | Path, name: str) -> str:
    """Path or URL of a set of `sets_below`."""
    return Store(_expanded(data)).where(name)


def _is_set(where: str) -> bool:
    store = Store(where)
    if list_files(where, "tar") or list_files(where, "parquet"):
        return True
    folders = (name for name in store.folders("") if not name.startswith("."))
    return any(is_image(f"{folder}/{file}") for folder in folders for file in store.names(folder))


def _expanded(where: str | Path) -> str:
    return str(where) if "://" in str(where) else str(Path(where).expanduser())
