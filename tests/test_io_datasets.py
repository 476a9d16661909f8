"""Loaders: from files to arrays, and what is said where a file is damaged or missing."""

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bitflow_edu.data import load_data
from bitflow_edu.io import datasets
from bitflow_edu.io.datasets import DataConfig, check_arrays, described, resize
from bitflow_edu.io.files import BitflowError, asset


def test_embedded_digits():
    cfg = DataConfig("mnist-mini", 28)
    train, test = load_data(cfg), load_data(cfg, "test")
    assert (len(train), len(test)) == (10_000, 2_000)
    assert torch.bincount(train.labels).tolist() == [1000] * 10
    assert torch.bincount(test.labels).tolist() == [200] * 10
    assert train.pixels.dtype == torch.uint8 and train.pixels.shape[1:] == (1, 28, 28)
    assert asset("mnist-mini.npz").stat().st_size <= 3_000_000
    both = {t.numpy().tobytes() for t in train.pixels} & {t.numpy().tobytes() for t in test.pixels}
    assert not both, "no image in both splits"


def test_resize_averages():
    pixels = torch.full((1, 1, 28, 28), 200, dtype=torch.uint8)
    assert torch.equal(resize(pixels, 16), torch.full((1, 1, 16, 16), 200, dtype=torch.uint8))


def make_folder(root, size=20, channels=3, classes=("cat", "dog"), per_class=3):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                shape = (size, size + 4, 3) if channels == 3 else (size, size + 4)
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder(tmp_path, channels):
    make_folder(tmp_path)
    data = load_data(DataConfig("image-folder", 8, channels, num_classes=2), "train", tmp_path)
    assert data.pixels.shape == (6, channels, 8, 8)
    assert data.classes == ("cat", "dog") and sorted(data.labels.tolist()) == [0] * 3 + [1] * 3
    for label, name in enumerate(data.classes):
        files = (tmp_path / "train" / name).iterdir()
        wanted = {datasets.read_square(file, 8, channels).tobytes() for file in files}
        found = {image.numpy().tobytes() for image in data.pixels[data.labels == label]}
        assert found == wanted and len(wanted) == 3


def load_jpeg_copy(tmp_path):
    """The test split of a copy of four images."""
    rng, blobs = np.random.default_rng(0), []
    for _ in range(4):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="JPEG")
        blobs.append(buffer.getvalue())
    arrays = {"classes": np.array([f"class{i}" for i in range(10)])}
    for split in ("train", "test"):
        arrays |= {
            f"{split}_jpeg": np.frombuffer(b"".join(blobs), dtype=np.uint8),
            f"{split}_labels": np.arange(4),
            f"{split}_offsets": np.cumsum([0] + [len(b) for b in blobs]),
        }
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    return load_data(DataConfig("cifar10", 32, 3), "test", tmp_path)


def test_cifar10_jpeg_copy(tmp_path):
    data = load_jpeg_copy(tmp_path)
    assert data.pixels.shape == (4, 3, 32, 32) and data.labels.tolist() == [0, 1, 2, 3]


def test_decoded_cifar10_is_kept_as_one_file(tmp_path, monkeypatch):
    """Decoded once; decoded again where the file is damaged or the home is read-only."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    few = load_jpeg_copy(tmp_path)
    assert not (tmp_path / "home").exists(), "four images are not worth a file"
    monkeypatch.setattr(datasets, "KEPT_FROM", 4)
    decoded = []
    real = datasets.open_image
    monkeypatch.setattr(datasets, "open_image", lambda *a: decoded.append(a) or real(*a))
    again = [load_jpeg_copy(tmp_path) for _ in range(2)]
    assert len(decoded) == 4 and all(torch.equal(d.pixels, few.pixels) for d in again)
    (kept,) = (tmp_path / "home").rglob("*.npy")
    for damage in (kept.read_bytes()[:100], b"", b"no array"):
        kept.write_bytes(damage)
        assert torch.equal(load_jpeg_copy(tmp_path).pixels, few.pixels)
    assert len(decoded) == 16 and np.load(kept).shape == (4, 3, 32, 32)
    np.save(kept, np.zeros((3, 3, 32, 32), np.uint8))
    assert torch.equal(load_jpeg_copy(tmp_path).pixels, few.pixels), "of other data"
    monkeypatch.setattr(datasets, "replacing", lambda path, by: (_ for _ in ()).throw(OSError()))
    kept.unlink()
    assert torch.equal(load_jpeg_copy(tmp_path).pixels, few.pixels)
    assert not kept.exists()


def corrupt(tmp_path, how):
    path = tmp_path / "mnist-mini.npz"
    if how == "truncated":
        path.write_bytes(asset("mnist-mini.npz").read_bytes()[:5000])
    elif how == "empty file":
        path.write_bytes(b"")
    elif how == "pickle":
        np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
        shutil.move(tmp_path / "x.npy", path)
    elif how == "other arrays":
        np.savez(path, a=np.zeros(3))
    return tmp_path


@pytest.mark.parametrize("how", ["truncated", "empty file", "pickle", "other arrays"])
def test_corrupt_data_files(tmp_path, how):
    with pytest.raises(BitflowError, match="mnist-mini.npz is damaged") as e:
        load_data(DataConfig("mnist-mini", 16), "train", corrupt(tmp_path, how))
    assert str(tmp_path) in str(e.value) and len(str(e.value).splitlines()) <= 2


def test_other_bad_data(tmp_path, monkeypatch):
    with pytest.raises(BitflowError, match="nowhere"):
        load_data(DataConfig("mnist-mini", 16), "train", tmp_path / "nowhere")
    monkeypatch.setenv("BITFLOW_DATA", str(tmp_path / "gone"))
    with pytest.raises(BitflowError, match="gone"):
        load_data(DataConfig("mnist-mini", 16))
    monkeypatch.delenv("BITFLOW_DATA")
    with pytest.raises(BitflowError, match="no mnist in"):
        load_data(DataConfig("mnist", 28), "train", tmp_path)
    with pytest.raises(BitflowError, match="train/"):
        load_data(DataConfig("image-folder", 8, 3), "train", tmp_path)
    with pytest.raises(BitflowError, match="unknown dataset 'mnits'"):
        DataConfig("mnits")
    with pytest.raises(BitflowError, match="2 channels"):
        DataConfig(channels=2)


def test_an_image_folder_with_a_mistake_is_refused(tmp_path):
    cfg = DataConfig("image-folder", 8, 3, num_classes=3)
    make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(b"no image")
    with pytest.raises(BitflowError, match="bad.png"):
        load_data(cfg, "train", tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(BitflowError, match="eel"):
        load_data(cfg, "train", tmp_path)
    (tmp_path / "test" / "fox").mkdir()
    with pytest.raises(BitflowError, match="'fox'"):
        load_data(cfg, "test", tmp_path)


def test_arrays_that_are_no_images_are_refused():
    images, labels = np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2, int)
    check_arrays(images, labels, "toy")
    wrong = [(images.astype(float), labels), (images[0], labels), (images, labels[:1])]
    for pixels, c in [*wrong, (images, labels.astype(float)), (images[:0], labels[:0])]:
        with pytest.raises(BitflowError, match="toy"):
            check_arrays(pixels, c, "toy")


def test_a_lossy_copy_is_named(tmp_path):
    cfg = DataConfig("cifar10", 32, 3)
    assert described(cfg, tmp_path) == "cifar10"
    (tmp_path / "cifar10_jpeg.npz").write_bytes(b"")
    assert described(cfg, tmp_path) == "cifar10, JPEG copy"


def test_images_with_more_in_them_than_colours(tmp_path):
    """16-bit greys keep their brightness, and what is transparent is white."""
    place = tmp_path / "train" / "a"
    place.mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(place / "0.png")
    Image.new("LA", (8, 8), (0, 0)).save(place / "1.png")
    data = load_data(DataConfig("image-folder", 8, 1, num_classes=1), "train", tmp_path)
    assert (data.pixels[0] == 100).all() and (data.pixels[1] == 255).all()


def test_no_other_program_is_started_by_an_image(tmp_path):
    make_folder(tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "train" / "cat" / "0.png", "EPS")
    with pytest.raises(BitflowError, match=r"0\.png is not a readable image"):
        load_data(DataConfig("image-folder", 8, 3, num_classes=2), "train", tmp_path)
    Image.new("RGB", (32, 32)).save(buffer := io.BytesIO(), "EPS")
    blob = np.frombuffer(buffer.getvalue(), np.uint8)
    arrays = {"train_jpeg": blob, "train_offsets": [0, len(blob)], "train_labels": [0]}
    np.savez(tmp_path / "cifar10_jpeg.npz", classes=["a"], **arrays)
    with pytest.raises(BitflowError, match=r"cifar10_jpeg\.npz, image 0 of train"):
        load_data(DataConfig("cifar10", 32, 3), "train", tmp_path)


def test_what_was_left_out_is_said(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("")
    (tmp_path / "train" / "dog" / ".x.png").write_text("")
    with pytest.warns(UserWarning, match="6 images; left out: 1 ending in .txt, 1 hidden"):
        load_data(DataConfig("image-folder", 8, 3, num_classes=2), "train", tmp_path)
    for path in (tmp_path / "train" / "cat").glob("*.png"):
        path.unlink()
    with pytest.raises(BitflowError, match="cat holds no images.*1 ending in .txt"):
        load_data(DataConfig("image-folder", 8, 3, num_classes=2), "train", tmp_path)


def test_many_images_of_a_folder_are_decoded_once(tmp_path, monkeypatch):
    """What a second process finds is the first one's file, mapped; changed images are read anew."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for i in range(4):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 8, 3), 20 * i, np.uint8)).save(path)
    cfg = DataConfig("image-folder", 8, 3, num_classes=2)
    few = load_data(cfg, "train", tmp_path)
    assert not (tmp_path / "home").exists(), "four images are not worth a file"
    monkeypatch.setattr(datasets, "KEPT_FROM", 4)
    read, real = [], datasets.read_square
    monkeypatch.setattr(datasets, "read_square", lambda *a: read.append(a) or real(*a))
    first, second = (load_data(cfg, "train", tmp_path) for _ in range(2))
    assert len(read) == 4 and torch.equal(first.pixels, few.pixels)
    assert torch.equal(second.pixels, few.pixels) and torch.equal(second.labels, few.labels)
    second.pixels[0] = 99  # what a program writes stays in its own memory
    assert torch.equal(load_data(cfg, "train", tmp_path).pixels, few.pixels)
    Image.fromarray(np.full((9, 8, 3), 200, np.uint8)).save(path)
    assert load_data(cfg, "train", tmp_path).pixels.max() == 200 and len(read) == 8
    assert load_data(replace(cfg, image_size=4), "train", tmp_path).pixels.shape[-1] == 4


def test_the_first_images_of_a_folder_are_of_all_classes(tmp_path):
    """Whoever looks at some images takes the first; by class they would be of one."""
    make_folder(tmp_path, per_class=10)
    cfg = DataConfig("image-folder", 8, 3, num_classes=2)
    data, again = (load_data(cfg, "train", tmp_path) for _ in range(2))
    assert set(data.labels[:8].tolist()) == {0, 1} and data.labels.bincount().tolist() == [10, 10]
    assert torch.equal(data.pixels, again.pixels) and torch.equal(data.labels, again.labels)


def test_resizing_piece_by_piece_changes_nothing():
    pixels = torch.randint(0, 256, (1003, 1, 8, 8), dtype=torch.uint8)
    found = resize(pixels, 4)
    assert found.shape == (1003, 1, 4, 4) and torch.equal(found[1000:], resize(pixels[1000:], 4))
