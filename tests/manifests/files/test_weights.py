"""Weights from files that may come from anywhere: tensors, or a refusal that names the file."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from manifests import UserError, find_file, load_weights
from manifests.files.weights import files_fingerprint, find_weights
from manifests.recipe import PROJECT

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def equal(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], value) for name, value in STATE.items())


def test_layouts(tmp_path: Path) -> None:
    """safetensors, a torch state dict (bare, or below ``state_dict``), torch's old format: the same tensors."""
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "b.pt")
    torch.save({"state_dict": STATE, "epoch": 4}, tmp_path / "c.ckpt")
    torch.save(STATE, tmp_path / "d.pth", _use_new_zipfile_serialization=False)
    assert all(equal(load_weights(tmp_path / name)) for name in ("a.safetensors", "b.pt", "c.ckpt", "d.pth"))


def test_wrappings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints of timm, torchvision's references, DeiT, Lightning, DDP and torch.compile fit a target's names."""
    average = {name: value + 1 for name, value in STATE.items()}
    settings = argparse.Namespace(lr=0.1)

    def prefixed(*prefixes: str) -> dict[str, torch.Tensor]:
        return {"".join(prefixes) + name: value for name, value in STATE.items()}

    trees = {
        "timm": {"epoch": 3, "state_dict": STATE, "args": settings, "metric": 75.1},
        "torchvision": {
            "model": prefixed("module."),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
            "args": settings,
        },
        "deit": {"model": STATE, "scaler": {"scale": torch.ones(1)}},
        "compiled": prefixed("_orig_mod."),
        "both": prefixed("_orig_mod.", "module."),
        "lightning": {"state_dict": prefixed("model.") | {"loss.weight": torch.ones(3)}, "callbacks": {}},
        "diffusion": {"state_dict": prefixed("first_stage_model.") | {"unet.weight": torch.ones(3)}},
    }
    for name, tree in trees.items():
        torch.save(tree, tmp_path / f"{name}.pth")
        assert equal(load_weights(tmp_path / f"{name}.pth", STATE.keys())), name
    assert capsys.readouterr().err == ""
    torch.save({"state_dict": STATE, "state_dict_ema": average, "args": settings}, tmp_path / "best.pth.tar")
    assert equal(load_weights(tmp_path / "best.pth.tar"))
    said = capsys.readouterr().err
    assert "the weights of state_dict are taken; state_dict_ema is there too: best.pth.tar#state_dict_ema" in said
    found = load_weights(find_weights(f"{tmp_path}/best.pth.tar#state_dict_ema", "x"))
    assert all(torch.equal(found[name], value) for name, value in average.items())
    with pytest.raises(
        UserError, match=r"best\.pth\.tar#ema: holds no such weights; it has state_dict, state_dict_ema"
    ):
        load_weights(find_weights(f"{tmp_path}/best.pth.tar#ema", "x"))
    with pytest.raises(UserError, match=r"^x: .*gone\.pth: no such file"):
        find_weights(f"{tmp_path}/gone.pth#ema", "x")


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_is_never_run(tmp_path: Path) -> None:
    """An object in a torch file or a bare pickle does not run: an inert shell stands for it, or the file is refused."""
    target = tmp_path / "pwned"
    torch.save({"state_dict": STATE, "hook": Trap(target)}, tmp_path / "new.pt")
    torch.save({"state_dict": STATE, "hook": Trap(target)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Trap(target)))
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps(Trap(target)))
    assert equal(load_weights(tmp_path / "new.pt")) and not target.exists()
    for name in ("old.pt", "bare.pkl", "named.safetensors"):
        with pytest.raises(UserError, match=name) as caught:
            load_weights(tmp_path / name)
        assert not target.exists() and "\n" not in str(caught.value)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    """Half a download, an error page, random bytes, a list: each refused by name; a page is not called pickled code."""
    torch.save(STATE, tmp_path / "whole.pt")
    save_file(STATE, tmp_path / "whole.safetensors")
    generator = torch.Generator().manual_seed(0)
    contents = {
        "page.pt": b"<html><body>404 Not Found</body></html>", "empty.pt": b"", "empty.safetensors": b"",
        "tree.safetensors": b"{}",
        "huge.safetensors": struct.pack("<Q", 2**62) + b"{}", "half.pt": (tmp_path / "whole.pt").read_bytes()[:700],
        "half.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:-3], "zip.pt": b"PK\3\4" + bytes(100),
        **{f"random{n}.pt": bytes(torch.randint(0, 256, (300,), generator=generator).tolist()) for n in range(20)},
        **{
            f"pickle{n}.pt": b"\x80\x02" + bytes(torch.randint(0, 256, (50,), generator=generator).tolist())
            for n in range(20)
        },
    }  # fmt: skip
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name) as caught:
            load_weights(tmp_path / name)
        assert "\n" not in str(caught.value), name
    with pytest.raises(UserError, match=r"page\.pt: not a readable checkpoint"):
        load_weights(tmp_path / "page.pt")
    for tree in ([1, 2], {"a": 3}, torch.ones(2)):
        torch.save(tree, tmp_path / "tree.pt")
        with pytest.raises(UserError, match=r"tree\.pt: expected a state dict of tensors"):
            load_weights(tmp_path / "tree.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_weights(tmp_path)


def test_find_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As given, from the home folder, or below the project; otherwise the recipe's field is named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pt").write_bytes(b"")
    assert find_file("w.pt", "x").resolve() == tmp_path / "w.pt" and find_file("~/w.pt", "x") == tmp_path / "w.pt"
    assert find_file("setup.cfg", "x") == PROJECT / "setup.cfg"
    with pytest.raises(
        UserError, match=r"^teacher\.weights: gone\.pt: no such file or folder; .*--set teacher\.weights=PATH"
    ):
        find_file("gone.pt", "teacher.weights")


def test_files_fingerprint(tmp_path: Path) -> None:
    """The digest covers the contents in order; names do not matter, but moving bytes between files does."""
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"one"), b.write_bytes(b"two"), c.write_bytes(b"one")
    assert files_fingerprint([a, b]) == files_fingerprint([c, b]) != files_fingerprint([b, a])
    before = files_fingerprint([a, b])
    a.write_bytes(b"onet"), b.write_bytes(b"wo")
    assert files_fingerprint([a, b]) != before and len(before) == 16
