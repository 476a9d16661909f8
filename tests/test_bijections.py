"""Bijections: log-determinants against autograd, round trips, base densities, fitting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import check_layer, property_test
from torch import distributions
from torch.distributions.transforms import SigmoidTransform

from bitflow_edu.autoregressive import IAF, MAF, Flip, maf_points
from bitflow_edu.bijections import (
    Affine,
    Compose,
    Flow,
    Identity,
    Inverse,
    Linear,
    SoftSteps,
    StandardLogistic,
    StandardNormal,
    bisect,
    fit,
    jacobian_check,
    safe_exp,
)
from bitflow_edu.coupling import realnvp_points
from bitflow_edu.io.files import BitflowError


def identity(D):
    return Identity()


def inverse_steps(D):
    return Inverse(SoftSteps(D))


def stack(D):
    return Compose(Linear(D), SoftSteps(D), MAF(D, (16,)), Flip())


@pytest.mark.parametrize("make", [identity, Affine, Linear, SoftSteps, inverse_steps, stack])
@property_test
@given(D=st.integers(2, 7), seed=st.integers(0, 10_000))
def test_layers_over_points(make, D, seed):
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(seed))
    check_layer(lambda: make(D), x, seed)


def test_jacobian_check_finds_a_wrong_logdet():
    class Wrong(Affine):
        def forward(self, x):
            z, logdet = super().forward(x)
            return z, logdet + 0.01

    assert jacobian_check(Wrong(3), torch.randn(2, 3)) == pytest.approx(0.01)


def test_inverses_leave_their_input_alone():
    z = torch.randn(2, 5)
    for layer in (MAF(5), IAF(5), realnvp_points(5), maf_points(5, layers=2)):
        kept = z.clone()
        layer.inverse(z)
        assert torch.equal(z, kept)


def test_bisection_reaches_the_last_digit():
    target = torch.linspace(-8, 8, 50, dtype=torch.float64)
    x = bisect(lambda v: v**3, target, torch.full_like(target, -3), torch.full_like(target, 3))
    torch.testing.assert_close(x**3, target, rtol=1e-12, atol=1e-12)


def logistic():
    uniform = distributions.Uniform(torch.tensor(0.0).double(), 1.0)
    return distributions.TransformedDistribution(uniform, [SigmoidTransform().inv])


@pytest.mark.parametrize(
    "base,reference,std",
    [
        (StandardNormal(), distributions.Normal(torch.tensor(0.0).double(), 1.0), 1.0),
        (StandardLogistic(), logistic(), math.pi / 3**0.5),
    ],
)
def test_base_densities(base, reference, std):
    z = torch.linspace(-4, 4, 9).double()
    torch.testing.assert_close(base.log_prob(z[:, None]), reference.log_prob(z))
    sample = base.sample(20_000, 1, generator=torch.Generator().manual_seed(0))
    assert abs(sample.mean()) < 0.05 and torch.isfinite(sample).all()
    assert abs(sample.std() - std) < 0.03


def test_maximum_likelihood_finds_a_known_density():
    torch.manual_seed(0)
    x = 3 + 0.5 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    flow = Flow(Affine(1), dims=1)
    losses = fit(flow, x, steps=800, lr=0.1)
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.25)
    assert losses[0] > losses[-1]
    assert -flow.log_prob(x).mean().item() == pytest.approx(entropy, abs=0.02)
    y = flow.sample(4000, torch.Generator().manual_seed(1))
    assert abs(y.mean() - 3) < 0.05 and abs(y.std() - 0.5) < 0.03


def test_fit_stops_at_a_loss_that_is_not_finite():
    with pytest.raises(BitflowError, match="nan at step 0"):
        fit(Flow(Affine(1), dims=1), torch.full((10, 1), math.nan), steps=3)


@pytest.mark.parametrize(
    "make,word",
    [
        (lambda: safe_exp(torch.tensor([0.0, 90.0])), "90"),
        (lambda: safe_exp(torch.tensor([-90.0])), "90"),
        (lambda: safe_exp(torch.tensor([math.nan])), "nan"),
    ],
)
def test_bad_input_is_explained(make, word):
    with pytest.raises(BitflowError, match=word):
        make()
