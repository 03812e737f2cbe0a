"""Images and logits to bytes and back. Writer and reader share this codec, so that both stages see the same pixels."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from manifests.errors import UserError, one_line
from manifests.recipe import recipe_dataclass

EXTENSIONS = ("jpg", "png", "webp")


@recipe_dataclass
class ImageFormat:
    """The file format of stored images."""

    format: Literal["jpg", "png", "webp"] = "jpg"
    """png is lossless; webp is lossless at quality 100."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of jpg (without chroma subsampling) and webp."""


def encode_image(image: torch.Tensor, settings: ImageFormat) -> bytes:
    """Encode one image, uint8 [3, H, W]. The same pixels give the same bytes."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"expected uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    if settings.format == "jpg":
        picture.save(buffer, "JPEG", quality=settings.quality, subsampling=0)
    elif settings.format == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "WEBP", quality=settings.quality, lossless=settings.quality == 100)
    return buffer.getvalue()


def decode_image(data: bytes, where: str = "image") -> torch.Tensor:
    """Decode a stored image to uint8 [3, H, W]. Raises UserError naming ``where``."""
    return torch.from_numpy(decode_pixels(data, where)).permute(2, 0, 1).contiguous()


def decode_pixels(data: bytes, where: str = "image") -> np.ndarray:
    """Decode a stored image to uint8 [H, W, 3]. Raises UserError naming ``where``."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as picture:
            pixels: np.ndarray = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: unreadable image ({one_line(error)})") from error
    return pixels


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [0, 1] -> uint8, rounded to nearest."""
    return (images.float() * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images -> float32 in [0, 1]."""
    return images.float() / 255


def encode_array(array: np.ndarray) -> bytes:
    """Encode a numeric array as the bytes of a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def decode_array(data: bytes, dtype: type[np.generic] | np.dtype[np.void], where: str) -> np.ndarray:
    """Decode a ``.npy`` of exactly ``dtype``; never unpickles. Raises UserError naming ``where``."""
    shape, found, start = _npy_header(data, where)
    if found != dtype:
        raise UserError(f"{where}: dtype {found}, expected {np.dtype(dtype)}")
    try:
        return np.frombuffer(data, found, count=math.prod(shape), offset=start).reshape(shape).copy()
    except ValueError as error:
        raise UserError(f"{where}: not a plain .npy array ({error})") from error


def array_dtype(data: bytes, where: str) -> np.dtype[Any]:
    """The dtype of a ``.npy``. Raises UserError naming ``where``."""
    return _npy_header(data, where)[1]


def _npy_header(data: bytes, where: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    start = 10 + int.from_bytes(data[8:10], "little")
    try:
        return (*_parse_npy_header(data[:start]), start)
    except Exception as error:  # numpy's header parser raises more kinds of error than it documents
        raise UserError(f"{where}: not a plain .npy array ({one_line(error)})") from error


@lru_cache(maxsize=64)
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) from a version 1.0 header in C order. The arrays of a run share one header, so parse it once."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError("not in C order, of negative shape, or of Python objects")
    return shape, dtype
