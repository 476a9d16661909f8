"""Pixels, noise, tokens, and the one way into a dataset."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitflow_edu.data import (
    Images,
    add_noise,
    check_labels,
    dequantize,
    image_grid,
    load_data,
    patchify,
    to_model_range,
    to_pixels,
    unpatchify,
)
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.files import BitflowError


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


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(BitflowError, match="3 but|channels"):
        load_data(DataConfig("mnist-mini", 16, channels=3))
    with pytest.raises(BitflowError, match="label 9, which is out of range"):
        one = {"train_images": np.zeros((1, 28, 28), np.uint8), "train_labels": np.array([9])}
        np.savez(tmp_path / "mnist-mini.npz", **one)
        load_data(DataConfig("mnist-mini", 16, num_classes=5), "train", tmp_path)
    with pytest.raises(BitflowError, match="'validation'"):
        load_data(DataConfig("mnist-mini", 16), "validation")
    with pytest.raises(BitflowError, match="label 10.*0 to 9"):
        check_labels(torch.tensor([3, 10]), 10)
    with pytest.raises(BitflowError, match="patch size 3 does not divide"):
        patchify(torch.zeros(1, 1, 16, 16), 3)
    with pytest.raises(BitflowError, match="5 tokens of 4 values"):
        unpatchify(torch.zeros(1, 5, 4), 2, 1)


def test_a_split_is_indexed_and_drawn(digits):
    """What training asks of a dataset: length, labels, draw, and an order or none."""
    few = digits[[5, 3]]
    assert len(few) == 2 and torch.equal(few.labels, digits.labels[[5, 3]])
    assert torch.equal(digits.draw(torch.tensor([5, 3])), few.x) and digits.epoch_order is None
    assert few.classes == digits.classes == tuple("0123456789")


def test_a_grid_keeps_every_pixel():
    x = to_model_range(torch.arange(3 * 4, dtype=torch.uint8).reshape(3, 1, 2, 2) * 20)
    grid = image_grid(x, columns=2, gap=1)
    assert grid.shape == (5, 5, 3) and (grid[2] == 255).all() and (grid[:, 2] == 255).all()
    assert grid[:2, 3:, 0].tolist() == [[80, 100], [120, 140]]
    assert grid[3:, :2, 1].tolist() == [[160, 180], [200, 220]]
    for columns in (-1, 0, 2**63):
        with pytest.raises(BitflowError, match=f"{columns} columns"):
            image_grid(x, columns)


def test_a_part_of_a_split_is_a_split(digits):
    assert isinstance(digits[:3], Images) and len(digits[:3]) == 3
