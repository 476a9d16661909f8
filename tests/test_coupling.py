"""Couplings, masks, squeeze, ActNorm, logit, bits per dimension."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import check_layer_over_images, check_layer_over_points, property_test, ready

from bitflow_edu.bijections import full_jacobian
from bitflow_edu.coupling import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Logit,
    Squeeze,
    bits_per_dim,
    conv_net,
    every_other,
    half_of,
    mlp,
    realnvp_points,
    to_bits,
    uniform_noise_loss,
)
from bitflow_edu.data import dequantize, to_model_range
from bitflow_edu.excursions.glow import CouplingConfig, CouplingFlow
from bitflow_edu.excursions.rounding import check_invertible
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build
from conftest import shake


def additive(D):
    return AdditiveCoupling(every_other(D, parity=1), mlp(D, D, 8))


def affine(D, bound=2.0):
    return AffineCoupling(every_other(D), mlp(D, 2 * D, 8), bound)


def unbounded(D):
    return affine(D, bound=None)


def checkerboard(C, H):
    return AffineCoupling(every_other(1, H, H), conv_net(C, 2 * C, 8))


def channel_mask(C, H):
    return AffineCoupling(half_of(C, parity=1), conv_net(C, 2 * C, 8))


def squeeze(C, H):
    return Squeeze()


def act_norm(C, H):
    return ActNorm(C)


@pytest.mark.parametrize("make", [additive, affine, unbounded, ActNorm])
@property_test
@given(D=st.integers(2, 7), seed=st.integers(0, 10_000))
def test_layers_over_points(make, D, seed):
    check_layer_over_points(make, D, seed)


@pytest.mark.parametrize("make", [checkerboard, channel_mask, squeeze, act_norm])
@property_test
@given(half=st.integers(1, 2), side=st.sampled_from([2, 4]), seed=st.integers(0, 10_000))
def test_layers_over_images(make, half, side, seed):
    check_layer_over_images(make, 2 * half, side, seed)


def test_a_fresh_coupling_changes_nothing():
    x = torch.randn(3, 6)
    first = AffineCoupling(every_other(6), mlp(6, 12))
    second = AdditiveCoupling(every_other(6), mlp(6, 6))
    for layer in (first, second, realnvp_points(6)):
        z, logdet = layer(x)
        assert torch.equal(z, x) and not logdet.any()


def test_couplings_pass_their_half_and_are_triangular():
    layer = shake(AffineCoupling(every_other(6), mlp(6, 12, 8)))
    x = torch.randn(4, 6)
    z, _ = layer(x)
    passed = layer.mask.bool()
    assert torch.equal(z[:, passed], x[:, passed])
    assert not torch.isclose(z[:, ~passed], x[:, ~passed]).any()
    order = torch.cat([passed.nonzero(), (~passed).nonzero()]).flatten()
    J = full_jacobian(layer, x[0])[order][:, order]
    assert torch.equal(J, J.tril())


def test_masks():
    board, other = every_other(1, 4, 4), every_other(1, 4, 4, parity=1)
    assert board.shape == (1, 4, 4) and torch.equal(board + other, torch.ones(1, 4, 4))
    assert board[0, 0, 0] == 1
    assert (board[0, :-1] + board[0, 1:] == 1).all()
    assert (board[0, :, :-1] + board[0, :, 1:] == 1).all()
    assert half_of(4).flatten().tolist() == [1, 1, 0, 0]
    assert half_of(4, 1).flatten().tolist() == [0, 0, 1, 1]


def test_squeeze_of_a_counted_image():
    z, logdet = Squeeze()(torch.arange(1.0, 17).reshape(1, 1, 4, 4))
    channels = [[1, 3, 9, 11], [2, 4, 10, 12], [5, 7, 13, 15], [6, 8, 14, 16]]
    assert z[0].flatten(1).tolist() == channels and logdet.tolist() == [0]


def test_actnorm_takes_its_scale_from_the_first_batch_alone():
    layer, g = ActNorm(3).train(), torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(64, 3, 4, 4, generator=g)
    z, _ = layer(x)
    values = z.transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 1e-5 and (values.std(1) - 1).abs().max() < 1e-3
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(10 * x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    z, _ = ActNorm(2).train()(torch.zeros(8, 2))
    assert torch.isfinite(z).all(), "a channel that never changes has no scale to take"


def test_an_untrained_actnorm_does_not_sample():
    with pytest.raises(BitflowError, match="has seen no data"):
        ActNorm(3).inverse(torch.randn(2, 3))
    flow = build(CouplingFlow, CouplingConfig("glow", 8, steps=1, width=8), 0)
    with pytest.raises(BitflowError, match="has seen no data"):
        flow.inverse(torch.randn(2, 64))


def test_an_overflowing_scale_is_caught():
    layer = AffineCoupling(every_other(4), mlp(4, 8, 8), bound=None)
    layer.net[-1].bias.data.fill_(100.0)
    with pytest.raises(BitflowError, match="log-scale reached 100"):
        layer(torch.randn(2, 4))
    layer.bound = 2.0
    assert check_invertible(layer, torch.randn(2, 4)) < 1e-4


def test_bits_of_a_uniform_density_are_eight(digits):
    class Uniform(torch.nn.Linear):
        def log_prob(self, x, c):
            return torch.full((len(x),), x[0].numel() * math.log(0.5))

    for draws in (1, 4):
        bpd = bits_per_dim(Uniform(1, 1), digits[:20], draws=draws)
        torch.testing.assert_close(bpd, torch.full((20,), 8.0))
    with pytest.raises(BitflowError, match="draws is 0"):
        bits_per_dim(Uniform(1, 1), digits[:20], draws=0)


def test_more_draws_tighten_the_bound(digits):
    cfg = CouplingConfig("glow", 16, steps=1, width=8)
    part = digits[:40]
    flow = ready(lambda: build(CouplingFlow, cfg, 0), 0, part.x)
    one, many = (bits_per_dim(flow, part, draws=k).mean() for k in (1, 16))
    assert many < one


def test_the_training_loss_is_the_measured_quantity(digits):
    """Averaged over noise, the loss is the one-draw bits/dim; its noise stays within the bins."""
    cfg = CouplingConfig("glow", 16, steps=1, width=8)
    part = digits[:64]
    flow = ready(lambda: build(CouplingFlow, cfg, 0), 0, part.x)
    losses, bits = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            losses.append(uniform_noise_loss(flow, part.x, None, generator)[0].item())
        bits.append(bits_per_dim(flow, part, seed=seed).mean().item())
    assert sum(losses) / 8 == pytest.approx(sum(bits) / 8, abs=0.02)
    seen = []

    class Spy(torch.nn.Module):
        def log_prob(self, x, c):
            seen.append(x)
            return flow.log_prob(x)

    uniform_noise_loss(Spy(), part.x, None, torch.Generator().manual_seed(0))
    assert torch.equal(((seen[0] + 1) * 128).floor().to(torch.uint8), part.pixels)


def test_to_bits_undoes_the_scaling_of_the_data():
    pixels = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    x = dequantize(pixels, torch.Generator().manual_seed(0))
    assert (x - to_model_range(pixels)).abs().max() <= 0.5 / 128
    assert to_bits(torch.tensor([16 * math.log(128.0)]), 16).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "make,word",
    [
        (lambda: half_of(3), "3 channels"),
        (lambda: Squeeze()(torch.randn(1, 1, 5, 4)), "5x4"),
        (lambda: Squeeze()(torch.randn(4, 4)), r"\(4, 4\)"),
        (lambda: Squeeze().inverse(torch.randn(1, 3, 2, 2)), "3 channels"),
        (lambda: Logit()(torch.tensor([[0.0, 1.5]])), "1.5"),
        (lambda: Logit()(torch.tensor([[-30.0, 0.5]])), "-30"),
        (lambda: Logit()(torch.tensor([[math.nan, 0.5]])), "nan"),
    ],
)
def test_bad_input_is_explained(make, word):
    with pytest.raises(BitflowError, match=word):
        make()
