"""The three strategies: what they compare, where gradients go, which pairs they refuse."""

import pytest
import torch

from bitflow_edu.data import add_noise
from bitflow_edu.inverse_strategies import (
    STRATEGIES,
    check_pair,
    check_strategy,
    find_strategy,
    reverse_loss,
)
from bitflow_edu.io.files import BitflowError
from conftest import small_flow, small_reverse


def batch(flow, n=4):
    torch.manual_seed(0)
    x = torch.randn(n, 1, flow.cfg.image_size, flow.cfg.image_size)
    return x, torch.tensor([0, 1, 2, -1])[:n]


def gradients(strategy, **kw):
    flow = small_flow()
    for p in flow.parameters():
        p.grad = None
    G = small_reverse(flow, token_states=strategy == "hidden-distillation", **kw)
    loss_fn = reverse_loss(flow, STRATEGIES[strategy])
    loss, metrics = loss_fn(G, *batch(flow), torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is None for p in flow.parameters()), "F is frozen"
    reached = {}
    for name, p in G.named_parameters():
        reached[name] = p.grad is not None and bool(p.grad.abs().sum() > 0)
    return metrics, reached


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_reach_what_they_should(strategy):
    metrics, reached = gradients(strategy)
    projections = [got for name, got in reached.items() if name.startswith("projections.")]
    trunk = [got for name, got in reached.items() if not name.startswith("projections.")]
    assert all(trunk), "the image end reaches the whole trunk"
    depths = [k for k in metrics if k.startswith("depth_")]
    if strategy == "naive":
        assert not any(projections) and depths == []
    else:
        assert projections and all(projections) and depths == ["depth_0", "depth_1", "depth_2"]


def test_without_denoising_the_target_is_the_noisy_image():
    flow = small_flow()
    G = small_reverse(flow, denoise=False)
    x, c = batch(flow)
    loss = reverse_loss(flow)
    _, metrics = loss(G, x, c, torch.Generator().manual_seed(0))
    noisy = add_noise(x, flow.cfg.noise_std, torch.Generator().manual_seed(0))
    out = G(flow(noisy, c).z, c)
    assert metrics["depth_0"] == 0 and not out.denoised  # the image is φ_0(h^0), and counts once
    torch.testing.assert_close(metrics["image"], (out.image - noisy).square().mean())


def test_pairs_that_do_not_fit_are_refused():
    flow = small_flow()
    with pytest.raises(BitflowError, match="num_blocks"):
        check_pair(flow, small_reverse(small_flow(blocks=2)))
    with pytest.raises(BitflowError, match="token_states"):
        check_strategy(small_reverse(flow), "hidden-distillation")
    with pytest.raises(BitflowError, match="unknown strategy 'hidden'"):
        find_strategy("hidden")
