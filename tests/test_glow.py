"""Glow and the whole image flows: 1×1 convolutions, splits, levels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import check_layer_over_images, check_layer_over_points, property_test, ready

from bitflow_edu.bijections import Compose, Identity, jacobian_check
from bitflow_edu.coupling import ActNorm
from bitflow_edu.excursions.glow import (
    CouplingConfig,
    CouplingFlow,
    Flatten,
    HalfCoupling,
    Invertible1x1,
    Split,
)
from bitflow_edu.excursions.rounding import check_invertible
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build


def invertible_1x1(C, H):
    return Invertible1x1(C)


def half_coupling(C, H):
    return HalfCoupling(C, 8)


def flatten(C, H):
    return Flatten(C, H, H)


def split(C, H):
    return Split(Compose(ActNorm(C // 2), Flatten(C // 2, H, H)), C, H, 8)


@pytest.mark.parametrize("make", [Invertible1x1])
@property_test
@given(D=st.integers(2, 7), seed=st.integers(0, 10_000))
def test_layers_over_points(make, D, seed):
    check_layer_over_points(make, D, seed)


@pytest.mark.parametrize("make", [invertible_1x1, half_coupling, flatten, split])
@property_test
@given(half=st.integers(1, 2), side=st.sampled_from([2, 4]), seed=st.integers(0, 10_000))
def test_layers_over_images(make, half, side, seed):
    check_layer_over_images(make, 2 * half, side, seed)


@pytest.mark.parametrize("kind", ["nice", "realnvp", "glow"])
@settings(max_examples=3, deadline=None)
@given(channels=st.sampled_from([1, 3]), seed=st.integers(0, 10_000))
def test_whole_image_flows(kind, channels, seed):
    levels = 1 if kind == "nice" else 2
    cfg = CouplingConfig(kind, image_size=4, channels=channels, levels=levels, steps=2, width=8)
    x = 1.9 * torch.rand(3, channels, 4, 4, generator=torch.Generator().manual_seed(seed)) - 0.95
    flow = ready(lambda: build(CouplingFlow, cfg, seed), seed, x)
    assert jacobian_check(flow, x[:1]) < 1e-8
    double = flow.double()
    assert check_invertible(double, x.double()) < 1e-8
    assert flow(x.double())[0].shape == (3, cfg.dims)


def test_a_checkpoint_keeps_what_actnorm_saw(tmp_path):
    from bitflow_edu.io.models import load_model, save_model

    cfg = CouplingConfig("glow", 8, steps=1, width=8)
    x = 1.8 * torch.rand(8, 1, 8, 8) - 0.9
    flow = ready(lambda: build(CouplingFlow, cfg, 0), 0, x)
    save_model(flow, tmp_path)
    again = load_model(tmp_path, CouplingFlow)
    z, _ = again(x)
    torch.testing.assert_close(z, flow(x)[0])
    assert check_invertible(again, x) < 1e-3


def nice_on_larger_images():
    build(CouplingFlow, CouplingConfig("nice", 8, levels=1), 0)(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize(
    "make,word",
    [
        (lambda: HalfCoupling(5), "5 channels"),
        (lambda: Split(Identity(), 3, 4), "3 channels"),
        (lambda: CouplingConfig("glowing"), "glowing"),
        (lambda: CouplingConfig(steps=0), "steps is 0"),
        (lambda: CouplingConfig(alpha=0.7), "alpha is 0.7"),
        (lambda: CouplingFlow(CouplingConfig(image_size=28, levels=3)), "28"),
        (nice_on_larger_images, "16"),
    ],
)
def test_bad_input_is_explained(make, word):
    with pytest.raises(BitflowError, match=word):
        make()
