"""From any image file to the canvas: the right pixels come out, and bad files are refused without harm."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shards.canvas import BadImage, load_canvas


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def quarters(width: int = 64, height: int = 64) -> Image.Image:
    """Red, green / blue, white: every turn and mirror image of it looks different."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = 255
    return Image.fromarray(pixels)


def corner_colours(canvas: torch.Tensor) -> list[tuple[int, ...]]:
    """Colours amid the four quarters, rounded to 0 or 255: top left, top right, bottom left, bottom right."""
    side = canvas.shape[1]
    near, far = side // 4, side - side // 4
    return [
        tuple(255 * round(v / 255) for v in canvas[:, row, column].tolist())
        for row in (near, far)
        for column in (near, far)
    ]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """An image stored turned or mirrored comes out upright if its EXIF tag says so: red, green / blue, white."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = quarters().transpose(undo[orientation]) if orientation in undo else quarters()
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert corner_colours(load_canvas(encode(stored, "JPEG", exif=exif, quality=95), 32)) == [RED, GREEN, BLUE, WHITE]


def test_broken_exif_is_no_reason_to_fail_or_to_crash() -> None:
    """Damaged EXIF gives pixels or BadImage, never another exception."""
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encode(quarters(), "JPEG", exif=exif)
    start = good.index(b"Exif\0\0") + 6
    for at in range(start, start + 26):
        for value in (0, 0x7F, 0xFF):
            data = good[:at] + bytes([value]) + good[at + 1 :]
            with contextlib.suppress(BadImage):
                assert load_canvas(data, 32).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("form", "make"),
    [
        ("PNG", lambda image: image),
        ("BMP", lambda image: image),
        ("WEBP", lambda image: image),
        ("TIFF", lambda image: image),
        ("GIF", lambda image: image.quantize(8)),
        ("PNG", lambda image: image.quantize(8)),
        ("JPEG", lambda image: image.convert("CMYK")),
        ("TIFF", lambda image: image.convert("CMYK")),
        ("PNG", lambda image: image.convert("RGBA")),
    ],
)
def test_colours_survive_every_mode(form: str, make: Callable[[Image.Image], Image.Image]) -> None:
    """RGB, palette, CMYK and RGBA files of one picture give one canvas."""
    canvas = load_canvas(encode(make(quarters()), form), 32)
    assert canvas.dtype == torch.uint8 and canvas.shape == (3, 32, 32) and canvas.is_contiguous()
    assert corner_colours(canvas) == [RED, GREEN, BLUE, WHITE]


def test_metadata_that_cannot_be_read_is_passed_over() -> None:
    """Pillow#8965: a negative XResolution, which PIL cannot write back. Pillow#5528: eXIf without a TIFF header."""
    entries = [(0x112, 3, 1, struct.pack("<HH", 6, 0)), (0x11A, 10, 1, struct.pack("<L", 38))]
    body = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + body + struct.pack("<L", 0) + struct.pack("<2l", -1, 1)
    stored = quarters().transpose(Image.Transpose.ROTATE_90)  # which orientation 6 turns back
    turned = encode(stored, "JPEG", exif=exif, quality=95)
    plain = encode(quarters(), "JPEG", quality=95)
    assert corner_colours(load_canvas(turned, 32)) == corner_colours(load_canvas(plain, 32))
    png, chunk = encode(quarters(), "PNG"), b"eXIf" + b"\0\x08\0\x02\x01\x12\0\x03"
    odd = png[:33] + struct.pack(">L", len(chunk) - 4) + chunk + struct.pack(">L", zlib.crc32(chunk)) + png[33:]
    assert torch.equal(load_canvas(odd, 32), load_canvas(png, 32))


def test_transparent_is_white() -> None:
    """Transparent pixels show white, in RGBA, grey with alpha and palettes; half-transparent ones are half white."""
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (load_canvas(encode(clear, "PNG"), 32) == 255).all()
    half = load_canvas(encode(Image.new("RGBA", (40, 40), (0, 0, 0, 128)), "PNG"), 32)
    assert ((half - 127).abs() <= 1).all()
    assert (load_canvas(encode(Image.new("LA", (40, 40), (0, 0)), "PNG"), 32) == 255).all()
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert corner_colours(load_canvas(encode(palette, "PNG"), 32)) == [BLUE] * 4
    assert (load_canvas(encode(palette, "PNG", transparency=1), 32) == 255).all()
    assert (load_canvas(encode(palette, "GIF", transparency=1), 32) == 255).all()


def test_grayscale_and_bilevel() -> None:
    """One grey channel becomes three equal ones; 1-bit images are black and white."""
    ramp = np.tile(np.linspace(0, 255, 32).round().astype(np.uint8), (32, 1))
    canvas = load_canvas(encode(Image.fromarray(ramp), "PNG"), 32)
    assert torch.equal(canvas, torch.from_numpy(ramp).expand(3, 32, 32))
    bilevel = load_canvas(encode(quarters(32, 32).convert("L").point(lambda v: 255 * (v > 127), "1"), "PNG"), 32)
    assert set(bilevel.unique().tolist()) == {0, 255}


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits(form: str) -> None:
    """16-bit grey is scaled to 8 bits, not clipped, whether the image is bright or nearly black."""
    ramp = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    canvas = load_canvas(encode(Image.fromarray(ramp), form), 32).float()
    assert (canvas - torch.from_numpy(ramp.astype(np.float32)) / 257).abs().max() <= 1
    dark = load_canvas(encode(Image.fromarray(np.full((32, 32), 200, np.uint16)), form), 32)
    assert dark.max() <= 1  # 200 / 65535 of white


def test_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        data = encode(
            frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
        )
        assert corner_colours(load_canvas(data, 32)) == [RED] * 4, form


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (33, 100), (500, 32), (16, 40)])
def test_resize_shorter_side_then_centre(width: int, height: int) -> None:
    """The canvas is the centre square of the image: both grey margins on the long side are cut off."""
    side = min(width, height)
    pixels = np.full((height, width, 3), 128, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 255
    canvas = load_canvas(encode(Image.fromarray(pixels), "PNG"), 32)
    assert canvas.shape == (3, 32, 32)
    assert (canvas[:, 6:-6, 6:-6] > 240).all()


def test_an_image_of_the_canvas_s_size_is_untouched() -> None:
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_canvas(encode(Image.fromarray(pixels.permute(1, 2, 0).numpy()), "PNG"), 32), pixels)


def test_large_jpegs_decoded_at_a_fraction_look_the_same() -> None:
    """JPEG's fast decoding at a fraction of the size looks like PNG's full decoding."""
    x, y = np.meshgrid(np.linspace(0, 6, 900), np.linspace(0, 4, 700))
    picture = Image.fromarray(
        np.stack([127 + 120 * np.sin(x + y), 127 + 120 * np.cos(x), 127 + 120 * np.sin(2 * y)], -1).astype(np.uint8)
    )
    fast, full = (
        load_canvas(encode(picture, "JPEG", quality=97), 32).float(),
        load_canvas(encode(picture, "PNG"), 32).float(),
    )
    assert (fast - full).abs().mean() < 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files(form: str) -> None:
    """A file cut off anywhere is a BadImage, not a half-grey picture and not another exception."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    data = encode(noise, form)
    for share in (0.0, 0.05, 0.3, 0.5, 0.9):
        with pytest.raises(BadImage, match="unreadable image"):
            load_canvas(data[: int(share * len(data))], 32)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files(form: str) -> None:
    """Random damage gives pixels or BadImage, never another exception: one bad file must not stop a run."""
    rng = np.random.default_rng(1)
    data = bytearray(encode(quarters(48, 48), form))
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, min(len(data), 300), 3):
            damaged[at] = rng.integers(0, 256)
        with contextlib.suppress(BadImage):
            assert load_canvas(bytes(damaged), 32).shape == (3, 32, 32)


def test_not_images() -> None:
    for data in (b"", b"GIF", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(1000), b"BM" + bytes(100)):
        with pytest.raises(BadImage) as caught:
            load_canvas(data, 32)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
        assert "0x" not in str(caught.value), "an address in memory, which differs from run to run"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers(value: float) -> None:
    """A float image with one NaN is refused: its range is unknown, and all of it would become black."""
    values = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    assert load_canvas(encode(Image.fromarray(values), "TIFF"), 32).max() > 240
    values[0, 0] = value
    with pytest.raises(BadImage, match="are not finite"):
        load_canvas(encode(Image.fromarray(values), "TIFF"), 32)


REMARKS = """
import sys, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shards.canvas import load_canvas
before, data = list(warnings.filters), Path(sys.argv[1]).read_bytes()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: load_canvas(data, 32), range(500)))
assert warnings.filters == before
warnings.warn("of somebody else")
"""


def test_threads_leave_the_filters_of_warnings_alone(tmp_path: Path, forked: Callable[..., Any]) -> None:
    """PIL's remarks on broken EXIF stay silent; other warnings appear, even after many threads have decoded."""
    five_entries = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # claims five entries; none follows
    (tmp_path / "odd.jpg").write_bytes(encode(quarters(), "JPEG", exif=five_entries))
    with pytest.warns(UserWarning, match="EXIF"):
        load_canvas((tmp_path / "odd.jpg").read_bytes(), 32)
    result = forked(REMARKS, tmp_path / "odd.jpg")
    assert result.returncode == 0, result.stderr
    assert "of somebody else" in result.stderr and "EXIF" not in result.stderr


def test_too_small_to_mean_anything() -> None:
    for size in ((1, 1), (1, 50), (50, 1)):
        with pytest.raises(BadImage, match=f"{size[0]} x {size[1]} pixels"):
            load_canvas(encode(Image.new("RGB", size), "PNG"), 32)


LIMITED = """
import resource, sys
from pathlib import Path
from shards.canvas import BadImage, load_canvas
import torch, numpy
load_canvas(Path(sys.argv[2]).read_bytes(), 32)
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (400 << 20),) * 2)
try:
    print("canvas", load_canvas(Path(sys.argv[1]).read_bytes(), 32).shape)
except BadImage as error:
    print("bad", error)
"""


def png_of(width: int, height: int) -> bytes:
    """A black 1-bit PNG of any size, a few kilobytes long."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(min(height, 100_000))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (2_000_000_000, 2)])
def test_giant_images_cost_nothing(width: int, height: int, tmp_path: Path, forked: Callable[..., Any]) -> None:
    """A small file that claims billions of pixels is a BadImage, even with only 400 MB of address space left."""
    (tmp_path / "giant.png").write_bytes(
        png_of(width, 1)[:33].replace(struct.pack(">II", width, 1), struct.pack(">II", width, height))
    )
    (tmp_path / "good.png").write_bytes(png_of(40, 40))
    result = forked(LIMITED, tmp_path / "giant.png", tmp_path / "good.png")
    assert result.stdout.startswith("bad unreadable image"), result


def test_a_long_thin_image_costs_nothing(tmp_path: Path, forked: Callable[..., Any]) -> None:
    """2 x 4,000,000 pixels would take 6 GB if scaled before cropping: the image must be cropped first, or refused."""
    (tmp_path / "thin.png").write_bytes(png_of(4_000_000, 2))
    (tmp_path / "good.png").write_bytes(png_of(40, 40))
    result = forked(LIMITED, tmp_path / "thin.png", tmp_path / "good.png")
    assert result.returncode == 0 and result.stdout.startswith(("bad", "canvas")), result.stderr[-300:]


def test_no_program_is_run_for_an_image(tmp_path: Path, forked: Callable[..., Any]) -> None:
    """An EPS file named .jpg must not reach Ghostscript (a program gs): images are data."""
    marker = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tmp_path / "gs").chmod(0o755)
    eps = tmp_path / "image.jpg"
    eps.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n0 0 40 40 rectfill\nshowpage\n%%EOF\n"
    )
    program = (
        "import sys; from shards.canvas import *\n"
        "try: load_canvas(open(sys.argv[1], 'rb').read(), 32)\nexcept BadImage: print('bad')"
    )
    import os

    result = forked(program, eps, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert not marker.exists() and result.stdout == "bad\n", result.stderr[-300:]
