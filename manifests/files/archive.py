"""The tensors of a torch zip archive that holds more than tensors, without running anything in it.

Two kinds of published weights need this: checkpoints of Lightning, timm and others, whose pickle names classes of
settings beside the state dict, and TorchScript archives such as OpenAI's CLIP files. Every class that is not one of
torch's tensor builders becomes an inert shell; no code of the archive, and no function that it names, is ever called.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, one_line

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch archive by dotted names; where there is a ``state_dict``, what is below it alone.

    Raises UserError for a file that is no zip archive of torch, is damaged, or holds no tensors.
    """
    root = read_root(path)
    if isinstance(root, Mapping) and isinstance(root.get("state_dict"), Mapping):
        root = root["state_dict"]
    if not (tensors := dict(named_tensors(root))):
        raise UserError(f"{path}: holds no tensors")
    return tensors


def read_root(path: Path) -> Any:
    """What a torch archive holds, with an inert shell in place of every object that is neither a tensor nor plain data.

    Raises UserError for a file that is no zip archive of torch, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
            root = _TensorsOnly(archive, next(pickles).split("/")[0]).load()
            list(named_tensors(root))  # a tree without end is found here
            return root
    except Exception as error:  # a damaged pickle can raise whatever its parser stumbles over
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path}: not a torch archive that can be read without running it ({reason})") from error


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive (it carries code, which we never load)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") > 1 and name.split("/")[1] == "code" for name in archive.namelist())


class _Inert:
    """Stands for an instance of any class that an archive names; keeps what it would be filled with."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


class _TensorsOnly(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self._archive, self._folder = archive, folder
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: _tensor(*args)  # a new function each time, as below
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return type(
            name, (_Inert,), {"__module__": module}
        )  # new each time: an archive can set the attributes of what it is given

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """A storage as a flat tensor: pid is ("storage", type, file, device, number of elements)."""
        _, dtype, name, _, count = pid
        if name not in self._storages:
            found = self._archive.getinfo(f"{self._folder}/data/{name}")
            expected = count * torch.empty(0, dtype=dtype).element_size()
            if found.file_size != expected or found.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"storage {name} has {found.file_size} bytes, expected {expected}")
            data = bytearray(self._archive.read(found))
            self._storages[name] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[name]


def _tensor(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> torch.Tensor:
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} out of {storage.numel()} numbers")
    return storage.as_strided(size, stride, offset).clone()  # as_strided refuses what lies outside the storage


def named_tensors(node: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested mappings and inert shells, with dotted names."""
    if isinstance(node, torch.Tensor):
        yield prefix, node
        return
    children = node.state if isinstance(node, _Inert) else node
    if isinstance(children, Mapping):
        for name, child in children.items():
            yield from named_tensors(child, f"{prefix}.{name}" if prefix else str(name))
