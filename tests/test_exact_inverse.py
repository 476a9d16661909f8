"""Guidance and fixed-point iteration against the plain token-by-token inverse."""

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import small_flow
from hypothesis import given, settings
from hypothesis import strategies as st

from bitflow_edu.data import BitflowError, asset
from bitflow_edu.exact_inverse import (
    GUIDANCE,
    Guidance,
    PackedLinear,
    capture_inverse,
    compile_blocks,
    exact_inverse,
    exact_trajectory,
    invert_block,
    invert_block_jacobi,
    jacobi_inverse,
    jacobi_trajectory,
    pack,
)
from bitflow_edu.reverse_model import sample_noise
from bitflow_edu.tarflow import TARFlow
from bitflow_edu.training import load_model


@torch.no_grad()
def guided_plainly(block, y, c, guidance):
    """The rule token by token, each branch a whole pass of the block; temperature 1 only."""
    y, T = block.order(y), y.shape[1]
    x = y.clone()
    for t in range(1, T):
        a, m = block.parameters_of(x, c)
        a_u, m_u = block.parameters_of(x, torch.full_like(c, -1))
        g = guidance.scale * (t / (T - 1) if guidance.kind == "annealed" else 1)
        if guidance.kind == "variance-aware":
            ratio = torch.minimum((a - a_u).exp(), torch.tensor(1.0)) ** 2
            sigma = a.exp() / (1 + g - g * ratio) ** 0.5
            shift = m + g * ratio / (1 + g - g * ratio) * (m - m_u)
        else:
            sigma, shift = (a + g * (a - a_u)).exp(), m + g * (m - m_u)
        x[:, t] = (y * sigma + shift)[:, t]
    return block.order(x)


@pytest.mark.parametrize("kind", GUIDANCE)
@pytest.mark.parametrize("flip", [0, 1])
def test_guidance_is_its_equation(kind, flip):
    block, guidance = small_flow(dtype=torch.float64).blocks[flip], Guidance(1.5, kind)
    y, c = torch.randn(3, 9, 4, dtype=torch.float64), torch.tensor([0, 2, 1])
    found = invert_block(block, y, c, guidance)
    torch.testing.assert_close(found, guided_plainly(block, y, c, guidance))


def test_no_push_changes_nothing():
    flow, z, c = small_flow(), torch.randn(2, 9, 4), torch.tensor([0, 2])
    plain = exact_inverse(flow, z, c)
    for kind in GUIDANCE:
        torch.testing.assert_close(exact_inverse(flow, z, c, Guidance(0.0, kind)), plain)
    none = -torch.ones_like(c)
    unconditional = exact_inverse(flow, z, none)
    torch.testing.assert_close(exact_inverse(flow, z, none, Guidance(2.0)), unconditional)


def test_temperature_alone_pushes_where_there_are_no_labels():
    flow, z, c = small_flow(), torch.randn(2, 9, 4), torch.tensor([-1, -1])
    hot = exact_inverse(flow, z, c, Guidance(1.0, temperature=2.0))
    assert (hot - exact_inverse(flow, z, c)).abs().max() > 1e-3


def test_temperature_divides_the_scores():
    """Queries divided by τ are the same as a head scale divided by τ."""
    from bitflow_edu.transformer import attend

    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    scores = (q @ k.mT) / 2 / 3
    expected = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend(q / 3, k, v, causal=True), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 2), st.integers(1, 15), st.integers(0, 1000), st.data())
def test_every_number_of_segments_gives_the_exact_inverse(side, patch, segments, seed, data):
    modern, guided = data.draw(st.booleans(), "modern"), data.draw(st.booleans(), "guided")
    flow = small_flow(side, patch, modern=modern, seed=seed, dtype=torch.float64)
    T, guidance = side * side, Guidance(1.0, "annealed") if guided else None
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, T, patch**2, generator=generator, dtype=torch.float64)
    c, segments = torch.tensor([0, 2]), min(segments, max(T - 1, 1))
    states, found = jacobi_trajectory(flow, z, c, 0.0, segments, guidance=guidance)
    for a, b in zip(states, exact_trajectory(flow, z, c, guidance=guidance)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not any(how.fell_back for how in found)


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


@pytest.mark.parametrize("bad", [dict(kind="strong"), dict(scale=-1.0), dict(temperature=0.0)])
def test_guidance_that_cannot_be(bad):
    with pytest.raises(BitflowError, match=str(*bad.values())):
        Guidance(**bad)


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
    with pytest.raises(BitflowError, match="does not fit"):
        jacobi_inverse(flow, z[:, :5], c)
    with pytest.raises(BitflowError, match="max_iterations is 0"):
        invert_block_jacobi(flow.blocks[0], z, c, max_iterations=0)


def test_guidance_needs_label_dropout():
    flow = small_flow()
    flow.cfg = replace(flow.cfg, label_dropout=0.0)
    z = torch.randn(2, 9, 4)
    with pytest.raises(BitflowError, match="without label dropout"):
        exact_inverse(flow, z, torch.tensor([0, 1]), Guidance(1.0))
    exact_inverse(flow, z, torch.tensor([-1, -1]), Guidance(1.0, temperature=2.0))


def compiled_against_plain(modern, guidance):
    """x^0 of the compiled walk against the exact one, for an F with or without modern parts."""
    flow, c = small_flow(modern=modern), torch.tensor([1, 2, 0])
    z = sample_noise(flow.cfg, 3)
    found = exact_trajectory(flow, z, c, compile_blocks(flow), guidance)[0]
    wanted = exact_trajectory(flow, z, c, guidance=guidance)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("guidance", [None, Guidance(1.0, "annealed", temperature=1.5)])
def test_a_step_of_fixed_shapes_is_the_step(modern, guidance, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    compiled_against_plain(modern, guidance)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_walk_is_the_walk():
    compiled_against_plain(False, Guidance(1.0))


@pytest.mark.parametrize("rows", [3, 64])
def test_packed_weights_give_the_same_and_leave_the_model_alone(rows):
    flow, c = small_flow(), torch.arange(rows) % 3
    z, before = sample_noise(flow.cfg, rows), {k: v.clone() for k, v in flow.state_dict().items()}
    packed = pack(flow, rows)
    found, wanted = exact_trajectory(packed, z, c)[0], exact_trajectory(flow, z, c)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert any(isinstance(m, PackedLinear) for m in packed.modules()) == (rows >= 32)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    assert all(p.requires_grad for p in flow.parameters())


def test_what_cannot_be_packed_or_captured():
    with pytest.raises(BitflowError, match="float64 on cpu"):
        pack(small_flow(dtype=torch.float64), 1)
    with pytest.raises(BitflowError, match="needs a model on a GPU"):
        capture_inverse(small_flow(), 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("guidance", [None, Guidance(1.0)])
def test_a_captured_walk_is_the_walk(guidance):
    flow = small_flow().cuda()
    replay, c = capture_inverse(flow, 3, guidance), torch.tensor([1, 2, 0], device="cuda")
    for seed in range(2):
        z = sample_noise(flow.cfg, 3, seed, device="cuda")
        wanted = exact_trajectory(flow, z, c, guidance=guidance)[0]
        torch.testing.assert_close(replay(z, c), wanted, rtol=1e-4, atol=1e-5)
