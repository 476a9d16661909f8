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
