"""Part I: bijections, couplings, autoregressive layers.

Every layer against autograd and back again, at random weights and shapes."""

import math

import pytest
import torch
from conftest import shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions
from torch.distributions.transforms import SigmoidTransform

from bitflow_edu.autoregressive import IAF, MADE, MAF, Flip, made_masks, maf_points
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
    check_invertible,
    fit,
    full_jacobian,
    jacobian_check,
    safe_exp,
)
from bitflow_edu.coupling import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    CouplingConfig,
    CouplingFlow,
    Flatten,
    HalfCoupling,
    Invertible1x1,
    Logit,
    Split,
    Squeeze,
    bits_per_dim,
    conv_net,
    every_other,
    half_of,
    mlp,
    realnvp_points,
    to_bits,
    uniform_noise_loss,
)
from bitflow_edu.data import BitflowError, dequantize, to_model_range
from bitflow_edu.pipeline import build
from bitflow_edu.toys import TOYS, twist


def identity(D):
    return Identity()


def flip(D):
    return Flip()


def inverse_steps(D):
    return Inverse(SoftSteps(D))


def additive(D):
    return AdditiveCoupling(every_other(D, parity=1), mlp(D, D, 8))


def affine(D, bound=2.0):
    return AffineCoupling(every_other(D), mlp(D, 2 * D, 8), bound)


def unbounded(D):
    return affine(D, bound=None)


def maf(D):
    return MAF(D, (16, 16))


def iaf(D):
    return IAF(D, (16,))


def stack(D):
    return Compose(Linear(D), SoftSteps(D), MAF(D, (16,)), Flip())


def checkerboard(C, H):
    return AffineCoupling(every_other(1, H, H), conv_net(C, 2 * C, 8))


def channel_mask(C, H):
    return AffineCoupling(half_of(C, parity=1), conv_net(C, 2 * C, 8))


def squeeze(C, H):
    return Squeeze()


def act_norm(C, H):
    return ActNorm(C)


def invertible_1x1(C, H):
    return Invertible1x1(C)


def half_coupling(C, H):
    return HalfCoupling(C, 8)


def flatten(C, H):
    return Flatten(C, H, H)


def split(C, H):
    return Split(Compose(ActNorm(C // 2), Flatten(C // 2, H, H)), C, H, 8)


POINTS = (  # layers over points (N, D)
    *(identity, Affine, Linear, SoftSteps, inverse_steps, additive, affine, unbounded),
    *(ActNorm, Invertible1x1, maf, iaf, flip, stack),
)
IMAGES = (  # layers over images (N, C, H, W); C even, H even
    *(checkerboard, channel_mask, squeeze, act_norm, invertible_1x1),
    *(half_coupling, flatten, split),
)
property_test = settings(max_examples=6, deadline=None)


def ready(make, seed, x):
    """A layer with random weights; what looks at its first batch has seen one."""
    torch.manual_seed(seed)
    layer = shake(make(), seed).train()
    layer(x)
    return layer.eval()


def check_layer(make, x, seed):
    """log|det| to 1e-8 in float64, the round trip to 1e-5 in float32, relative to |z|."""
    layer = ready(make, seed, x)
    assert jacobian_check(layer, x) < 1e-8
    z = layer(x)[0]
    assert check_invertible(layer, x) < 1e-5 * max(1.0, z.abs().max().item())


@pytest.mark.parametrize("make", POINTS)
@property_test
@given(D=st.integers(2, 7), seed=st.integers(0, 10_000))
def test_layers_over_points(make, D, seed):
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(seed))
    check_layer(lambda: make(D), x, seed)


@pytest.mark.parametrize("make", IMAGES)
@property_test
@given(half=st.integers(1, 2), side=st.sampled_from([2, 4]), seed=st.integers(0, 10_000))
def test_layers_over_images(make, half, side, seed):
    C = 2 * half
    x = torch.randn(3, C, side, side, generator=torch.Generator().manual_seed(seed))
    check_layer(lambda: make(C, side), x, seed)


@pytest.mark.parametrize("kind", ["nice", "realnvp", "glow"])
@settings(max_examples=3, deadline=None)
@given(channels=st.sampled_from([1, 3]), seed=st.integers(0, 10_000))
def test_whole_image_flows(kind, channels, seed):
    levels = 1 if kind == "nice" else 2
    cfg = CouplingConfig(kind, image_size=4, channels=channels, levels=levels, steps=2, width=8)
    x = 1.9 * torch.rand(3, channels, 4, 4, generator=torch.Generator().manual_seed(seed)) - 0.95
    flow = ready(lambda: build(CouplingFlow, cfg, seed), seed, x)
    assert jacobian_check(flow, x[:1]) < 1e-8
    double = flow.double()
    assert check_invertible(double, x.double()) < 1e-8
    assert flow(x.double())[0].shape == (3, cfg.dims)


def test_a_fresh_coupling_changes_nothing():
    x = torch.randn(3, 6)
    first = AffineCoupling(every_other(6), mlp(6, 12))
    second = AdditiveCoupling(every_other(6), mlp(6, 6))
    for layer in (first, second, realnvp_points(6)):
        z, logdet = layer(x)
        assert torch.equal(z, x) and not logdet.any()


def test_couplings_pass_their_half_and_are_triangular():
    layer = shake(AffineCoupling(every_other(6), mlp(6, 12, 8)))
    x = torch.randn(4, 6)
    z, _ = layer(x)
    passed = layer.mask.bool()
    assert torch.equal(z[:, passed], x[:, passed])
    assert not torch.isclose(z[:, ~passed], x[:, ~passed]).any()
    order = torch.cat([passed.nonzero(), (~passed).nonzero()]).flatten()
    J = full_jacobian(layer, x[0])[order][:, order]
    assert torch.equal(J, J.tril())


def test_masks():
    board, other = every_other(1, 4, 4), every_other(1, 4, 4, parity=1)
    assert board.shape == (1, 4, 4) and torch.equal(board + other, torch.ones(1, 4, 4))
    assert board[0, 0, 0] == 1
    assert (board[0, :-1] + board[0, 1:] == 1).all()
    assert (board[0, :, :-1] + board[0, :, 1:] == 1).all()
    assert half_of(4).flatten().tolist() == [1, 1, 0, 0]
    assert half_of(4, 1).flatten().tolist() == [0, 0, 1, 1]


def test_squeeze_of_a_counted_image():
    z, logdet = Squeeze()(torch.arange(1.0, 17).reshape(1, 1, 4, 4))
    channels = [[1, 3, 9, 11], [2, 4, 10, 12], [5, 7, 13, 15], [6, 8, 14, 16]]
    assert z[0].flatten(1).tolist() == channels and logdet.tolist() == [0]


def test_actnorm_takes_its_scale_from_the_first_batch_alone():
    layer, g = ActNorm(3).train(), torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(64, 3, 4, 4, generator=g)
    z, _ = layer(x)
    values = z.transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 1e-5 and (values.std(1) - 1).abs().max() < 1e-3
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(10 * x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    z, _ = ActNorm(2).train()(torch.zeros(8, 2))
    assert torch.isfinite(z).all(), "a channel that never changes has no scale to take"


def test_an_untrained_actnorm_does_not_sample():
    with pytest.raises(BitflowError, match="has seen no data"):
        ActNorm(3).inverse(torch.randn(2, 3))
    flow = build(CouplingFlow, CouplingConfig("glow", 8, steps=1, width=8), 0)
    with pytest.raises(BitflowError, match="has seen no data"):
        flow.inverse(torch.randn(2, 64))


def test_a_checkpoint_keeps_what_actnorm_saw(tmp_path):
    from bitflow_edu.training import load_model, save_model

    cfg = CouplingConfig("glow", 8, steps=1, width=8)
    x = 1.8 * torch.rand(8, 1, 8, 8) - 0.9
    flow = ready(lambda: build(CouplingFlow, cfg, 0), 0, x)
    save_model(flow, tmp_path)
    again = load_model(tmp_path, CouplingFlow)
    z, _ = again(x)
    torch.testing.assert_close(z, flow(x)[0])
    assert check_invertible(again, x) < 1e-3


def nice_on_larger_images():
    build(CouplingFlow, CouplingConfig("nice", 8, levels=1), 0)(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize(
    "make,word",
    [
        (lambda: half_of(3), "3 channels"),
        (lambda: HalfCoupling(5), "5 channels"),
        (lambda: Split(Identity(), 3, 4), "3 channels"),
        (lambda: Squeeze()(torch.randn(1, 1, 5, 4)), "5x4"),
        (lambda: Squeeze()(torch.randn(4, 4)), r"\(4, 4\)"),
        (lambda: Squeeze().inverse(torch.randn(1, 3, 2, 2)), "3 channels"),
        (lambda: Logit()(torch.tensor([[0.0, 1.5]])), "1.5"),
        (lambda: Logit()(torch.tensor([[-30.0, 0.5]])), "-30"),
        (lambda: Logit()(torch.tensor([[math.nan, 0.5]])), "nan"),
        (lambda: CouplingConfig("glowing"), "glowing"),
        (lambda: CouplingConfig(steps=0), "steps is 0"),
        (lambda: CouplingConfig(alpha=0.7), "alpha is 0.7"),
        (lambda: CouplingFlow(CouplingConfig(image_size=28, levels=3)), "28"),
        (nice_on_larger_images, "16"),
        (lambda: made_masks(0, (4,)), "dims is 0"),
        (lambda: TOYS["pinwheel"].sample(0), "0 points"),
        (lambda: safe_exp(torch.tensor([0.0, 90.0])), "90"),
        (lambda: safe_exp(torch.tensor([-90.0])), "90"),
        (lambda: safe_exp(torch.tensor([math.nan])), "nan"),
    ],
)
def test_bad_input_is_explained(make, word):
    with pytest.raises(BitflowError, match=word):
        make()


def test_an_overflowing_scale_is_caught():
    layer = AffineCoupling(every_other(4), mlp(4, 8, 8), bound=None)
    layer.net[-1].bias.data.fill_(100.0)
    with pytest.raises(BitflowError, match="log-scale reached 100"):
        layer(torch.randn(2, 4))
    layer.bound = 2.0
    assert check_invertible(layer, torch.randn(2, 4)) < 1e-4


def test_check_invertible_names_what_is_lost():
    class Rounds(Identity):
        def forward(self, x):
            return x.round(), x.new_zeros(len(x))

    class Overflows(Identity):
        def forward(self, x):
            return x * math.inf, x.new_zeros(len(x))

    with pytest.raises(BitflowError, match="Rounds does not come back"):
        check_invertible(Rounds(), torch.tensor([[0.3]]))
    with pytest.raises(BitflowError, match="not finite"):
        check_invertible(Overflows(), torch.tensor([[0.3]]))


def test_jacobian_check_finds_a_wrong_logdet():
    class Wrong(Affine):
        def forward(self, x):
            z, logdet = super().forward(x)
            return z, logdet + 0.01

    assert jacobian_check(Wrong(3), torch.randn(2, 3)) == pytest.approx(0.01)


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


def test_bits_of_a_uniform_density_are_eight(digits):
    class Uniform(torch.nn.Linear):
        def log_prob(self, x, c):
            return torch.full((len(x),), x[0].numel() * math.log(0.5))

    for draws in (1, 4):
        bpd = bits_per_dim(Uniform(1, 1), digits[:20], draws=draws)
        torch.testing.assert_close(bpd, torch.full((20,), 8.0))
    with pytest.raises(BitflowError, match="draws is 0"):
        bits_per_dim(Uniform(1, 1), digits[:20], draws=0)


def test_more_draws_tighten_the_bound(digits):
    cfg = CouplingConfig("glow", 16, steps=1, width=8)
    part = digits[:40]
    flow = ready(lambda: build(CouplingFlow, cfg, 0), 0, part.x)
    one, many = (bits_per_dim(flow, part, draws=k).mean() for k in (1, 16))
    assert many < one


def test_the_training_loss_is_the_measured_quantity(digits):
    """Averaged over noise, the loss is the one-draw bits/dim; its noise stays within the bins."""
    cfg = CouplingConfig("glow", 16, steps=1, width=8)
    part = digits[:64]
    flow = ready(lambda: build(CouplingFlow, cfg, 0), 0, part.x)
    losses, bits = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            losses.append(uniform_noise_loss(flow, part.x, None, generator)[0].item())
        bits.append(bits_per_dim(flow, part, seed=seed).mean().item())
    assert sum(losses) / 8 == pytest.approx(sum(bits) / 8, abs=0.02)
    seen = []

    class Spy(torch.nn.Module):
        def log_prob(self, x, c):
            seen.append(x)
            return flow.log_prob(x)

    uniform_noise_loss(Spy(), part.x, None, torch.Generator().manual_seed(0))
    assert torch.equal(((seen[0] + 1) * 128).floor().to(torch.uint8), part.pixels)


def test_to_bits_undoes_the_scaling_of_the_data():
    pixels = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    x = dequantize(pixels, torch.Generator().manual_seed(0))
    assert (x - to_model_range(pixels)).abs().max() <= 0.5 / 128
    assert to_bits(torch.tensor([16 * math.log(128.0)]), 16).item() == pytest.approx(0.0, abs=1e-6)
