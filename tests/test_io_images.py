"""The opener of images: the right value or a refusal with the file's name; which files count."""

import io
import os
import sys

import numpy as np
import PIL
import pytest
from PIL import ExifTags, Image

from bitflow_edu.io import images
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.images import find_images, left_out_line, open_image

RAMP = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
GREY = Image.fromarray(RAMP)
COLOUR = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def stored(image, kind="PNG", **options):
    """An image as the bytes of a file."""
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def read(data, mode="RGB"):
    return np.asarray(open_image(io.BytesIO(data), mode, "some.png")).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_greys_keep_their_brightness(kind):
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(read(stored(deep, kind), "L"), RAMP)
    assert np.array_equal(read(stored(deep, kind)), np.stack([RAMP] * 3, axis=-1))


def tiff(values, bits, photometric):
    """An uncompressed little-endian TIFF of one strip of greys."""
    packed = values.astype("<u2").tobytes()
    if bits == 12:  # two values in three bytes, the first one's high bits first
        a, b = values.reshape(-1, 2).T.astype(int)
        packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8}
    tags |= {277: 1, 278: height, 279: len(packed)}
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little")
        for tag, value in tags.items()
    )
    head = b"II*\0" + (8 + len(packed)).to_bytes(4, "little")
    return head + packed + len(tags).to_bytes(2, "little") + entries + b"\0\0\0\0"


def test_deep_tiffs_say_how_many_bits_and_which_end_is_white():
    deep = RAMP[:, :12].astype(int)
    assert np.array_equal(read(tiff(deep * 257, 16, 1), "L"), deep)
    assert np.array_equal(read(tiff(65535 - deep * 257, 16, 0), "L"), deep)
    assert np.abs(read(tiff(deep * 4095 // 255, 12, 1), "L") - deep).max() <= 1


def test_a_deep_pgm_is_scaled_by_its_own_maximum():
    head = f"P5 {RAMP.shape[1]} {RAMP.shape[0]} 1023\n".encode()
    data = (RAMP.astype(int) * 1023 // 255).astype(">u2").tobytes()
    assert np.abs(read(head + data, "L") - RAMP).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_opaque_modes_are_read_as_before(mode, wanted):
    data = stored(COLOUR.convert(mode), "TIFF")
    try:
        before = np.asarray(Image.open(io.BytesIO(data)).convert(wanted))
    except OSError:
        pytest.skip(f"Pillow {PIL.__version__} cannot read its own {mode} as TIFF")
    assert np.array_equal(read(data, wanted), before)


def test_transparency_is_laid_on_white():
    alpha = Image.new("L", COLOUR.size, 51)  # a fifth
    clear = COLOUR.copy()
    clear.putalpha(alpha)
    want = np.asarray(COLOUR) * 0.2 + 255 * 0.8
    for kind in ("PNG", "TIFF"):
        assert np.abs(read(stored(clear, kind)) - want).max() <= 1
    grey = Image.merge("LA", (COLOUR.convert("L"), alpha))
    want = np.asarray(COLOUR.convert("L")) * 0.2 + 255 * 0.8
    assert np.abs(read(stored(grey), "L") - want).max() <= 1
    full = COLOUR.copy()
    full.putalpha(255)
    assert np.array_equal(read(stored(full)), np.asarray(COLOUR))


def test_a_transparent_colour_is_laid_on_white():
    two = np.zeros((2, 2), np.uint8)
    two[0] = 90
    want = np.where(two == 90, 90, 255)
    assert np.array_equal(read(stored(Image.fromarray(two), transparency=0), "L"), want)
    rgb = Image.fromarray(np.stack([two] * 3, -1))
    assert np.array_equal(read(stored(rgb, transparency=(0, 0, 0)), "L"), want)
    palette = rgb.quantize(2)
    index = palette.getpixel((0, 1))
    assert np.array_equal(read(stored(palette, transparency=index), "L"), want)
    assert np.abs(read(stored(palette, transparency=bytes([255, 255])), "L") - two).max() == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("held", range(1, 9))
def test_exif_turns_an_image_upright(kind, held):
    back = {6: 8, 8: 6}.get(held, held)  # the other turns are their own inverses
    lying = COLOUR if held == 1 else COLOUR.transpose(images.UPRIGHT[back])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = held
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    got = read(stored(lying, kind, exif=exif, **options))
    assert got.shape == (6, 9, 3)
    assert np.abs(got - np.asarray(COLOUR)).max() <= (60 if kind == "JPEG" else 0)
    assert np.abs(got - np.asarray(COLOUR)).mean() < 6


def test_damaged_exif_is_no_reason_to_lose_an_image(monkeypatch):
    monkeypatch.setattr(Image.Image, "getexif", lambda self: 1 / 0)
    assert np.array_equal(read(stored(COLOUR)), np.asarray(COLOUR))


def test_previews_behind_a_photograph_are_passed_over():
    data = stored(COLOUR, "MPO", save_all=True, append_images=[COLOUR.resize((3, 2))])
    assert read(data).shape == (6, 9, 3)


REFUSED = {
    "another format": (stored(COLOUR, "EPS"), "none of PNG"),
    "another format, gif": (stored(COLOUR, "GIF"), "none of PNG"),
    "frames": (stored(COLOUR, save_all=True, append_images=[GREY.convert("RGB")]), "animated"),
    "frames, webp": (
        stored(COLOUR, "WEBP", save_all=True, append_images=[GREY.resize((9, 6))]),
        "animated",
    ),
    "floats": (stored(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "mode F"),
    "integers": (stored(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "mode I"),
    "16 bits, a clear colour": (
        stored(Image.fromarray(RAMP.astype(np.uint16)), transparency=300),
        "16-bit",
    ),
    "cut": (stored(COLOUR)[:-40], "truncated"),
    "empty": (b"", "none of PNG"),
    "large": (b"P5 9500 9500 255\n", "9500x9500"),
    "huge": (b"P5 60000 60000 255\n", "3600000000"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_one_meaning_is_refused_with_its_name(what):
    data, why = REFUSED[what]
    with pytest.raises(BitflowError, match=why) as e:
        read(data)
    assert "some.png" in str(e.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_holds_where_pillows_is_switched_off(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(b"P5 60000 60000 255\n")
    with pytest.raises(BitflowError, match=r"bomb\.png.*60000x60000"):
        open_image(tmp_path / "bomb.png")


def test_one_rule_for_files(tmp_path):
    root = tmp_path / "class"
    (root / "b" / "c").mkdir(parents=True)
    (root / ".thumbnails").mkdir()
    kept = ["a.png", "B.JPEG", "b/c/d.tif", "b/ü.WebP"]
    left = ["notes.txt", "more.txt", "README", ".x.png", ".thumbnails/y.png", "z.gif"]
    for name in kept + left:
        (root / name).write_bytes(b"")
    found, left_out = find_images(root)
    assert found == sorted(root / name for name in kept)
    want = {"ending in .txt": 2, "without a suffix": 1, "ending in .gif": 1, "hidden": 2}
    assert left_out == want
    assert "2 ending in .txt" in left_out_line(left_out) and left_out_line({}) == ""


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_links_are_followed_and_end(tmp_path):
    root, other = tmp_path / "class", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (other / "a.png").write_bytes(b"")
    (root / "linked").symlink_to(other)
    (root / "b.png").symlink_to(other / "a.png")
    (root / "gone.png").symlink_to(tmp_path / "nowhere")
    (other / "up").symlink_to(root)
    (root / "twice").symlink_to(other)
    os.mkfifo(root / "pipe.png")
    found, left_out = find_images(root)
    assert found == [root / "b.png", root / "linked" / "a.png"]
    assert left_out == {"broken links or no files": 2, "folders read already": 2}


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(BitflowError, match="locked"):
        find_images(tmp_path)
