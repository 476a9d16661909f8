"""What the tests of layers share: a layer with random weights, and the check of every layer."""

import torch
from hypothesis import settings

from bitflow_edu.bijections import jacobian_check
from bitflow_edu.excursions.rounding import check_invertible
from conftest import shake

property_test = settings(max_examples=6, deadline=None)


def ready(make, seed, x):
    """A layer with random weights; what looks at its first batch has seen one."""
    torch.manual_seed(seed)
    layer = shake(make(), seed).train()
    layer(x)
    return layer.eval()


def check_layer(make, x, seed):
    """log|det| to 1e-8 in float64, the round trip to 1e-5 in float32, relative to |z|."""
    layer = ready(make, seed, x)
    assert jacobian_check(layer, x) < 1e-8
    z = layer(x)[0]
    assert check_invertible(layer, x) < 1e-5 * max(1.0, z.abs().max().item())


def check_layer_over_points(make, D, seed):
    """The same for make(D), a layer over points `(N, D)`."""
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(seed))
    check_layer(lambda: make(D), x, seed)


def check_layer_over_images(make, C, side, seed):
    """The same for make(C, side), a layer over images `(N, C, side, side)`."""
    x = torch.randn(3, C, side, side, generator=torch.Generator().manual_seed(seed))
    check_layer(lambda: make(C, side), x, seed)
