"""The exact inverse: round trips, the cache, the score, and guidance against its equations."""

import doctest
import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitflow_edu.data import unpatchify
from bitflow_edu.exact_inverse import (
    exact_inverse,
    exact_trajectory,
    invert_block,
    invert_block_uncached,
    round_trip_error,
    score_denoise,
    serial_steps,
)
from bitflow_edu.guidance import GUIDANCE, Guidance
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.models import load_model
from bitflow_edu.tarflow import TARFlow, log_prob
from bitflow_edu.transformer import KVCache, Transformer, attend
from conftest import small_flow

sizes = dict(
    side=st.integers(1, 4),
    patch=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    blocks=st.integers(1, 4),
)


def images(flow, n=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    f = flow.cfg
    x = torch.randn(n, f.channels, f.image_size, f.image_size, generator=generator, dtype=dtype)
    return x, torch.randint(-1, f.num_classes, (n,), generator=generator)


@settings(max_examples=25, deadline=None)
@given(**sizes, modern=st.booleans(), seed=st.integers(0, 10_000))
def test_round_trip_and_cache(side, patch, channels, blocks, modern, seed):
    flow = small_flow(side, patch, channels, blocks, modern, seed)
    x, c = images(flow, seed=seed)
    z = flow(x, c).z
    cached = exact_trajectory(flow, z, c)
    plain = exact_trajectory(flow, z, c, invert_block_uncached)
    for a, b, state in zip(cached, plain, flow(x, c).states):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a, state, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(unpatchify(cached[0], patch, channels), exact_inverse(flow, z, c))


def test_inverse_leaves_its_input_alone():
    flow = small_flow()
    z = torch.randn(2, 9, 4)
    kept = z.clone()
    invert_block(flow.blocks[1], z, torch.tensor([0, 1]))
    assert torch.equal(z, kept)


def test_a_full_cache_says_so():
    cache = KVCache(torch.zeros(1, 1, 1, 2, 4), torch.zeros(1, 1, 1, 2, 4), length=2)
    with pytest.raises(BitflowError, match="full"):
        cache.extend(0, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))


def test_serial_steps_counts_what_runs(monkeypatch):
    flow, calls = small_flow(), []
    step = Transformer.step

    def counted(self, *args):
        calls.append(1)
        return step(self, *args)

    monkeypatch.setattr(Transformer, "step", counted)
    exact_inverse(flow, torch.randn(1, 9, 4), torch.tensor([0]))
    assert len(calls) == serial_steps(flow) == 3 * 8


def test_score_is_the_gradient_of_the_density():
    flow = small_flow(dtype=torch.float64)
    x, c = images(flow, n=2, dtype=torch.float64)
    score = (score_denoise(flow, x, c) - x) / flow.cfg.noise_std**2
    step = torch.zeros_like(x)
    step[:, 0, 1, 2] = 1e-5
    slope = (log_prob(flow(x + step, c)) - log_prob(flow(x - step, c))) / 2e-5
    torch.testing.assert_close(score[:, 0, 1, 2], slope, rtol=1e-5, atol=1e-6)


def test_shipped_flow_round_trip_on_a_thousand_digits(digits):
    flow = load_model(asset("mnist-mini/forward"), TARFlow)
    part = digits[:1000]
    assert round_trip_error(flow, part.x, part.labels) <= 1e-3


@torch.no_grad()
def guided_plainly(block, y, c, guidance):
    """The rule token by token, each branch a whole pass of the block; temperature 1 only."""
    y, T = block.order(y), y.shape[1]
    x = y.clone()
    for t in range(1, T):
        a, m = block.affine_params(x, c)
        a_u, m_u = block.affine_params(x, torch.full_like(c, -1))
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


def test_scale_0_changes_nothing():
    flow, z, c = small_flow(), torch.randn(2, 9, 4), torch.tensor([0, 2])
    plain = exact_inverse(flow, z, c)
    for kind in GUIDANCE:
        torch.testing.assert_close(exact_inverse(flow, z, c, Guidance(0.0, kind)), plain)
    none = -torch.ones_like(c)
    unconditional = exact_inverse(flow, z, none)
    torch.testing.assert_close(exact_inverse(flow, z, none, Guidance(2.0)), unconditional)


def test_temperature_alone_guides_where_there_are_no_labels():
    flow, z, c = small_flow(), torch.randn(2, 9, 4), torch.tensor([-1, -1])
    hot = exact_inverse(flow, z, c, Guidance(1.0, temperature=2.0))
    assert (hot - exact_inverse(flow, z, c)).abs().max() > 1e-3


def test_temperature_divides_the_scores():
    """Queries divided by τ are the same as a head scale divided by τ."""
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    scores = (q @ k.mT) / 2 / 3
    expected = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend(q / 3, k, v, causal=True), expected)


@pytest.mark.parametrize("bad", [dict(kind="strong"), dict(scale=-1.0), dict(temperature=0.0)])
def test_guidance_that_cannot_be(bad):
    with pytest.raises(BitflowError, match=str(*bad.values())):
        Guidance(**bad)


def test_guidance_needs_label_dropout():
    flow = small_flow()
    flow.cfg = replace(flow.cfg, label_dropout=0.0)
    z = torch.randn(2, 9, 4)
    with pytest.raises(BitflowError, match="label_dropout 0"):
        exact_inverse(flow, z, torch.tensor([0, 1]), Guidance(1.0))
    exact_inverse(flow, z, torch.tensor([-1, -1]), Guidance(1.0, temperature=2.0))


def test_the_examples_of_the_docstrings():
    module = importlib.import_module("bitflow_edu.exact_inverse")
    done = doctest.testmod(module)
    assert done.attempted >= 4 and done.failed == 0


def test_an_inverse_on_logits_asks_for_no_gradient():
    flow = small_flow(logit_alpha=1e-3).train()
    flow(torch.rand(4, 1, 6, 6) - 0.5, torch.zeros(4, dtype=torch.long))  # sets ActNorm up
    z = torch.randn(2, *flow(torch.zeros(1, 1, 6, 6), torch.zeros(1, dtype=torch.long)).z.shape[1:])
    assert not exact_inverse(flow.eval(), z, torch.zeros(2, dtype=torch.long)).requires_grad


@pytest.mark.parametrize("flip", [False, True])
def test_a_step_beyond_the_last_token_is_refused(flip):
    """With rotary positions there would be no angle for it."""
    net = small_flow(modern=True).blocks[0].transformer
    x, cache = torch.zeros(1, 1, 16), net.empty_cache(1)
    for _ in range(cache.k.shape[3]):
        _, cache = net.step(x, cache, flip)
    with pytest.raises(BitflowError, match="too full for 1 more"):
        net.step(x, cache, flip)
