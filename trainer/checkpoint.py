"""A student's run directory: recipe, metrics, checkpoints. Checkpoints are tensors and numbers, read with ``weights_only=True``."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from manifests import Store, UserError, load_weights, one_line
from manifests.files.weights import tensors_sha256
from manifests.recipe import as_tree, first_difference, identity
from manifests.rundir import RUN

from .methods import BY_NAME
from .methods.norms import without_auxiliary
from .recipe import Recipe
from .student import Student, create_student, weights_of

MEND = "training again puts the weights of its last checkpoint there"
STUDENT_INFO, LAST, BEST, METRICS = "student.json", "last.pt", "best.safetensors", "metrics.csv"


@dataclass
class Progress:
    """Where training is, and what it has measured so far; part of every checkpoint."""

    epoch: int = 0
    step: int = 0  # global batches consumed in this epoch
    best: float = -1.0
    images: int = 0  # that the student has seen, clean and DAD
    seconds: float = 0.0  # of training, over all processes that took part
    waited: float = 0.0  # seconds of these spent waiting for the next batch
    validated: float = 0.0  # seconds of validation, on top of them
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch
    rows: list[dict[str, float]] = field(default_factory=list)  # metrics.csv
    manifest: str | None = None  # sha256 of the one that ``step`` counts in


@dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """``student.json``: what is needed to rebuild the student, and what it was made from."""

    student: str  # timm model name
    classes: list[str]
    side: int  # pixels
    mean: list[float]
    std: list[float]
    recipe: dict[str, Any]
    identity: dict[str, Any]
    shards: str  # fingerprint of the run directory that it learned from


def with_method(info: StudentInfo) -> StudentInfo:
    """What a student was made from, in today's fields: students of earlier versions have ``loss`` where `method` stands now."""
    loss = info.recipe.get("loss")
    if not isinstance(loss, dict):
        return info
    name = loss["objective"]
    fields = BY_NAME[name].__dataclass_fields__  # type: ignore[attr-defined]
    method = {"name": name} | {field: value for field, value in loss.items() if field in fields}
    recipe = {field: value for field, value in info.recipe.items() if field != "loss"} | {"method": method}
    kept = {field: value for field, value in info.identity.items() if not field.startswith("loss.")}
    return replace(info, recipe=recipe, identity=kept | {f"method.{field}": value for field, value in method.items()})


class StudentDir:
    """Reads and writes one student's directory, atomically."""

    def __init__(self, path: str | Path) -> None:
        if "://" in str(path):  # safetensors and TensorBoard know files alone
            raise UserError(f"{path}: a student's directory is a local folder, not a URL; name a folder")
        self.path = Path(path).expanduser()
        self.store = Store(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def info(self) -> StudentInfo:
        """Raises UserError when there is no student here."""
        if not self.store.exists(STUDENT_INFO):
            raise UserError(f"{self}: no student here (no {STUDENT_INFO}); train one with `make train`")
        try:
            return with_method(StudentInfo(**json.loads(self.store.read(STUDENT_INFO))))
        except (ValueError, TypeError, KeyError) as error:
            why = one_line(error)
            raise UserError(
                f"{self.store.where(STUDENT_INFO)}: damaged ({why}); restore it, or train again in another --out"
            ) from error

    def claim(self, info: StudentInfo) -> None:
        """Start here, or go on with the same run. Raises UserError naming what differs from the run that is already here, or files that
        are not a student's.

        A run that has no checkpoint yet has nothing to lose, and is replaced.
        """
        if not self.store.exists(STUDENT_INFO):
            self._refuse_foreign()
        elif self.store.exists(LAST) or self.store.exists(BEST):
            old = self.info()
            if old.classes != info.classes:
                numbers = f"{len(old.classes)} classes, the shards have {len(info.classes)}"
                raise UserError(f"{self}: was trained on another class list ({numbers}); choose another --out")
            if old.shards != info.shards:
                raise UserError(
                    f"{self}: was trained on other shards (fingerprint {old.shards}, now {info.shards}); choose another --out"
                )
            if found := first_difference(old.identity, info.identity):
                name, was, now = found
                raise UserError(
                    f"{self}: was trained with another recipe: {name} was {was!r}, now {now!r}; choose another --out, or set it back"
                )
            return
        self.store.write(STUDENT_INFO, (json.dumps(asdict(info), indent=2) + "\n").encode())

    def _refuse_foreign(self) -> None:
        if taken := [name for name in (RUN, LAST, BEST, METRICS) if self.store.exists(name)]:
            what = f"is in the way of a new student (there is no {STUDENT_INFO} here)"
            raise UserError(f"{self.store.where(taken[0])}: {what}; choose another --out")
        if other := next(self.path.glob(f"*/{STUDENT_INFO}"), None):
            raise UserError(f"{self}: holds other students, such as {other.parent.name}; choose another --out")

    def save_last(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.store.write(LAST, buffer.getvalue())

    def load_last(self) -> dict[str, Any] | None:
        """The last checkpoint, or None when there is none yet. Raises UserError when it is damaged."""
        if not self.store.exists(LAST):
            return None
        with self.store.open(LAST) as file:
            try:
                if damaged := zipfile.ZipFile(
                    file
                ).testzip():  # torch writes a CRC of every tensor, and does not look at it
                    raise ValueError(f"the checksum of {damaged} is wrong")
                file.seek(0)
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # zipfile and torch raise whatever their parsers stumble over
                reason = one_line(error)
                raise UserError(
                    f"{self.store.where(LAST)}: not a readable checkpoint; delete it to start again ({reason})"
                ) from error
        return state

    def save_best(self, student: Student) -> None:
        """The plain timm state dict of the student, with its checksum."""
        weights = without_auxiliary(weights_of(student.model))
        self.store.write(BEST, _with_metadata(save(weights), {"format": "pt", "sha256": tensors_sha256(weights)}))

    def best_weights(self) -> dict[str, torch.Tensor]:
        """What `save_best` wrote. Raises UserError when training has not got that far, or the file is damaged."""
        if not self.store.exists(BEST):
            raise UserError(f"{self}: no {BEST} (no epoch is finished yet, or it was removed); run `make train` again")
        try:
            weights = load_weights(self.path / BEST)
        except UserError as error:
            raise UserError(f"{error}; {MEND}") from error
        with safe_open(self.path / BEST, "pt") as file:
            written = (file.metadata() or {}).get("sha256")
        if written not in (None, tensors_sha256(weights)):
            raise UserError(f"{self.store.where(BEST)}: its checksum is wrong (damaged or altered); {MEND}")
        return weights

    def load_student(self) -> Student:
        """The best checkpoint as a model. Raises UserError as `info` and `best_weights` do, and when the two do not fit."""
        info, weights = self.info(), self.best_weights()
        # The name alone would give the normalisation of its default weights; it may have started from others (MAE, DINO).
        student = Student(
            create_student(info.student, len(info.classes), info.side).model, tuple(info.mean), tuple(info.std)
        )
        try:
            student.model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{self.store.where(BEST)}: does not fit {info.student}; {MEND}") from error
        return student.eval()


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with metadata in the order given; the library writes them in another one each time."""
    start = 8 + int.from_bytes(data[:8], "little")  # of the tensors: the length of the header, the header, then they
    header = json.dumps({"__metadata__": metadata} | json.loads(data[8:start]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


def describe(recipe: Recipe, student: Student, classes: list[str], side: int, shards: str) -> StudentInfo:
    return StudentInfo(
        student=recipe.student,
        classes=classes,
        side=side,
        mean=student.mean.flatten().tolist(),
        std=student.std.flatten().tolist(),
        recipe=as_tree(recipe),
        identity=identity(recipe),
        shards=shards,
    )
