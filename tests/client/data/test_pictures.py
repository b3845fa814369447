"""Pictures and mask pictures of every form: the values that were stored, or a reason."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_lab import spec
from PIL import Image

from medfl.client.data.case import Quarantine
from medfl.client.data.names import Meaning
from medfl.client.data.pictures import read_mask, read_picture
from medfl.shared.data_spec import DataSpec

GREY = spec(modality="xray", preprocessing={"normalise": "zscore", "size": (32, 32)})
BYTES = spec(modality="xray", preprocessing={"normalise": "scale_255", "size": (32, 32)})
COLOUR = spec(modality="photo", channels=3, preprocessing={"normalise": "scale_255", "size": (32, 32)})
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10), np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (12, 10, 3), np.uint8)


def palette(colours: list[int]) -> Image.Image:
    picture = Image.fromarray(PIXELS % 3, "P")
    picture.putpalette(colours)
    return picture


def with_alpha(alpha: int) -> Image.Image:
    picture = Image.fromarray(RGB)
    picture.putalpha(alpha)
    return picture


@pytest.mark.parametrize(
    ("picture", "name", "study", "truth"),
    [
        (Image.fromarray(PIXELS), "p.png", BYTES, PIXELS[None]),
        (Image.fromarray(PIXELS), "p.tif", BYTES, PIXELS[None]),
        (Image.fromarray(PIXELS.astype(np.uint16) * 257), "p.png", GREY, PIXELS[None] * 257.0),
        (Image.fromarray(PIXELS.astype(np.float32) / 2), "p.tif", GREY, PIXELS[None] / 2),
        (Image.fromarray(PIXELS > 99), "p.png", BYTES, (PIXELS[None] > 99) * 255.0),  # black and white, not 0 and 1
        (Image.fromarray(RGB), "p.png", COLOUR, np.moveaxis(RGB, 2, 0)),
        (with_alpha(255), "p.png", COLOUR, np.moveaxis(RGB, 2, 0)),
        (Image.fromarray(PIXELS).convert("LA"), "p.png", BYTES, PIXELS[None]),
        (palette([9, 9, 9, 80, 80, 80, 200, 200, 200]), "p.png", BYTES, np.array([9, 80, 200])[PIXELS % 3][None]),
        (
            palette([9, 0, 0, 0, 80, 0, 0, 0, 200]),
            "p.png",
            COLOUR,
            np.moveaxis(np.diag([9, 80, 200])[PIXELS % 3], 2, 0),
        ),
    ],
)
def test_values_are_those_that_were_stored(
    picture: Image.Image, name: str, study: DataSpec, truth: Any, tmp_path: Path
) -> None:
    picture.save(tmp_path / name)
    assert np.array_equal(read_picture(tmp_path / name, study), truth)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    ("picture", "name", "options", "study", "reason"),
    [
        (with_alpha(0), "p.png", {}, COLOUR, "transparency"),
        (with_alpha(254), "p.png", {}, COLOUR, "transparency"),
        (Image.fromarray(PIXELS), "p.png", {"transparency": int(PIXELS[0, 0])}, BYTES, "transparency"),
        (palette([1, 1, 1, 2, 2, 2, 3, 3, 3]), "p.png", {"transparency": 1}, BYTES, "transparency"),
        (Image.fromarray(RGB).convert("CMYK"), "p.jpg", {}, COLOUR, "unknown colour space"),
        (Image.fromarray(RGB).convert("LAB"), "p.tif", {}, COLOUR, "unknown colour space"),
        (Image.fromarray(RGB), "p.jpg", {"exif": rotated()}, COLOUR, "EXIF says is rotated"),
        (Image.fromarray(RGB), "p.png", {"exif": rotated()}, COLOUR, "EXIF says is rotated"),
        (Image.fromarray(RGB), "p.tif", {"exif": rotated()}, COLOUR, "EXIF says is rotated"),
        (
            Image.fromarray(PIXELS),
            "p.tif",
            {"save_all": True, "append_images": [Image.fromarray(PIXELS)]},
            BYTES,
            "several pages",
        ),
        (Image.fromarray(PIXELS.astype(np.uint16)), "p.png", {}, BYTES, "more than 8 bits, but the study divides"),
        (Image.fromarray(PIXELS.astype(np.float32)), "p.tif", {}, BYTES, "more than 8 bits, but the study divides"),
        (Image.fromarray(RGB), "p.png", {}, BYTES, "colour picture, but the study has one channel"),
        (Image.fromarray(PIXELS), "p.png", {}, COLOUR, "picture of 1 channels"),
    ],
)
def test_what_would_have_to_be_guessed_is_left_out(
    picture: Image.Image, name: str, options: dict[str, Any], study: DataSpec, reason: str, tmp_path: Path
) -> None:
    picture.save(tmp_path / name, **options)
    with pytest.raises(Quarantine, match=reason):
        read_picture(tmp_path / name, study)


def tiff(path: Path, tags: dict[int, tuple[int, int, int]], pixels: bytes) -> Path:
    """A little-endian TIFF file by hand: tag -> (type, count, value)."""
    entries = {256: (3, 1, 4), 257: (3, 1, 4), 259: (3, 1, 1), 278: (3, 1, 4), 279: (4, 1, len(pixels)), **tags}
    entries[273] = (4, 1, 8 + 2 + 12 * (len(entries) + 1) + 4)
    rows = b"".join(
        tag.to_bytes(2, "little")
        + kind.to_bytes(2, "little")
        + count.to_bytes(4, "little")
        + value.to_bytes(4, "little")
        for tag, (kind, count, value) in sorted(entries.items())
    )
    path.write_bytes(b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + rows + bytes(4) + pixels)
    return path


def test_white_that_is_zero_is_turned_round_or_refused(tmp_path: Path) -> None:
    ramp = np.arange(16, dtype=np.uint8)
    eight = tiff(tmp_path / "8.tif", {258: (3, 1, 8), 262: (3, 1, 0)}, ramp.tobytes())
    assert np.array_equal(read_picture(eight, BYTES)[0].ravel(), 255 - ramp)
    sixteen = tiff(tmp_path / "16.tif", {258: (3, 1, 16), 262: (3, 1, 0)}, ramp.astype("<u2").tobytes())
    with pytest.raises(Quarantine, match="unknown colour space"):
        read_picture(sixteen, GREY)
    upright = tiff(tmp_path / "b.tif", {258: (3, 1, 16), 262: (3, 1, 1)}, ramp.astype("<u2").tobytes())
    assert np.array_equal(read_picture(upright, GREY)[0].ravel(), ramp)


def png(depth: int, kind: int, rows: bytes, checksum_of: bytes | None = None) -> bytes:
    """8 x 8 pixels as PNG by hand; the pixels' checksum may be another's."""

    def chunk(name: bytes, content: bytes, summed: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + summed))

    head, packed = struct.pack(">IIBBBBB", 8, 8, depth, kind, 0, 0, 0), zlib.compress(rows)
    summed = packed if checksum_of is None else zlib.compress(checksum_of)
    parts = chunk(b"IHDR", head, head) + chunk(b"IDAT", packed, summed) + chunk(b"IEND", b"", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_colours_of_sixteen_bits_are_not_cut_to_eight(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(16, 2, (b"\0" + bytes(6 * 8)) * 8))
    with pytest.raises(Quarantine, match="colour picture of more than 8 bits"):
        read_picture(tmp_path / "p.png", COLOUR)


def test_pixels_that_are_not_those_of_their_checksum_are_noticed(tmp_path: Path) -> None:
    black, white = (b"\0" + bytes(8)) * 8, (b"\0" + b"\xff" * 8) * 8
    (tmp_path / "p.png").write_bytes(png(8, 0, white))
    assert (read_picture(tmp_path / "p.png", BYTES) == 255).all()
    (tmp_path / "p.png").write_bytes(png(8, 0, white, checksum_of=black))
    with pytest.raises(Quarantine, match="unreadable picture"):
        read_picture(tmp_path / "p.png", BYTES)


@pytest.mark.parametrize("at", [60, 100, -30, -18])
def test_a_flipped_bit_of_a_png_is_noticed(at: int, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "p.png", compress_level=0)
    content = bytearray((tmp_path / "p.png").read_bytes())
    content[at] ^= 1
    (tmp_path / "p.png").write_bytes(content)
    with pytest.raises(Quarantine, match="unreadable picture"):
        read_picture(tmp_path / "p.png", BYTES)


SQUARE = np.zeros((12, 10), np.uint8)
SQUARE[3:8, 2:7] = 1
TWO, THREE = spec(), spec(classes=("background", "organ", "lesion"))


@pytest.mark.parametrize("values", [SQUARE, SQUARE * 255, SQUARE.astype(bool), SQUARE.astype(np.uint16) * 65535])
def test_one_class_may_be_one_or_white(values: Any, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", Meaning(TWO, white=True), (12, 10)), SQUARE)


def test_indices_of_a_palette_with_colours_are_the_classes(tmp_path: Path) -> None:
    picture = Image.fromarray(SQUARE * 2, "P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 128, 128, 128])  # as Pascal VOC's: one of its colours is a grey
    picture.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", Meaning(THREE, white=True), (12, 10)), SQUARE * 2)


@pytest.mark.parametrize(
    ("values", "study", "reason"),
    [
        (SQUARE * 2, TWO, "mask value that is no class"),  # another finding's number
        (SQUARE * 3, THREE, "mask value that is no class"),
        (SQUARE * 255, THREE, "mask value that is no class"),
        (SQUARE * np.float32(0.5), TWO, "not whole"),
        (SQUARE * np.float32(np.nan), TWO, "not whole"),
        (SQUARE * np.int32(-1), THREE, "mask value that is no class"),
        (RGB, TWO, "mask in colour"),
        (SQUARE[:10], TWO, "differ in size"),
        (SQUARE, spec(label_map={"3": "lesion"}), "mask value that is no class"),  # whose 1 is something else
    ],
)
def test_masks_that_could_mean_two_things_are_refused(
    values: Any, study: DataSpec, reason: str, tmp_path: Path
) -> None:
    Image.fromarray(values).save(tmp_path / "m.tif")
    with pytest.raises(Quarantine, match=reason):
        read_mask(tmp_path / "m.tif", Meaning(study, white=True), (12, 10))


def test_edges_that_compression_has_blurred_are_no_mask(tmp_path: Path) -> None:
    Image.fromarray(SQUARE * 255).resize((100, 120)).save(tmp_path / "m.jpg", quality=60)
    with pytest.raises(Quarantine, match="mask value that is no class"):
        read_mask(tmp_path / "m.jpg", Meaning(TWO, white=True), (120, 100))


def test_names_of_numbers_count_before_places(tmp_path: Path) -> None:
    Image.fromarray(SQUARE * 128).save(tmp_path / "m.png")
    for study, aliases in ((spec(label_map={"128": "lesion"}), {}), (TWO, {"128": "lesion"})):
        assert np.array_equal(read_mask(tmp_path / "m.png", Meaning(study, aliases, white=True), (12, 10)), SQUARE)
