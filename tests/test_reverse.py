"""The reverse model, the three strategies, and the distances."""

import pytest
import torch
from conftest import small_flow, small_reverse

from bitflow_edu.data import BitflowError, add_noise
from bitflow_edu.distances import adaptive, feature_distance, load_feature_net, mixture
from bitflow_edu.inverse_strategies import (
    STRATEGIES,
    check_pair,
    check_strategy,
    find_strategy,
    mse,
    reverse_loss,
)
from bitflow_edu.reverse_model import one_pass, sample_noise


def batch(flow, n=4):
    torch.manual_seed(0)
    return torch.randn(n, 1, flow.cfg.image_size, flow.cfg.image_size), torch.tensor([0, 1, 2, -1])[
        :n
    ]


@pytest.mark.parametrize("modern", [False, True])
def test_every_token_sees_every_other(modern):
    flow = small_flow()
    G = small_reverse(flow, modern)
    z, c = torch.randn(1, 9, 4), torch.tensor([1])
    for t in range(9):
        moved = z.clone()
        moved[:, t] += 1.0
        change = (G(moved, c).projected[0] - G(z, c).projected[0]).abs().amax(dim=(0, 2))
        assert (change > 1e-6).all(), f"token {t} does not reach all others"


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("token_states", [True, False])
def test_one_pass_is_the_forward_pass_without_its_extras(denoise, token_states):
    flow = small_flow()
    G = small_reverse(flow, denoise=denoise, token_states=token_states)
    z, c = sample_noise(G.cfg, 3), torch.tensor([0, 2, -1])
    out = G(z, c)
    torch.testing.assert_close(one_pass(G, z, c), out.image)
    assert len(out.hidden) == flow.cfg.num_blocks + 1 and len(out.projected) == flow.cfg.num_blocks
    torch.testing.assert_close(out.hidden[-1], G.embed(z))


def test_noise_of_an_image_does_not_depend_on_how_many_there_are():
    G = small_reverse(small_flow())
    assert torch.equal(sample_noise(G.cfg, 5, seed=7)[:2], sample_noise(G.cfg, 2, seed=7))


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
    heads = [got for name, got in reached.items() if name.startswith("heads.")]
    trunk = [got for name, got in reached.items() if not name.startswith("heads.")]
    assert all(trunk), "the image end reaches the whole trunk"
    depths = [k for k in metrics if k.startswith("depth_")]
    if strategy == "naive":
        assert not any(heads) and depths == []
    else:
        assert all(heads) and depths == ["depth_0", "depth_1", "depth_2"]


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


def test_hidden_distillation_passes_on_the_projected_states_and_alignment_does_not():
    flow = small_flow()
    z, c = torch.randn(2, 9, 4), torch.tensor([0, 1])
    for token_states in (True, False):
        G = small_reverse(flow, token_states=token_states)
        before = one_pass(G, z, c)
        with torch.no_grad():
            G.heads[1][1].weight.mul_(1.5)
        assert torch.equal(before, one_pass(G, z, c)) == (not token_states)


def test_token_states_carry_no_more_than_a_token_can_hold():
    """Between blocks nothing but D numbers of each token pass: a state's rank is at most D = 4."""
    flow, c = small_flow(), torch.zeros(200, dtype=torch.long)
    ranks = []
    for token_states in (True, False):
        G = small_reverse(flow, token_states=token_states)
        at = G(torch.randn(200, 9, 4), c).hidden[1][:, 0]
        ranks.append(torch.linalg.matrix_rank(at - at.mean(0), rtol=1e-4))
    assert ranks[0] <= 4 < ranks[1]


def test_pairs_that_do_not_fit_are_refused():
    flow = small_flow()
    with pytest.raises(BitflowError, match="num_blocks"):
        check_pair(flow, small_reverse(small_flow(blocks=2)))
    with pytest.raises(BitflowError, match="token_states"):
        check_strategy(small_reverse(flow), "hidden-distillation")
    with pytest.raises(BitflowError, match="unknown strategy 'hidden'"):
        find_strategy("hidden")


def test_adaptive_weights_pull_alike_whatever_the_unit():
    a, b = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)

    def pull(distance):
        return torch.autograd.grad(distance(a, b).sum(), a)[0]

    torch.testing.assert_close(pull(adaptive(mse, p=0.0)), pull(mse))
    d = mse(a, b).detach()
    weighted = pull(mse) * (d + 0.1)[:, None] ** -0.5
    torch.testing.assert_close(pull(adaptive(mse, p=0.5, c=0.1)), weighted)

    def in_another_unit(u, v):
        return 100 * mse(u, v)

    scaled, plain = (adaptive(d, p=1.0, c=0.0) for d in (in_another_unit, mse))
    torch.testing.assert_close(pull(scaled), pull(plain))


def test_feature_distance_and_mixture(digits):
    d = feature_distance(load_feature_net())
    x = digits.x[:6]
    torch.testing.assert_close(d(x, x), torch.zeros(6), atol=1e-5, rtol=0)
    same, other = d(x, x + 0.05), d(x, x.flip(0))
    assert d(x, x).shape == (6,) and (other > same).all()
    mixed = mixture((2.0, mse), (0.5, d))
    torch.testing.assert_close(mixed(x, x.flip(0)), 2 * mse(x, x.flip(0)) + 0.5 * other)
