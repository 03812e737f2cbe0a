"""Odd image files of large image sets in the per-shard job: the right pixels, or a row that says why not."""

from __future__ import annotations

import io
import re
import struct
import tarfile
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from manifests import RunDir
from pipeline.job.shard import run_shard
from shards import decode_image
from shards.sources import find_source
from shards.sources.classes import load_classes

Colours = list[tuple[int, ...]]
Row = dict[str, Any]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
QUARTERS = [RED, GREEN, BLUE, WHITE]
GREY = [BLACK, WHITE, BLACK, WHITE]  # red and blue are dark, green and white are bright
SIDE = 64


def quarters() -> Image.Image:
    """Red, green / blue, white: every turn and mirror image of it looks different."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    half = SIDE // 2
    for (row, column), colour in zip(((0, 0), (0, half), (half, 0), (half, half)), QUARTERS, strict=True):
        pixels[row : row + half, column : column + half] = colour
    return Image.fromarray(pixels)


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def frames(form: str, **options: Any) -> bytes:
    """The quarters, and then two other pictures."""
    others = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("black", "yellow")]
    return encode(quarters(), form, save_all=True, append_images=others, **options)


def turned() -> bytes:
    """An image stored on its side, with the EXIF tag for it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(quarters().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)


def ycck() -> bytes:
    """A CMYK JPEG as Photoshop writes it: inverted, C, M and Y as YCbCr, with Adobe's marker (transform 2)."""
    cyan, magenta, yellow, black = quarters().convert("CMYK").split()
    inks = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()
    inverted = [Image.eval(band, lambda value: 255 - value) for band in inks]  # PIL inverts all four once more
    data = bytearray(encode(Image.merge("CMYK", (*inverted, black)), "JPEG", quality=95))
    data[data.index(b"Adobe\0") + 11] = 2
    return bytes(data)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    """A PNG written by hand."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def sixteen_bit_rgb() -> bytes:
    values = np.asarray(quarters()).astype(">u2") * 257
    return png(SIDE, SIDE, 16, 2, b"".join(b"\0" + row.tobytes() for row in values))


def transparent(mode: str) -> bytes:
    """Black where it is opaque (above), nothing below; on white."""
    image = Image.new("LA", (SIDE, SIDE), (0, 0))
    image.paste((0, 255), (0, 0, SIDE, SIDE // 2))
    if mode == "P":
        palette = Image.new("P", (SIDE, SIDE), 1)
        palette.putpalette([0, 0, 0, 255, 0, 0])
        palette.paste(0, (0, 0, SIDE, SIDE // 2))
        return encode(palette, "PNG", transparency=1)
    return encode(image.convert(mode), "PNG")


def grey(scale: float, dtype: Any) -> Image.Image:
    return Image.fromarray((np.asarray(quarters().convert("L"), np.float64) * scale).astype(dtype))


JPEG = encode(quarters(), "JPEG", quality=95)
PNG = encode(quarters(), "PNG")
KINDS: dict[str, tuple[bytes, Colours | str]] = {
    "exif_rotated": (turned(), QUARTERS),
    "cmyk_jpeg": (encode(quarters().convert("CMYK"), "JPEG", quality=95), QUARTERS),
    "adobe_ycck_jpeg": (ycck(), QUARTERS),
    "cmyk_tiff": (encode(quarters().convert("CMYK"), "TIFF"), QUARTERS),
    "progressive_jpeg": (encode(quarters(), "JPEG", progressive=True), QUARTERS),
    "grey_jpeg": (encode(quarters().convert("L"), "JPEG"), GREY),
    "two_pictures_in_a_jpeg": (frames("MPO"), QUARTERS),
    "jpeg_with_garbage_behind": (JPEG + b"<script>" * 100, QUARTERS),
    "png_named_jpeg": (PNG, QUARTERS),
    "gif_named_jpeg": (encode(quarters().quantize(8), "GIF"), QUARTERS),
    "palette_png": (encode(quarters().quantize(8), "PNG"), QUARTERS),
    "palette_with_transparency": (transparent("P"), [BLACK, BLACK, WHITE, WHITE]),
    "grey_with_alpha": (transparent("LA"), [BLACK, BLACK, WHITE, WHITE]),
    "rgb_with_alpha": (transparent("RGBA"), [BLACK, BLACK, WHITE, WHITE]),
    "one_bit": (encode(quarters().convert("L").point(lambda v: 255 * (v > 127), "1"), "PNG"), GREY),
    "sixteen_bit_grey_png": (encode(grey(257, np.uint16), "PNG"), GREY),
    "sixteen_bit_rgb_png": (sixteen_bit_rgb(), QUARTERS),
    "float_tiff": (encode(grey(1, np.float32), "TIFF"), GREY),
    "float_tiff_up_to_one": (encode(grey(1 / 255, np.float32), "TIFF"), GREY),
    "tiff_of_three_pages": (frames("TIFF"), QUARTERS),
    "animated_gif": (frames("GIF"), QUARTERS),
    "animated_webp": (frames("WEBP", lossless=True), QUARTERS),
    "animated_png": (frames("PNG"), QUARTERS),
    "long_and_thin": (encode(Image.new("RGB", (3000, 2), "red"), "PNG"), [RED] * 4),
    "one_pixel_wide": (encode(Image.new("RGB", (1, 500)), "PNG"), "image of 1 x 500 pixels"),
    "truncated_jpeg": (JPEG[:-100], "unreadable image: .*truncated"),
    "truncated_jpeg_header": (JPEG[: len(JPEG) // 3], "unreadable image: .*Truncated"),
    "no_bytes": (b"", "unreadable image"),
    "error_page": (
        b"<!doctype html>\n<html><body>404 Not Found</body></html>",
        "unreadable image: .*header is damaged",
    ),
    "header_bomb": (png(60_000, 60_000, 8, 2, b""), "unreadable image: .*decompression bomb"),
    "png_with_a_bad_checksum": (PNG[:29] + bytes(4) + PNG[33:], "unreadable image: .*(broken PNG|header is damaged)"),
    "png_with_damaged_pixels": (PNG[:60] + bytes([PNG[60] ^ 0x55]) + PNG[61:], "unreadable image"),
    "png_without_pixels": (png(SIDE, SIDE, 8, 0, b""), "unreadable image"),
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\nshowpage\n%%EOF\n",
        "unreadable image: .*header is damaged",
    ),
    "jpeg_2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "unreadable image: .*header is damaged"),
}


@pytest.fixture(scope="module")
def shard(world, models, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Row], dict[str, bytes]]:  # type: ignore[no-untyped-def]
    """Make one shard of all kinds between two good images; returns its rows and stored clean images, by kind."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "images" / "n09").mkdir(parents=True)
    for kind, (data, _) in (KINDS | {"good": (JPEG, QUARTERS)}).items():
        (folder / "images" / "n09" / f"{kind}.JPEG").write_bytes(data)
    classes = load_classes(world.clip / "prompts.yaml")
    (piece,) = find_source(str(folder / "images"), classes, 100).pieces
    rows = run_shard(0, piece, world.load(), classes, models, RunDir(folder / "run"), "run", lambda new: None)
    with tarfile.open(folder / "run" / "clean" / "clean-000000.tar") as tar:
        images = {m.name[4:-4]: tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}  # type: ignore[union-attr]
    return {row["key"].removeprefix("n09-"): row for row in rows}, images


@pytest.mark.parametrize("kind", KINDS)
def test_handled_or_recorded(shard: tuple[dict[str, Row], dict[str, bytes]], kind: str) -> None:
    """The right pixels in the shard, upright and on white; or status error, one line that says why, and no image."""
    rows, images = shard
    row, expected = rows[kind], KINDS[kind][1]
    if isinstance(expected, str):
        assert row["status"] == "error" and re.match(expected, row["reason"]) and len(row["reason"]) < 200
        assert kind not in images and "\n" not in row["reason"]
        return
    assert row["status"] in ("verified", "rejected")
    canvas = decode_image(images[kind])
    near, far = canvas.shape[1] // 4, 3 * canvas.shape[1] // 4
    seen = [canvas[:, y, x].tolist() for y in (near, far) for x in (near, far)]
    assert [tuple(255 * round(value / 255) for value in colour) for colour in seen] == expected


def test_the_run_goes_on(shard: tuple[dict[str, Row], dict[str, bytes]]) -> None:
    """One row for each of more than twenty kinds; every good one has been judged."""
    rows, images = shard
    bad = {kind for kind, (_, expected) in KINDS.items() if isinstance(expected, str)}
    assert len(KINDS) > 20 and rows.keys() == KINDS.keys() | {"good"}
    assert {kind for kind, row in rows.items() if row["status"] == "error"} == bad
    assert images.keys() == rows.keys() - bad
