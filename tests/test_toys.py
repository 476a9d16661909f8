"""Distributions in the plane whose density is known."""

import pytest
import torch

from bitflow_edu.bijections import Identity, jacobian_check
from bitflow_edu.excursions.rounding import check_invertible
from bitflow_edu.excursions.toys import TOYS, twist
from bitflow_edu.io.files import BitflowError


@pytest.mark.parametrize("name", TOYS)
def test_toy_densities_have_mass_one_and_fit_their_samples(name):
    toy, side = TOYS[name], torch.linspace(-5, 5, 401, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).reshape(-1, 2)
    density = toy.log_prob(grid).exp().reshape(401, 401) * (side[1] - side[0]) ** 2
    assert abs(density.sum() - 1) < 0.02
    x = toy.sample(50_000)
    assert torch.isfinite(toy.log_prob(x.double())).all()
    counts = torch.histogramdd(x.double(), bins=[10, 10], range=[-5, 5, -5, 5]).hist / len(x)
    expected = density[:400, :400].reshape(10, 40, 10, 40).sum(dim=(1, 3)).T
    assert (counts - expected).abs().max() < 0.02
    assert torch.equal(x, toy.sample(50_000)) and not torch.equal(x, toy.sample(50_000, seed=1))


def test_the_twist_keeps_areas():
    class Twist(Identity):
        def forward(self, x):
            return twist(x, 0.7), x.new_zeros(len(x))

        def inverse(self, z):
            return twist(z, -0.7)

    x = torch.randn(5, 2, dtype=torch.float64)
    assert jacobian_check(Twist(), x) < 1e-12 and check_invertible(Twist(), x) < 1e-12


@pytest.mark.parametrize("make,word", [(lambda: TOYS["pinwheel"].sample(0), "0 points")])
def test_bad_input_is_explained(make, word):
    with pytest.raises(BitflowError, match=word):
        make()
