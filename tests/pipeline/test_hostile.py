"""A stranger's source: whatever its tars hold, no code runs, no file lands outside OUT, memory stays bounded."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from manifests import RunDir, UserError
from pipeline.generate import make_shards
from pipeline.verify import problems
from shards import ShardDataset
from shards.codec import encode_array

HUGE = 60_000  # pixels of each side; decoded it would be 10.8 GB


class Payload:
    """Unpickling it leaves a trace."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def huge_png() -> bytes:
    """A well-formed PNG of 60,000 x 60,000 black pixels in a few hundred kilobytes."""
    row = zlib.compressobj(9)
    data = b"".join(row.compress(bytes(1 + HUGE // 8)) for _ in range(HUGE)) + row.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", HUGE, HUGE, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_hostile_source(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Absolute names, `..`, links, devices, pickles under every name a loader knows, a giant PNG, one good image."""
    marker, outside = tmp_path / "pwned", tmp_path / "outside"
    image = next(world.images.rglob("*_000.jpg")).read_bytes()
    payload = pickle.dumps(Payload(marker))
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    files = {
        f"{outside}/absolute": {"jpg": image}, "../../outside/above": {"jpg": image}, "good": {"jpg": image},
        "code": {"jpg": image, "pyd": payload, "pth": payload, "pkl": payload, "pickle": payload, "pt": payload,
                 "npy": objects.getvalue()},
        "huge": {"png": huge_png()}, "noimage": {"pkl": payload}, "pickled": {"jpg": payload},
    }  # fmt: skip
    source = tmp_path / "source"
    source.mkdir()
    with tarfile.open(source / "hostile.tar", "w") as tar:
        for kind, name in (
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
            (tarfile.CHRTYPE, "dev.jpg"),
            (tarfile.FIFOTYPE, "fifo.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for key, members in files.items():
            for extension, data in (members | {"cls": b"0"}).items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = tmp_path / "run"
    make_shards(world.load(f"source.data={source}", "max_errors=1"), str(out))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, (
        "kilobytes"
    )  # a GB; the PNG alone would need ten
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]
    rows = {row["key"]: row for row in RunDir(out).manifest()[0].to_pylist()}
    assert len(rows) == len(files) and rows["good"]["status"] != "error" and rows["code"]["status"] != "error"
    assert all(rows[key]["status"] == "error" and rows[key]["reason"] for key in ("huge", "noimage", "pickled"))
    assert "pixels" in rows["huge"]["reason"] and list(problems(str(out))) == []


@pytest.mark.parametrize("member", ["logits.npy", "cls", "png"])
def test_hostile_shards(make_run, tmp_path: Path, member: str) -> None:  # type: ignore[no-untyped-def]
    """A stranger's run with correct checksums and pickles as members: verify names them and runs none."""
    marker = tmp_path / "pwned"
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    hostile = {
        "logits.npy": objects.getvalue(),
        "cls": pickle.dumps(Payload(marker)),
        "png": pickle.dumps(Payload(marker)),
    }

    def edit(_stream: str, key: str, members: dict[str, bytes]) -> dict[str, bytes]:
        extra = {"pyd": hostile["cls"], "pth": hostile["cls"], "codes.npy": objects.getvalue()}
        return members | extra | ({member: hostile[member]} if key == "s0-00" else {})

    dataset = ShardDataset(str(make_run(tmp_path / "run", edit=edit)), "dad")
    with pytest.raises(UserError, match=r"dad-000000\.tar: s0-00"):
        dataset[0]
    assert dataset[1].label >= 0 and not marker.exists()


def test_a_hostile_checkpoint(world, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A discretizer whose checkpoint carries code: its code is not run, its tensors do not fit, nothing is made."""
    path = tmp_path / "vqgan.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "extra": Payload(tmp_path / "pwned")}, path)
    told = cli("generate", "--recipe", world.recipe, "--out", tmp_path / "run", "--set", f"discretizer.weights={path}")
    assert str(path) in told.error and "does not fit" in told.error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["vqgan.ckpt"]


def test_hostile_claims(run_copy: Path, cli) -> None:  # type: ignore[no-untyped-def]
    """Files below work/ are text from anyone: broken or strange ones are nobody's claims, and no reason to stop."""
    work = run_copy / "work"
    work.mkdir()
    for name, content in {
        "running-000001.json": b"\x80\x04", "running-000002.json": b"[]", "failed-000000.json": b"{" * 100_000,
        "running-x.json": b"",
        "failed-999999999999.json": b'{"shard": 1e400}', "running-000000.json": encode_array(np.zeros(3, np.float16)),
    }.items():  # fmt: skip
        (work / name).write_bytes(content)
    told = cli("status", run_copy)
    assert told.status == 0 and "3 of 3 shards done" in told.out
