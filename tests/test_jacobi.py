"""Fixed-point iteration against token-by-token decoding."""

import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitflow_edu.exact_inverse import exact_inverse, exact_trajectory, invert_block
from bitflow_edu.excursions.jacobi import invert_block_jacobi, jacobi_inverse, jacobi_trajectory
from bitflow_edu.guidance import Guidance
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.models import load_model
from bitflow_edu.reverse_model import sample_noise
from bitflow_edu.tarflow import TARFlow
from conftest import small_flow


@settings(max_examples=20, deadline=None)
@given(
    *(st.integers(1, 4), st.integers(1, 2), st.integers(1, 15), st.integers(0, 1000)),
    *(st.booleans(), st.booleans()),
)
@example(4, 1, 1, 944, True, False)
def test_every_number_of_segments_gives_the_exact_inverse(
    side, patch, segments, seed, modern, guided
):
    flow = small_flow(side, patch, modern=modern, seed=seed, dtype=torch.float64)
    for block in flow.blocks:
        # Unbounded random weights make an inverse that grows without end: at seed 944 α reaches 28
        # in the second block, x 98, and the first overflows even in float64, however it is solved.
        block.clip = 3.0
    T, guidance = side * side, Guidance(1.0, "annealed") if guided else None
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, T, patch**2, generator=generator, dtype=torch.float64)
    c, segments = torch.tensor([0, 2]), min(segments, max(T - 1, 1))
    states, found = jacobi_trajectory(flow, z, c, 0.0, segments, guidance=guidance)
    for a, b in zip(states, exact_trajectory(flow, z, c, guidance=guidance)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not any(how.fell_back for how in found)


def test_a_flow_whose_inverse_overflows_falls_back_to_what_the_exact_inverse_gives():
    flow = small_flow(4, 1, modern=True, seed=944, dtype=torch.float64)
    z = torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(944), dtype=torch.float64)
    c = torch.tensor([0, 2])
    with pytest.warns(UserWarning, match="change nan"):
        states, found = jacobi_trajectory(flow, z, c, 0.0)
    assert [how.fell_back for how in found] == [True, False, False]
    assert torch.equal(states[0].isnan(), exact_trajectory(flow, z, c)[0].isnan())
    assert states[0].isnan().any()


def test_trained_weights_converge_before_the_last_token_is_reached():
    F = load_model(asset("mnist-mini/forward"), TARFlow)
    z, c = sample_noise(F.cfg, 20), torch.arange(20) % 10
    states, found = jacobi_trajectory(F, z, c, tolerance=1e-4)
    assert (states[0] - exact_trajectory(F, z, c)[0]).abs().max() < 1e-3
    assert min(sum(how.iterations) for how in found) < 15 and len(found) == 4
    found = jacobi_inverse(F, z, c, 1e-6)
    torch.testing.assert_close(found, exact_inverse(F, z, c), rtol=0, atol=1e-4)


def test_a_warm_start_saves_passes():
    F = load_model(asset("mnist-mini/forward"), TARFlow)
    z, c = sample_noise(F.cfg, 4), torch.arange(4)
    passes = []
    for starts in (None, exact_trajectory(F, z, c)):
        _, found = jacobi_trajectory(F, z, c, 1e-4, starts=starts)
        passes.append(sum(sum(how.iterations) for how in found))
    cold, warm = passes
    assert warm == 4 < cold


def test_where_it_does_not_converge_it_says_so_and_is_exact():
    flow = small_flow(side=4)
    y, c = torch.randn(2, 16, 4), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="did not converge"):
        x, how = invert_block_jacobi(flow.blocks[1], y, c, tolerance=0.0, max_iterations=2)
    assert how.fell_back and torch.equal(x, invert_block(flow.blocks[1], y, c))
    wild = small_flow(side=4)
    wild.blocks[0].proj_out.bias.data.fill_(60.0)
    with pytest.warns(UserWarning, match="did not converge"):
        _, how = invert_block_jacobi(wild.blocks[0], 1e30 * torch.randn(2, 16, 4), c)
    assert how.fell_back
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        invert_block_jacobi(flow.blocks[0], y, c, tolerance=0.0)


@pytest.mark.parametrize(
    "bad,word",
    [
        (dict(tolerance=-1e-4), "tolerance is -0.0001"),
        (dict(segments=0), "0 segments"),
        (dict(segments=9), "9 segments"),
        (dict(segments=(1, 2)), "3 blocks"),
    ],
)
def test_iterations_that_cannot_be(bad, word):
    flow, z, c = small_flow(), torch.randn(2, 9, 4), torch.tensor([0, 1])
    with pytest.raises(BitflowError, match=word):
        jacobi_inverse(flow, z, c, **bad)


def test_noise_and_passes_that_cannot_be():
    flow, z, c = small_flow(), torch.randn(2, 9, 4), torch.tensor([0, 1])
    with pytest.raises(BitflowError, match=r"\(2, 5, 4\)"):
        jacobi_inverse(flow, z[:, :5], c)
    with pytest.raises(BitflowError, match="max_iterations is 0"):
        invert_block_jacobi(flow.blocks[0], z, c, max_iterations=0)
