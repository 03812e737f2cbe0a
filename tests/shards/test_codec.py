"""One codec for writer and reader: equal pixels give equal bytes; bytes that are no image or array are refused."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from manifests import UserError
from shards import ImageFormat, decode_image, encode_image
from shards.codec import decode_array, encode_array, to_float, to_uint8


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """A smooth image whose three channels differ: uint8 [3, 24, 40]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 40), indexing="ij")
    return (torch.stack([x, y, (x + y) / 2]) * 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (ImageFormat(format="png"), 0), (ImageFormat(format="webp", quality=100), 0),
        (ImageFormat(format="jpg"), 3), (ImageFormat(format="webp", quality=95), 4),
        (ImageFormat(format="jpg", quality=40), 12),
    ],
)  # fmt: skip
def test_roundtrip(picture: torch.Tensor, settings: ImageFormat, error: float) -> None:
    """Lossless formats give every pixel back, the others nearly; shape, channel order and bytes are stable."""
    data = encode_image(picture, settings)
    decoded = decode_image(data)
    assert decoded.dtype == torch.uint8 and decoded.shape == picture.shape and decoded.is_contiguous()
    assert (decoded.float() - picture.float()).abs().mean() <= error
    assert encode_image(picture.clone(), settings) == data
    assert encode_image(picture.permute(0, 2, 1).contiguous().permute(0, 2, 1), settings) == data


def test_jpg_keeps_colour_at_full_resolution() -> None:
    """Thin red and green lines keep their colours, for JPEGs are written without chroma subsampling."""
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[0, :, ::2], image[1, :, 1::2] = 255, 255
    decoded = decode_image(encode_image(image, ImageFormat(quality=95)))
    assert (decoded.float() - image.float()).abs().mean() < 10


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
)
def test_only_uint8_rgb_is_encoded(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        encode_image(image, ImageFormat())


def test_what_is_no_image_is_refused_by_name(picture: torch.Tensor) -> None:
    """No bytes, text, half an image and formats that shards do not hold are refused in one line with the given name."""
    whole = encode_image(picture, ImageFormat(format="png"))
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    for data in (
        b"",
        b"text",
        whole[: len(whole) // 2],
        encode_image(picture, ImageFormat())[:300],
        gif.getvalue(),
        header + bytes(50),
    ):
        with pytest.raises(UserError, match=r"^dad-7\.tar: k: unreadable image") as caught:
            decode_image(data, "dad-7.tar: k")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_damaged_images_never_crash(picture: torch.Tensor, form: str) -> None:
    """Random damage gives pixels or a UserError, never another exception."""
    data = encode_image(picture, ImageFormat(format=form))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for at in rng.integers(0, min(len(data), 400), 3):
            damaged[at] = rng.integers(256)
        with contextlib.suppress(UserError):
            decode_image(bytes(damaged))


def test_uint8_and_float() -> None:
    """Conversion rounds to nearest and clamps; every value has an exact way back."""
    values = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 254.6 / 255, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every) and to_float(every).dtype == torch.float32
    kept = values.clone()
    to_uint8(values)
    assert torch.equal(values, kept)  # the caller's images stay as they were
    assert to_uint8(values.bfloat16()).dtype == torch.uint8


def test_array_roundtrip() -> None:
    """Values, shape and dtype come back; equal arrays give equal bytes, whatever their strides."""
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    assert np.array_equal(decode_array(encode_array(array), np.float16, "x"), array)
    assert encode_array(array.T) == encode_array(array.T.copy())
    with pytest.raises(UserError, match="x: dtype float32, expected float16"):
        decode_array(encode_array(array.astype(np.float32)), np.float16, "x")


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_arrays_of_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    """An object array, a bare pickle and an .npz named .npy are refused by name; nothing is unpickled."""
    target = tmp_path / "pwned"
    objects, archive = io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([Trap(target)], dtype=object), allow_pickle=True)
    np.savez(archive, a=np.array([Trap(target)], dtype=object), b=np.zeros(3, np.float16))
    for data in (objects.getvalue(), pickle.dumps(Trap(target)), archive.getvalue()):
        with pytest.raises(UserError, match=r"^shard: k: ") as caught:
            decode_array(data, np.float16, "shard: k")
        assert not target.exists() and "\n" not in str(caught.value)


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def test_hostile_npy_files() -> None:
    """Half an array, terabytes by header, code for a shape and empty zips are refused by name, in little memory."""
    good = encode_array(np.zeros(5, np.float16))
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    hostile = [
        b"", good[:20], good[:-1], b"\x93NUMPY", b"\x93NUMPY\x09\x00" + good[8:], empty.getvalue(),
        npy("{'descr': '<f2', 'fortran_order': False, 'shape': (1099511627776,), }", bytes(10)),
        npy("{'descr': '<f2', 'fortran_order': False, 'shape': (-1,), }", bytes(10)),
        npy("{'descr': '<f2', 'fortran_order': False, 'shape': ('a',), }", bytes(10)),
        npy("{'descr': 'nonsense', 'fortran_order': False, 'shape': (2,), }", bytes(10)),
        npy("{'descr': [('x', '<f2')], 'fortran_order': False, 'shape': (2,), }", bytes(10)),
        npy("__import__('os').abort()"), npy("{" * 100), npy("[" * 110), npy("\0\0"),
    ]  # fmt: skip
    for data in hostile:
        with pytest.raises(UserError, match=r"^shard: k: ") as caught:
            decode_array(data, np.float16, "shard: k")
        assert "\n" not in str(caught.value)
