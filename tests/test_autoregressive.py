"""MADE, MAF and IAF: what sees what, and which direction is serial."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import check_layer, property_test

from bitflow_edu.autoregressive import IAF, MADE, MAF, Flip, made_masks
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build
from conftest import shake


def maf(D):
    return MAF(D, (16, 16))


def iaf(D):
    return IAF(D, (16,))


def flip(D):
    return Flip()


@pytest.mark.parametrize("make", [maf, iaf, flip])
@property_test
@given(D=st.integers(2, 7), seed=st.integers(0, 10_000))
def test_layers_over_points(make, D, seed):
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(seed))
    check_layer(lambda: make(D), x, seed)


@settings(max_examples=15, deadline=None)
@given(
    D=st.integers(1, 8),
    hidden=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_made_sees_only_what_came_before(D, hidden, seed):
    made = shake(build(lambda h: MADE(D, tuple(h)), hidden, seed), seed, size=1.0)

    def both(x):
        return torch.cat(made(x[None])).sum(0)

    J = torch.autograd.functional.jacobian(both, torch.randn(D))
    assert torch.equal(J, J.tril(-1))


def test_made_uses_all_that_came_before():
    made = shake(MADE(6, (64, 64)), size=1.0)
    J = torch.autograd.functional.jacobian(lambda x: made(x[None])[1][0], torch.randn(6))
    assert ((J != 0) == torch.ones(6, 6).tril(-1).bool()).all()


def count_passes(made, call, x):
    """How often MADE runs during call(x)."""
    calls = []
    hook = made.register_forward_hook(lambda *a: calls.append(1))
    call(x)
    hook.remove()
    return len(calls)


def test_maf_and_iaf_are_serial_in_opposite_directions():
    maf, iaf, x = shake(MAF(7)), shake(IAF(7)), torch.randn(2, 7)
    assert count_passes(maf.made, maf, x) == 1
    assert count_passes(maf.made, maf.inverse, x) == 7
    assert count_passes(iaf.layer.made, iaf.inverse, x) == 1
    assert count_passes(iaf.layer.made, iaf, x) >= 7


@pytest.mark.parametrize("make,word", [(lambda: made_masks(0, (4,)), "dims is 0")])
def test_bad_input_is_explained(make, word):
    with pytest.raises(BitflowError, match=word):
        make()
