"""Tensors out of archives that hold more than tensors: exactly those, and nothing of the archive is ever run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manifests import UserError, load_weights
from manifests.files import archive as archive_module
from manifests.files.archive import is_torchscript, read_tensors

BASE = torch.arange(24.0).view(4, 6)
STATE = {
    "encoder.weight": BASE.clone(),
    "encoder.half": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).half(),
    "encoder.bf16": torch.ones(2, 2, dtype=torch.bfloat16),
    "view.transposed": BASE.t(),
    "view.stretch": BASE.view(-1)[5:15:3],
    "counter": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
    "parameter": nn.Parameter(torch.ones(2)),
    "loss.discriminator.weight": torch.full((3,), 2.0),
}


class Recipe:
    """Stands in a module that is gone when the file is read, as a training script's classes are."""

    def __init__(self) -> None:
        self.learning_rate = 1e-4


def lightning(path: Path, state: dict[str, torch.Tensor] = STATE, **extra: Any) -> Path:
    """A checkpoint in Lightning's layout: callbacks keyed by class, hyper-parameters as an object, optimizer states."""
    gone = types.ModuleType("a_training_script")
    callback = type("ModelCheckpoint", (), {"__module__": gone.__name__})
    settings = type("Settings", (Recipe,), {"__module__": gone.__name__})
    gone.ModelCheckpoint, gone.Settings = callback, settings  # type: ignore[attr-defined]
    sys.modules[gone.__name__] = gone
    try:
        momentum = {"state": {0: {"exp_avg": torch.ones(5), "step": 3}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        torch.save(
            {
                "epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.0.8", "state_dict": state,
                "callbacks": {callback: {"best_model_score": torch.tensor(0.5)}}, "optimizer_states": [momentum],
                "lr_schedulers": [], "hyper_parameters": settings(), **extra,
            },
            path,
        )  # fmt: skip
    finally:
        del sys.modules[gone.__name__]
    return path


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_lightning_checkpoint(tmp_path: Path) -> None:
    """The state dict comes out to the bit: views, half precision, parameters, empty tensors; no class is imported."""
    path = lightning(tmp_path / "last.ckpt")
    assert_same(load_weights(path), STATE)
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        torch.load(path, weights_only=False)
    found = read_tensors(path)
    assert_same(found, STATE)
    found["encoder.weight"] += 1  # each has its own memory
    assert torch.equal(found["view.transposed"], BASE.t())


def test_plain_state_dicts(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "bare.pt")
    torch.save({"model": {"a": STATE["counter"]}, "epoch": 3}, tmp_path / "nested.pt")
    assert_same(read_tensors(tmp_path / "bare.pt"), STATE)
    assert_same(read_tensors(tmp_path / "nested.pt"), {"model.a": STATE["counter"]})


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.register_buffer("size", torch.tensor(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x) * self.scale
        return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("half", [False, True])
def test_a_torchscript_archive(tmp_path: Path, half: bool) -> None:
    """Scripted and traced modules: the tensors of their state dict, without loading their code."""
    torch.manual_seed(0)
    module = Small().half() if half else Small()
    x = torch.rand(1, 3, 8, 8).to(module.scale.dtype)
    for name, compiled in (("script", torch.jit.script(module)), ("trace", torch.jit.trace(module.eval(), x))):
        path = tmp_path / f"{name}.pt"
        compiled.save(str(path))
        assert is_torchscript(path)
        assert_same(read_tensors(path), module.state_dict())
    torch.save(module.state_dict(), tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_text("no archive")
    assert not is_torchscript(tmp_path / "plain.pt") and not is_torchscript(tmp_path / "text.pt")


class Trap:
    """Unpickling it makes a folder, by one of the ways that a pickle has."""

    def __init__(self, target: Path, way: str) -> None:
        self.target, self.way = target, way

    def __reduce__(self) -> tuple[Any, ...]:
        inner = Trap(self.target, "call")
        program = f"__import__('os').path.isdir({str(self.target)!r}) or __import__('os').mkdir({str(self.target)!r})"
        ways: dict[str, Callable[[], tuple[Any, ...]]] = {
            "call": lambda: (eval, (program,)),
            "execute": lambda: (exec, (program,)),
            "state": lambda: (Recipe, (), {"learning_rate": inner}),
            "items": lambda: (list, (), None, iter([inner])),
            "pairs": lambda: (dict, (), None, iter([]), iter([("a", inner)])),
            "loads": lambda: (pickle.loads, (pickle.dumps(inner),)),
        }
        return ways[self.way]()


@pytest.mark.parametrize("way", ["call", "execute", "state", "items", "pairs", "loads"])
@pytest.mark.parametrize("place", ["beside", "inside", "nested", "key"])
def test_traps_are_never_run(tmp_path: Path, way: str, place: str) -> None:
    """Whatever a pickle would call, wherever it stands: the tensors come out, the code does not run."""
    target = tmp_path / "pwned"
    trap = Trap(target, way)
    places: dict[str, dict[str, Any]] = {
        "beside": {"hook": trap},
        "nested": {"hook": [{"a": (trap, [trap])}]},
        "key": {"hook": {trap: 1}},
    }
    state: dict[str, Any] = STATE | ({"hook": trap} if place == "inside" else {})
    path = lightning(tmp_path / "evil.ckpt", state, **places.get(place, {}))
    found = read_tensors(path)
    assert not target.exists()
    assert_same({name: tensor for name, tensor in found.items() if name in STATE}, STATE)
    sys.modules["a_training_script"] = gone = types.ModuleType("a_training_script")
    gone.ModelCheckpoint = gone.Settings = type("Any", (), {})  # type: ignore[attr-defined]
    try:
        with contextlib.suppress(TypeError):  # a list is no key; by then it is too late
            torch.load(path, weights_only=False)
    finally:
        del sys.modules["a_training_script"]
    assert target.exists()  # the trap works: it was the reader that held it


def archive(path: Path, program: bytes, **files: bytes) -> Path:
    """A torch archive whose data.pkl is a program of pickle opcodes."""
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", program)
        for name, data in files.items():
            target.writestr(f"archive/data/{name}", data)
    return path


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04" + text("builtins") + text("eval") + b"\x93" + text("COMMAND") + b"\x85R.",  # STACK_GLOBAL, REDUCE
        b"\x80\x04cbuiltins\neval\n" + text("COMMAND") + b"\x85R.",  # GLOBAL
        b"(" + text("COMMAND") + b"ibuiltins\neval\n.",  # INST
        b"\x80\x02(cbuiltins\neval\n" + text("COMMAND") + b"o.",  # OBJ
        b"\x80\x02cbuiltins\neval\n" + text("COMMAND") + b"\x85\x81.",  # NEWOBJ
        b"\x80\x04"
        + text("torch._utils")
        + text("_rebuild_tensor_v2.__globals__")
        + b"\x93"
        + text("COMMAND")
        + b"\x85R.",
        b"\x80\x04" + text("torch") + text("hub.load") + b"\x93" + text("COMMAND") + b"\x85R.",
        b"\x80\x04" + text("manifests.files.archive") + text("read_tensors") + b"\x93" + text("COMMAND") + b"\x85R.",
        b"\x80\x02\x82\x01.",  # EXT1
    ],
)
def test_pickle_programs(tmp_path: Path, program: bytes) -> None:
    """Opcodes by hand: nothing is called, and what is left holds no tensors."""
    target = tmp_path / "pwned"
    command = f"__import__('os').mkdir('{target}')"
    path = archive(tmp_path / "evil.pt", program.replace(b"\x07COMMAND", bytes([len(command)]) + command.encode()))
    with pytest.raises(UserError, match=r"evil\.pt") as caught:
        read_tensors(path)
    assert not target.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "module_name", ["torch._utils _rebuild_tensor_v2", "collections OrderedDict", "torch FloatStorage", "os path"]
)
def test_an_archive_changes_nothing_of_ours(tmp_path: Path, module_name: str) -> None:
    """A pickle may set attributes of whatever it is given (BUILD): what it is given is never shared."""
    before = archive_module._tensor.__name__, OrderedDict.__name__, str(torch.float32), os.path.__name__
    build = b"N}" + text("__name__") + text("taken") + b"s\x86b."  # BUILD with (None, {"__name__": "taken"})
    names = b"".join(text(part) for part in module_name.split())
    path = archive(tmp_path / "evil.pt", b"\x80\x04" + names + b"\x93" + build)
    with pytest.raises(UserError, match=r"evil\.pt"):
        read_tensors(path)
    assert before == (archive_module._tensor.__name__, OrderedDict.__name__, str(torch.float32), os.path.__name__)


class Forged:
    """Four floats that are pickled as a tensor of another shape."""

    def __init__(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.shape = (offset, size, stride)

    def __reduce__(self) -> tuple[Any, ...]:
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32, _internal=True
        )
        return torch._utils._rebuild_tensor_v2, (storage, *self.shape, False, {})


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (2, (3,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (1 << 34,), (0,)),
    ],
)
def test_shapes_that_leave_their_storage(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    """A tensor that would read beside its storage, or grow to 64 GiB out of four numbers, is refused in one line."""
    torch.save({"a": Forged(1, (3,), (1,)), "b": Forged(0, (2, 2), (1, 2))}, tmp_path / "good.pt")
    expected = {"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([[0.0, 2], [1, 3]])}
    assert_same(read_tensors(tmp_path / "good.pt"), expected)
    torch.save({"a": Forged(offset, size, stride)}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad\.pt: not a torch archive") as caught:
        read_tensors(tmp_path / "bad.pt")
    assert "\n" not in str(caught.value)


def test_damaged_archives(tmp_path: Path) -> None:
    """Cut off, altered, of another kind, compressed, without tensors: each refused by name, in one line."""
    whole = lightning(tmp_path / "whole.ckpt").read_bytes()
    files = {f"cut{share}.ckpt": whole[: len(whole) * share // 100] for share in (0, 1, 50, 90, 99)}
    place = whole.index(bytes(BASE.numpy().tobytes()))
    # zip's checksum finds the flipped bit
    files["flipped.ckpt"] = whole[: place + 9] + bytes([whole[place + 9] ^ 1]) + whole[place + 10 :]
    files["page.ckpt"] = b"<!doctype html>\n<p>404 not found"
    files["pickle.ckpt"] = pickle.dumps({"a": 1})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as other:
        other.writestr("word/document.xml", "<a/>")
    files["office.ckpt"] = buffer.getvalue()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    torch.save(dict(STATE), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3}, tmp_path / "nothing.ckpt")
    packed = zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as old, packed:
        for name in old.namelist():
            packed.writestr(name, old.read(name))
    for name in (*files, "old.ckpt", "nothing.ckpt", "packed.ckpt", "missing.ckpt"):
        with pytest.raises(UserError, match=name) as caught:
            read_tensors(tmp_path / name)
        assert "\n" not in str(caught.value), name


def test_storages_of_another_size(tmp_path: Path) -> None:
    """A storage shorter than its pickle says is refused; so is one that is not there."""
    torch.save({"a": torch.arange(4.0)}, tmp_path / "good.pt")
    for name, edit in (("short.pt", lambda data: data[:-4]), ("gone.pt", None)):
        with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(tmp_path / name, "w") as new:
            for member in old.namelist():
                if not member.endswith("/data/0"):
                    new.writestr(member, old.read(member))
                elif edit is not None:
                    new.writestr(member, edit(old.read(member)))
        with pytest.raises(UserError, match=rf"{name}: not a torch archive"):
            read_tensors(tmp_path / name)


def test_any_flipped_bit(tmp_path: Path) -> None:
    """A flipped bit anywhere gives the same tensors or a refusal, never other numbers, never another exception."""
    path = lightning(tmp_path / "last.ckpt")
    data = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for at in torch.randint(len(data), (300,), generator=generator).tolist():
        bit = int(torch.randint(8, (), generator=generator))
        data[at] ^= 1 << bit
        path.write_bytes(data)
        try:
            assert_same(read_tensors(path), STATE)
        except UserError:
            refused += 1
        data[at] ^= 1 << bit
    assert refused > 100
