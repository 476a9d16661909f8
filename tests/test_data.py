"""Datasets, pixels, tokens."""

import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitflow_edu.data import (
    BitflowError,
    DataConfig,
    add_noise,
    asset,
    dequantize,
    load_data,
    patchify,
    resize,
    to_model_range,
    to_pixels,
    unpatchify,
)

ROOT = Path(__file__).resolve().parent.parent


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 4), st.integers(1, 5))
def test_patchify_round_trip(n, channels, patch, side):
    x = torch.randn(n, channels, side * patch, side * patch)
    tokens = patchify(x, patch)
    assert tokens.shape == (n, side * side, channels * patch * patch)
    assert torch.equal(unpatchify(tokens, patch, channels), x)
    if side > 1:
        second = tokens[:, 1].reshape(n, channels, patch, patch)
        assert torch.equal(second, x[:, :, :patch, patch : 2 * patch]), "raster order"


def test_pixels_and_model_range_are_inverse_and_symmetric():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = to_model_range(pixels)
    assert torch.equal(to_pixels(x), pixels) and x.sum().abs() < 1e-4 and x.abs().max() < 1
    outside = to_pixels(torch.tensor([-9.0, 9.0]))
    assert torch.equal(outside, torch.tensor([0, 255], dtype=torch.uint8))


def test_dequantization_stays_in_the_bin():
    pixels = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    x = dequantize(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(to_pixels(x), pixels) and x.min() >= -1 and x.max() < 1
    assert abs((x - to_model_range(pixels)).mean().item()) < 2e-4


def test_noise_has_the_size_asked_for():
    x = torch.zeros(1, 1, 200, 200)
    assert abs(add_noise(x, 0.1, torch.Generator().manual_seed(0)).std().item() - 0.1) < 1e-3


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


def test_checksums_in_the_readme_hold():
    data = ROOT / "data"
    lines = (data / "SHA256SUMS").read_text().split("\n")
    sums = dict(reversed(line.split()) for line in lines if line)
    files = [*data.rglob("*.npz"), *data.rglob("*.safetensors")]
    shipped = {path.relative_to(data).as_posix() for path in files}
    assert shipped <= sums.keys(), "run sha256sum on what is new in data/"
    for name, expected in sums.items():
        assert hashlib.sha256((data / name).read_bytes()).hexdigest() == expected, name


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
    assert data.classes == ("cat", "dog") and data.labels.tolist() == [0] * 3 + [1] * 3


def test_cifar10_jpeg_copy(tmp_path):
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
    data = load_data(DataConfig("cifar10", 32, 3), "test", tmp_path)
    assert data.pixels.shape == (4, 3, 32, 32) and data.labels.tolist() == [0, 1, 2, 3]


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
    with pytest.raises(BitflowError, match="3 but|channels"):
        load_data(DataConfig("mnist-mini", 16, channels=3))
    with pytest.raises(BitflowError, match="label 9, which is out of range"):
        one = {"train_images": np.zeros((1, 28, 28), np.uint8), "train_labels": np.array([9])}
        np.savez(tmp_path / "mnist-mini.npz", **one)
        load_data(DataConfig("mnist-mini", 16, num_classes=5), "train", tmp_path)
    with pytest.raises(BitflowError, match="unknown dataset 'mnits'"):
        DataConfig("mnits")
    with pytest.raises(BitflowError, match="patch size 3 does not divide"):
        patchify(torch.zeros(1, 1, 16, 16), 3)


IN_THE_WHEEL = """
import bitflow_edu
from bitflow_edu.data import DataConfig, asset, load_data
from bitflow_edu.distances import load_feature_net
from bitflow_edu.evaluation import load_classifier
load_classifier()
load_feature_net()
print(bitflow_edu.__file__, len(load_data(DataConfig())), asset("mnist-mini/reverse").is_dir())
"""


def test_the_wheel_carries_data_and_weights(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / "site")
    python = [sys.executable, "-c", IN_THE_WHEEL]
    env = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    out = subprocess.check_output(python, cwd=tmp_path, env=env, text=True).split()
    assert out[0].startswith(str(tmp_path)) and out[1:] == ["10000", "True"]
