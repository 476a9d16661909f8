"""The forward model: Jacobians, causality, likelihood, clipping, old configs."""

import doctest
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitflow_edu import tarflow
from bitflow_edu.coupling import bits_per_dim
from bitflow_edu.exact_inverse import exact_inverse
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import load_model, save_model
from bitflow_edu.tarflow import TARFlow, TARFlowConfig, log_prob, nll_per_dim
from bitflow_edu.transformer import TransformerConfig
from conftest import shake, small_flow

narrow = TransformerConfig(width=16, head_dim=8, num_layers=1)


def small_config(**changes):
    return TARFlowConfig(image_size=8, patch_size=2, num_classes=3, transformer=narrow, **changes)


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
    alpha, mu = block.affine_params(x, c)
    for t in range(9):
        moved = x.clone()
        moved[:, t:] += 1.0
        alpha2, mu2 = block.affine_params(moved, c)
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


@pytest.mark.parametrize("value", [False, True])
def test_configs_of_earlier_versions_load(tmp_path, value):
    save_model(TARFlow(small_config()), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["config"]["prior_var"] = value
    (tmp_path / "config.json").write_text(json.dumps(saved))
    if value:
        with pytest.raises(BitflowError, match="prior_var"):
            load_model(tmp_path, TARFlow)
    else:
        assert load_model(tmp_path, TARFlow).cfg == small_config()


@pytest.mark.parametrize(
    "bad, word",
    [
        (dict(clip=-1.0), "clip is -1"),
        (dict(block_layers=(1, 2)), "4 blocks"),
        (dict(block_layers=(1, 0, 1, 1)), "at least 1 layer"),
    ],
)
def test_configs_that_make_no_sense_are_refused(bad, word):
    with pytest.raises(BitflowError, match=word):
        TARFlowConfig(transformer=narrow, **bad)


@pytest.mark.parametrize("clip", [0.5, 2.0])
def test_clipping_bounds_the_parameters_and_the_stretch(clip):
    torch.manual_seed(0)
    flow = TARFlow(small_config(clip=clip, block_layers=(2, 1, 1, 1))).double()
    with torch.no_grad():
        for p in flow.parameters():
            g = torch.Generator().manual_seed(0)
            p.copy_(5 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    x, c = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, -1])
    assert [len(b.transformer.layers) for b in flow.blocks] == [2, 1, 1, 1]
    for block in flow.blocks:
        tokens = torch.randn(3, 16, 4, dtype=torch.float64)
        alpha, mu = block.affine_params(tokens, c)
        assert alpha.abs().max() <= clip and mu.abs().max() <= clip
    trajectory = flow(x, c)
    assert trajectory.z.isfinite().all() and log_prob(trajectory).isfinite().all()
    torch.testing.assert_close(exact_inverse(flow, trajectory.z, c), x, rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(clip=st.floats(0.1, 3.0), scale=st.floats(0.01, 100.0), seed=st.integers(0, 99))
def test_under_clipping_no_weights_overflow(clip, scale, seed):
    flow, g = TARFlow(small_config(clip=clip)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g))
    x, c = 3 * torch.randn(2, 1, 8, 8, generator=g), torch.tensor([0, -1])
    trajectory = flow(x, c)
    assert trajectory.z.isfinite().all() and log_prob(trajectory).isfinite().all()
    noise = torch.randn(trajectory.z.shape, generator=g)
    assert exact_inverse(flow, noise, c).isfinite().all()


def test_the_examples_of_the_docstrings():
    done = doctest.testmod(tarflow)
    assert done.attempted >= 6 and done.failed == 0
