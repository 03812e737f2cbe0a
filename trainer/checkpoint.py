"""A student's directory: recipe, metrics, checkpoints.

Checkpoints hold tensors and numbers alone, and are read with ``weights_only=True``.
"""

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
from .methods.parts.norms import without_auxiliary
from .recipe import Recipe
from .student import Student, create_student, weights_of

MEND = "training again puts the weights of its last checkpoint there"
STUDENT_INFO, LAST, BEST, METRICS = "student.json", "last.pt", "best.safetensors", "metrics.csv"


@dataclass
class Progress:
    """Where training is, and what it has measured so far. Every checkpoint holds it."""

    epoch: int = 0
    step: int = 0  # global batches consumed in this epoch
    best: float = -1.0  # highest validation top-1 in percent; -1 before the first validation
    images: int = 0  # clean and DAD images that the student has seen
    seconds: float = 0.0  # training time, added up over interruptions
    waited: float = 0.0  # part of `seconds` spent waiting for the next batch
    validated: float = 0.0  # validation time in seconds, not part of `seconds`
    sums: dict[str, float] = field(default_factory=dict)  # losses, summed over the steps of this epoch
    rows: list[dict[str, float]] = field(default_factory=list)  # rows of metrics.csv
    manifest: str | None = None  # sha256 of the manifest that `step` refers to


@dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """``student.json``: how to rebuild the student, and from what it was made."""

    student: str  # timm model name
    classes: list[str]
    side: int  # pixels
    mean: list[float]
    std: list[float]
    recipe: dict[str, Any]
    identity: dict[str, Any]
    shards: str  # fingerprint of the run directory


def with_method(info: StudentInfo) -> StudentInfo:
    """Translate an older ``student.json``, which has ``loss`` in place of `method`, to today's fields."""
    loss = info.recipe.get("loss")
    if not isinstance(loss, dict):
        return info
    name = loss["objective"]
    fields = BY_NAME[name].__dataclass_fields__  # type: ignore[attr-defined]
    method = {"name": name} | {field: value for field, value in loss.items() if field in fields}
    recipe = {field: value for field, value in info.recipe.items() if field != "loss"} | {"method": method}
    rest = {field: value for field, value in info.identity.items() if not field.startswith("loss.")}
    return replace(info, recipe=recipe, identity=rest | {f"method.{field}": value for field, value in method.items()})


class StudentDir:
    """Reads and writes one student's directory, atomically."""

    def __init__(self, path: str | Path) -> None:
        if "://" in str(path):  # safetensors and TensorBoard open local files only
            raise UserError(f"{path}: a student's directory is a local folder, not a URL; name a folder")
        self.path = Path(path).expanduser()
        self.store = Store(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def info(self) -> StudentInfo:
        """What ``student.json`` says. Raises UserError when it is missing or damaged."""
        if not self.store.exists(STUDENT_INFO):
            raise UserError(f"{self}: no student here (no {STUDENT_INFO}); train one with `make train`")
        try:
            return with_method(StudentInfo(**json.loads(self.store.read(STUDENT_INFO))))
        except (ValueError, TypeError, KeyError) as error:
            why = one_line(error)
            raise UserError(
                f"{self.store.where(STUDENT_INFO)}: damaged ({why}); restore it, or train again in another --out"
            ) from error

    def begin(self, info: StudentInfo) -> None:
        """Write ``student.json``, or accept the one of the same training. A student without a checkpoint is replaced.

        Raises UserError for a directory that holds another student, naming what differs, or files of something else.
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
                    f"{self}: was trained on other shards ({old.shards}, now {info.shards}); choose another --out"
                )
            if found := first_difference(old.identity, info.identity):
                name, was, now = found
                raise UserError(
                    f"{self}: was trained with another recipe: {name} was {was!r}, now {now!r}; "
                    "choose another --out, or set it back"
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
        """Write a checkpoint to go on from: tensors, numbers, strings, and lists and dictionaries of them."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.store.write(LAST, buffer.getvalue())

    def load_last(self) -> dict[str, Any] | None:
        """The last checkpoint on the CPU; None before the first. Raises UserError when it is damaged."""
        if not self.store.exists(LAST):
            return None
        with self.store.open(LAST) as file:
            try:
                # torch writes a CRC of every tensor, but does not check it when reading
                if damaged := zipfile.ZipFile(file).testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
                file.seek(0)
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # zipfile and torch raise errors of many classes on damaged files
                reason = one_line(error)
                raise UserError(
                    f"{self.store.where(LAST)}: not a readable checkpoint; delete it to start again ({reason})"
                ) from error
        return state

    def save_best(self, student: Student) -> None:
        """Write the state dict of the timm model, without auxiliary norms, and its checksum."""
        weights = without_auxiliary(weights_of(student.model))
        self.store.write(BEST, _with_metadata(save(weights), {"format": "pt", "sha256": tensors_sha256(weights)}))

    def best_weights(self) -> dict[str, torch.Tensor]:
        """The weights that `save_best` wrote. Raises UserError when they are missing or damaged."""
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
        """The student with its best weights, in eval mode, on the CPU.

        Raises UserError as `info` and `best_weights` do, and when the weights do not fit the model.
        """
        info, weights = self.info(), self.best_weights()
        # mean and std come from student.json: pretrained weights (MAE, DINO) may use others than the model's default
        student = Student(
            create_student(info.student, len(info.classes), info.side).model, tuple(info.mean), tuple(info.std)
        )
        try:
            student.model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{self.store.where(BEST)}: does not fit {info.student}; {MEND}") from error
        return student.eval()


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """Put metadata into a safetensors file. The library orders them differently each time, which changes the bytes."""
    start = 8 + int.from_bytes(data[:8], "little")  # where tensor data begins: 8-byte length + header
    header = json.dumps({"__metadata__": metadata} | json.loads(data[8:start]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


def describe(recipe: Recipe, student: Student, classes: list[str], side: int, shards: str) -> StudentInfo:
    """The ``student.json`` of a training that begins. side: in pixels. shards: fingerprint of the run directory."""
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
