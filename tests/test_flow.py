"""The forward model and its exact inverse: Jacobians, causality, round trips."""

import math

import pytest
import torch
from conftest import shake, small_flow
from hypothesis import given, settings
from hypothesis import strategies as st

from bitflow_edu.coupling import bits_per_dim
from bitflow_edu.data import BitflowError, asset, unpatchify
from bitflow_edu.exact_inverse import (
    exact_inverse,
    exact_trajectory,
    invert_block,
    invert_block_uncached,
    round_trip_error,
    score_denoise,
    serial_steps,
)
from bitflow_edu.tarflow import TARFlow, TARFlowConfig, log_prob, nll_per_dim
from bitflow_edu.training import load_model
from bitflow_edu.transformer import KVCache, Transformer, TransformerConfig

narrow = TransformerConfig(width=16, head_dim=8, num_layers=1)
sizes = dict(
    side=st.integers(1, 4),
    patch=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    blocks=st.integers(1, 4),
)


def matrix(fn, x):
    """∂fn/∂x as a square matrix."""
    n = x.numel()
    return torch.autograd.functional.jacobian(fn, x).reshape(n, n)


def images(flow, n=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    f = flow.cfg
    x = torch.randn(n, f.channels, f.image_size, f.image_size, generator=generator, dtype=dtype)
    return x, torch.randint(-1, f.num_classes, (n,), generator=generator)


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("channels,side,patch", [(1, 2, 2), (3, 2, 1), (1, 3, 1)])
def test_logdet_is_that_of_autograds_jacobian(modern, channels, side, patch):
    flow = small_flow(side, patch, channels, modern=modern, dtype=torch.float64)
    x, c = images(flow, n=1, dtype=torch.float64)
    jacobian = matrix(lambda v: flow(v, c).z, x)
    right = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow(x, c).logdet[0], right, rtol=0, atol=1e-8)


def test_a_flow_on_logits_of_pixels():
    """Its log|det| counts the logit, its inverse gives pixels, and α out of range is refused."""
    cfg = TARFlowConfig(
        image_size=4, patch_size=2, num_classes=3, logit_alpha=1e-3, transformer=narrow
    )
    flow = shake(TARFlow(cfg).double(), 0).train()
    x = 1.9 * torch.rand(5, 1, 4, 4, dtype=torch.float64) - 0.95
    c = torch.tensor([0, 1, 2, -1, -1])
    flow(x, c)
    right = torch.linalg.slogdet(matrix(lambda v: flow(v, c[:1]).z, x[:1])).logabsdet
    torch.testing.assert_close(flow(x[:1], c[:1]).logdet[0], right, rtol=0, atol=1e-8)
    torch.testing.assert_close(exact_inverse(flow, flow(x, c).z, c), x)
    torch.testing.assert_close(flow.log_prob(x, c), log_prob(flow(x, c)))
    with pytest.raises(BitflowError, match="logit_alpha is 0.5"):
        TARFlowConfig(logit_alpha=0.5)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("modern", [False, True])
def test_parameters_of_a_token_see_only_tokens_before_it(flip, modern):
    flow = small_flow(modern=modern)
    block = flow.blocks[int(flip)]
    assert block.flip == flip
    x, c = torch.randn(2, 9, 4), torch.tensor([0, 2])
    alpha, mu = block.parameters_of(x, c)
    for t in range(9):
        moved = x.clone()
        moved[:, t:] += 1.0
        alpha2, mu2 = block.parameters_of(moved, c)
        for found, before in ((alpha2, alpha), (mu2, mu)):
            torch.testing.assert_close(found[:, : t + 1], before[:, : t + 1], rtol=0, atol=1e-6)
        if t < 8:
            assert (alpha2[:, t + 1 :] - alpha[:, t + 1 :]).abs().max() > 1e-4


def test_first_token_in_the_blocks_order_is_left_as_it_is():
    flow = small_flow()
    x, c = torch.randn(2, 9, 4), torch.tensor([0, 1])
    assert torch.equal(flow.blocks[0](x, c)[0][:, 0], x[:, 0])
    assert torch.equal(flow.blocks[1](x, c)[0][:, -1], x[:, -1])
    assert not torch.allclose(flow.blocks[1](x, c)[0][:, 0], x[:, 0])


def test_a_fresh_flow_is_the_identity():
    flow = TARFlow(TARFlowConfig(transformer=narrow))
    x, c = images(flow)
    out = flow(x, c)
    assert torch.equal(out.z, out.states[0]) and torch.equal(out.logdet, torch.zeros(3))
    assert len(out.states) == flow.cfg.num_blocks + 1


def test_no_label_is_the_mean_embedding():
    flow = small_flow()
    embed = flow.blocks[0].class_embed
    none = embed(torch.tensor([-1]))
    torch.testing.assert_close(none, embed(torch.arange(3)).mean(dim=0, keepdim=True))


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


def test_training_loss_is_the_likelihood_up_to_its_constant():
    flow = small_flow(dtype=torch.float64)
    x, c = images(flow, dtype=torch.float64)
    out = flow(x, c)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(nll_per_dim(out) + constant, -log_prob(out).mean() / x[0].numel())


def test_bits_per_dim_of_a_known_density(digits):
    """A fresh F is the identity, so its density is the standard normal's: the integral is known."""
    flow = TARFlow(TARFlowConfig(transformer=narrow))
    part = digits[:50]
    bpd = bits_per_dim(flow, part, seed=3)
    x = (part.pixels.double() + 0.5) / 128 - 1
    square = x.square() + 1 / (12 * 128**2)  # the mean over the noise of dequantisation
    nats = 0.5 * square.mean().item() + 0.5 * math.log(2 * math.pi)
    assert bpd.shape == (50,) and abs(bpd.mean().item() - nats / math.log(2) - 7) < 1e-3


def test_shipped_flow_round_trip_on_a_thousand_digits(digits):
    flow = load_model(asset("mnist-mini/forward"), TARFlow)
    part = digits[:1000]
    assert round_trip_error(flow, part.x, part.labels) <= 1e-3
