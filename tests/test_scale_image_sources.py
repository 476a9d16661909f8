"""Squares as ADM cuts them, folders and tars read piece by piece."""

import io
import os
import shutil
import sys
import zipfile

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from bitflow_edu.data import load_data
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.files import BitflowError
from bitflow_edu.scale import image_sources
from bitflow_edu.scale.image_sources import (
    FolderImages,
    FolderSource,
    StoredImages,
    TarSource,
    as_jpeg,
    center_crop,
    find_source,
    synthetic_images,
    synthetic_picture,
    synthetic_tar,
)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder with pictures."""
    folder = tmp_path_factory.mktemp("toys")
    synthetic_images(folder / "pictures", 30)
    return folder


def stored(pixels, kind, mode="RGB"):
    """Pixels `(H, W, 3)` as the bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def test_square_is_adms():
    """Halved by boxes while twice too large, then bicubic, then the centre; any mode to RGB."""
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = (200, 100, 50)  # exactly the centred square
    for mode in ("RGB", "L", "CMYK", "P"):
        got = center_crop(stored(wide, "TIFF", mode), 16)
        assert got.shape == (3, 16, 16) and got.dtype == torch.uint8
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None]
    assert torch.equal(center_crop(stored(wide, "PNG"), 16), colour.expand(3, 16, 16))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    boxes = torch.from_numpy(noise).float().reshape(16, 2, 16, 2, 3).mean(dim=(1, 3))
    assert (center_crop(stored(noise, "PNG"), 16).float() - boxes.permute(2, 0, 1)).abs().max() <= 1


def test_folder_is_listed_once_and_shuffled(toys, tmp_path, monkeypatch):
    source = FolderSource(str(toys / "pictures"), per_shard=8)
    pieces = source.open(tmp_path)
    first = [list(pieces.read(k)) for k in range(len(pieces.names))]
    assert [len(p) for p in first] == [8, 8, 8, 6] and pieces.classes == ("n01440764", "n01443537")
    assert all({r.label for r in piece} == {0, 1} for piece in first), "a shard mixes classes"
    assert all(r.name.startswith(pieces.classes[r.label]) for piece in first for r in piece)
    assert len({r.name for piece in first for r in piece}) == 30
    monkeypatch.setattr(image_sources, "list_folder", lambda *_: pytest.fail("listed again"))
    assert [r.name for r in source.open(tmp_path).read(0)] == [r.name for r in first[0]]


def test_empty_or_missing_folders_are_refused(tmp_path):
    with pytest.raises(BitflowError, match="has no train/"):
        FolderSource(str(tmp_path)).open(tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(BitflowError, match="holds no"):
        FolderSource(str(tmp_path)).open(tmp_path)


def test_train_numbers_the_classes_of_every_split(toys, tmp_path):
    shutil.copytree(toys / "pictures", tmp_path / "p")
    shutil.copytree(tmp_path / "p" / "train" / "n01443537", tmp_path / "p" / "val" / "n01443537")
    pieces = FolderSource(str(tmp_path / "p"), "val").open(tmp_path)
    assert len(pieces.classes) == 2 and {raw.label for raw in pieces.read(0)} == {1}


def test_a_file_that_is_gone_is_named(toys, tmp_path):
    shutil.copytree(toys / "pictures", tmp_path / "p")
    pieces = FolderSource(str(tmp_path / "p")).open(tmp_path)
    gone = next((tmp_path / "p").rglob("*.JPEG"))
    gone.unlink()
    with pytest.raises(BitflowError, match=gone.name):
        list(pieces.read(0))


def test_what_a_source_is(tmp_path):
    assert isinstance(find_source(tmp_path), FolderSource)
    for where in ("s3://bucket/a.tar", "a-{0..3}.tar", "a-*.tar", tmp_path / "a.tar", "a.tar.gz"):
        assert isinstance(find_source(where), TarSource), where


def test_tars_from_disk_and_from_object_storage(tmp_path):
    for i in range(3):
        data = synthetic_tar(range(5 * i, 5 * i + 5))
        (tmp_path / f"t-{i:03d}.tar").write_bytes(data)
        with fsspec.open(f"memory://b/t-{i:03d}.tar", "wb") as f:
            f.write(data)
    names = ("t-{000..002}.tar", "t-*.tar")
    for pattern in [f"{where}/{name}" for where in (tmp_path, "memory://b") for name in names]:
        pieces = TarSource(pattern, 2).open()
        found = [raw for k in range(len(pieces.names)) for raw in pieces.read(k)]
        assert [r.label for r in found] == [i % 2 for i in range(15)]
        assert all(r.data == as_jpeg(synthetic_picture(i)) for i, r in enumerate(found))


def test_a_thread_of_pixels_is_no_square():
    """One pixel wide and resized to a square's width, it would take terabytes."""
    long = stored(np.zeros((100_000, 1, 3), np.uint8), "PNG")
    with pytest.raises(BitflowError, match="long.png.*100000 and 1"):
        center_crop(long, 64, "long.png")


def test_every_reader_takes_the_same_files(tmp_path):
    """Nested, linked and hidden files: image folder, listing and images by number agree."""
    root = tmp_path / "pictures"
    synthetic_images(root, 6)
    place = root / "train" / "n01440764"
    picture = next(place.iterdir()).read_bytes()
    (place / "a" / "b").mkdir(parents=True)
    (place / ".hidden").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("a/b/c.JPG", ".hidden/d.jpg", "e.gif", "../beside.jpg", "../../../other/f.png"):
        (place / name).write_bytes(picture)
    if os.name == "posix":
        (place / "linked").symlink_to(tmp_path / "other")
    n = 8 if os.name == "posix" else 7
    with pytest.warns(UserWarning, match="left out") as caught:
        cfg = DataConfig("image-folder", 16, 3, num_classes=2)
        assert len(load_data(cfg, "train", root)) == n
        assert len(FolderImages(root, "train", 16)) == n
    reasons = "1 ending in .gif", "1 hidden", "1 beside the class folders"
    assert all(reason in str(w.message) for w in caught for reason in reasons)
    pieces = FolderSource(str(root)).open(tmp_path)
    assert len(list(pieces.read(0))) == n
    assert pieces.left_out == {"ending in .gif": 1, "hidden": 1, "beside the class folders": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names are text without line breaks")
@pytest.mark.parametrize("name", [b"a\nb.jpg", b"a\rb.jpg", b"\xff.jpg"])
def test_names_that_a_listing_cannot_hold_are_refused(tmp_path, name):
    synthetic_images(tmp_path, 2)
    place = os.fsencode(tmp_path / "train" / "n01440764")
    with open(os.path.join(place, name), "wb") as file:
        file.write(b"")
    with pytest.raises(BitflowError, match="rename"):
        FolderSource(str(tmp_path)).open(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]\n0\ta/b.jpg",
        '{"classes": 5}\n0\ta/b.jpg',
        '{"classes": [1]}\n0\ta/b.jpg',
        '{"classes": ["a"]}',
        '{"classes": ["a"]}\n0',
        '{"classes": ["a"]}\n1\ta/b.jpg',
        '{"classes": ["a"]}\n-1\ta/b.jpg',
        '{"classes": ["a"]}\nx\ta/b.jpg',
        '{"classes": ["a"], "left_out": {"hidden": "many"}}\n0\ta/b.jpg',
        '{"classes": ["a"], "left_out": []}\n0\ta/b.jpg',
        "\xff",
    ],
)
def test_damaged_listings_are_named(tmp_path, text):
    (tmp_path / "listing.tsv").write_bytes(text.encode("latin-1"))
    with pytest.raises(BitflowError, match=r"listing\.tsv"):
        FolderSource(str(tmp_path)).open(tmp_path)


def test_sizes_that_make_no_shards_are_refused():
    with pytest.raises(BitflowError, match="per_shard is -1"):
        find_source("somewhere", per_shard=-1)
    for n in (0, -3, 10**9):
        with pytest.raises(BitflowError, match=f"num_classes {n}"):
            find_source("a.tar", num_classes=n)


def npz(path, header, data):
    """An .npz file whose arr_0 has this header and these bytes."""
    text = repr(header).encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
        archive.writestr("arr_0.npy", head + text + data)


@pytest.mark.parametrize(
    "shape", [(10**12, 8, 8, 3), (2, 10**6, 10**6, 3), (-1, 8, 8, 3), (9, 8, 8, 3)]
)
def test_stored_images_are_as_many_as_their_bytes(tmp_path, shape):
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    npz(tmp_path / "some.npz", header, bytes(8 * 8 * 8 * 3))
    with pytest.raises(BitflowError, match="some.npz"):
        StoredImages(tmp_path / "some.npz")
    npz(tmp_path / "right.npz", {**header, "shape": (8, 8, 8, 3)}, bytes(8 * 8 * 8 * 3))
    assert len(StoredImages(tmp_path / "right.npz")) == 8
