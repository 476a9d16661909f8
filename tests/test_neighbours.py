"""The neighbours: losses against closed forms, derivatives, pairs, samplers, bad input."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as nnf
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitflow_edu import neighbours
from bitflow_edu.data import Images
from bitflow_edu.io.checkpoints import check_stages
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.models import build, load_model, num_parameters, save_model
from bitflow_edu.lab.presets import PAIRS
from bitflow_edu.neighbours import (
    NEIGHBOURS,
    FewSteps,
    Game,
    Method,
    Neighbour,
    NeighbourConfig,
    Pairs,
    Stage,
    beside,
    codes_of,
    consistency_loss,
    euler,
    few_steps,
    find_neighbour,
    flow_matching_loss,
    gan_loss,
    gaussian,
    heun,
    jump,
    make_pairs,
    mean_flow_loss,
    own_velocity,
    path_end,
    reflow_loss,
    samplers_of,
    total_derivative,
    train_neighbour,
)
from bitflow_edu.reverse_model import ReverseModel, sample_noise
from bitflow_edu.training import TrainConfig
from conftest import shake, small_flow, small_transformer

MEAN, STD = 0.7, 0.5  # of the images in the closed forms


def wide(t):
    "A column of times."
    return t[:, None]


def spread(t):
    "The standard deviation of x_t for Gaussian images."
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


def true_velocity(x_t, t):
    "E[ε − x | x_t] by the rule for joint Gaussians."
    t = wide(t)
    slope = (t - (1 - t) * STD**2) / spread(t) ** 2
    return -MEAN + slope * (x_t - (1 - t) * MEAN)


def true_end(x_t, r, t):
    "Where the path through x_t is at time r: it keeps its place in units of the spread."
    r, t = wide(r), wide(t)
    return (1 - r) * MEAN + spread(r) / spread(t) * (x_t - (1 - t) * MEAN)


class Exact(nn.Module):
    "The average velocity of Gaussian images, moved by `error` along x_t."

    def __init__(self, error=0.0):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x_t, r, t, c=None):
        gap = wide(t - r)
        average = (x_t - true_end(x_t, r, t)) / gap.clamp(min=1e-12)
        return torch.where(gap > 1e-9, average, true_velocity(x_t, t)) + self.error * x_t


def gaussian_images(n=20_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return MEAN + STD * torch.randn(n, 1, generator=generator, dtype=torch.float64), generator


def slope_at(loss, error=0.0):
    "The loss of the exact model and its derivative by the error."
    model, (x, generator) = Exact(error), gaussian_images()
    value, _ = loss(model, x, None, generator)
    value.backward()
    return value.item(), model.error.grad.item()


def test_flow_matching_has_its_minimum_at_the_mean_velocity():
    value, slope = slope_at(flow_matching_loss())
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    remaining = (STD**2 / spread(t) ** 2).mean().item()  # Var(ε − x | x_t), worked out by hand
    assert value == pytest.approx(remaining, rel=0.03)
    assert abs(slope) < 0.03 < slope_at(flow_matching_loss(), 0.2)[1]


@pytest.mark.parametrize("tangent", [neighbours.given_velocity, own_velocity])
def test_mean_flow_has_its_minimum_at_the_average_velocity(tangent):
    loss = mean_flow_loss(tangent, share=1.0, power=0.0)
    assert abs(slope_at(loss)[1]) < 0.05
    assert slope_at(loss, 0.2)[1] > 0.08 and slope_at(loss, -0.2)[1] < -0.08


def test_the_end_of_the_path_is_the_posterior_mean_for_a_flow():
    x, generator = gaussian_images()
    t = torch.full((len(x),), 0.6, dtype=torch.float64)
    x_t = neighbours.between(x, gaussian(x, None, generator), t)
    given = path_end(Exact(), x_t, t, None)
    weight = 0.4 * STD**2 / (0.4**2 * STD**2 + 0.6**2)
    torch.testing.assert_close(given, MEAN + weight * (x_t - 0.4 * MEAN))
    for gap in (1.0, 0.25):  # with gap 1 the other end is the image itself
        value, logged = consistency_loss(gap)(Exact(), x, None, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(1)
        eps, t = gaussian(x, None, generator), neighbours.draw_times(x, generator)
        r = (1 - gap) * t
        far, near = (path_end(Exact(), neighbours.between(x, eps, a), a, None) for a in (t, r))
        if gap == 1:
            torch.testing.assert_close(near, x)
        error = (far - near).square().mean(dim=1)
        torch.testing.assert_close(logged["end_error"], error.mean())
        torch.testing.assert_close(value, (error / (t - r).clamp(min=1e-3)).mean())


def test_average_velocity_and_its_derivative_fit_together():
    x, generator = gaussian_images(200)
    t = 0.1 + 0.9 * torch.rand(200, generator=generator, dtype=torch.float64)
    r, model = t * torch.rand(200, generator=generator, dtype=torch.float64), Exact()
    v = true_velocity(x, t)
    by_identity = v - wide(t - r) * total_derivative(model, x, r, t, None, v)
    torch.testing.assert_close(by_identity, model(x, r, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jump(model, x, r, t, None), true_end(x, r, t))


def small_neighbour(method="flow-matching", modern=False, seed=0, **kw):
    cfg = NeighbourConfig(6, 1, 2, 3, 2, 0.3, method, small_transformer(modern), **kw)
    return shake(build(Neighbour, cfg, seed), seed)


def batch(n=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=dtype)
    t = 0.3 + 0.7 * torch.rand(n, generator=generator, dtype=dtype)
    return x, t / 2, t, torch.arange(n) % 4 - 1


@pytest.mark.parametrize("modern", [False, True])
def test_the_derivative_against_finite_differences(modern):
    model, (x, r, t, c) = small_neighbour(modern=modern).double(), batch(dtype=torch.float64)
    v, h = torch.randn_like(x), 1e-5
    given = total_derivative(model, x, r, t, c, v)
    with torch.no_grad():
        ahead, behind = (model(x + s * h * v, r, t + s * h, c) for s in (1, -1))
    torch.testing.assert_close(given, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)
    assert not given.requires_grad


def test_one_token_takes_plain_attention():
    "A single token would go through the fused kernel of the CPU."
    cfg = NeighbourConfig(2, 1, 2, 3, 1, transformer=small_transformer())
    x, t, c = torch.randn(4, 1, 2, 2), torch.rand(4), torch.zeros(4, dtype=torch.long)
    total_derivative(build(Neighbour, cfg, 0), x, t / 2, t, c, x)


def test_a_fused_kernel_is_named():
    def fused(x_t, r, t, c):
        q = (x_t * t.reshape(-1, 1, 1, 1)).expand(-1, 2, -1, -1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return nnf.scaled_dot_product_attention(q, q, q)[:, :1]

    x, r, t, c = batch()
    with pytest.raises(BitflowError, match="fused attention"):
        total_derivative(fused, x, r, t, c, x)


def test_codes_replaced_by_noise_are_flow_matching_to_the_bit(monkeypatch):
    F, model, (x, _, _, c) = small_flow(), small_neighbour(), batch()
    with_codes = flow_matching_loss(codes_of(F))
    real, _ = with_codes(model, x, c, torch.Generator().manual_seed(3))

    class Independent:
        "Stands for F's trajectory; its z is the noise that was drawn, and knows no image."

        def __init__(self, noise):
            self.z = neighbours.patchify(noise, F.cfg.patch_size)

    monkeypatch.setattr(neighbours, "add_noise", lambda x, sigma, g: gaussian(x, None, g))
    monkeypatch.setattr(F, "forward", lambda noise, c: Independent(noise))
    given, _ = with_codes(model, x, c, torch.Generator().manual_seed(3))
    plain, _ = flow_matching_loss()(model, x, c, torch.Generator().manual_seed(3))
    assert torch.equal(given, plain) and not torch.equal(given, real)


def test_one_step_after_reflow_is_exact_on_a_linear_toy():
    "Pairs x = Aε: lines do not cross, the velocity is linear, and one Euler step is the end."
    generator = torch.Generator().manual_seed(0)
    A = torch.tensor([[0.5, 0.2], [-0.1, 0.3]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)

    def linear(x_t, r, t, c):
        M = (1 - t)[:, None, None] * A + t[:, None, None] * eye  # x_t = M ε
        return torch.linalg.solve(M, x_t[..., None]).squeeze(-1) @ (eye - A).T

    eps = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    value, _ = reflow_loss(linear, torch.cat([eps @ A.T, eps], dim=1), None, generator)
    assert value < 1e-25
    for steps in (1, 3):
        torch.testing.assert_close(few_steps(linear, eps, None, steps), eps @ A.T)


def test_pairs_stay_together():
    model = small_neighbour()
    with pytest.warns(UserWarning, match="^7 pairs are few"):
        pairs = make_pairs(model, 7, steps=2, seed=4, batch_size=3)
    index = torch.tensor([5, 0])
    x, eps = pairs.draw(index).chunk(2, dim=1)
    torch.testing.assert_close(x, few_steps(model, eps, pairs.labels[index], 2))
    with pytest.warns(UserWarning):
        assert not torch.equal(make_pairs(model, 7, seed=5).noise, pairs.noise)
    assert len(pairs) == 7 and not torch.equal(pairs.noise[0], pairs.noise[1])


@pytest.mark.filterwarnings("error")
def test_enough_pairs_pass_in_silence():
    x = torch.zeros(Pairs.fewest, 1, 2, 2)
    Pairs(x, x, torch.zeros(Pairs.fewest, dtype=torch.long))


def test_heun_is_of_second_order():
    model, eps = Exact(), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    zero, one = torch.zeros(9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    end, errors = true_end(eps, zero, one), {}
    for step in (euler, heun):
        for n in (20, 40):
            error = few_steps(model, eps, None, n, step) - end
            errors[step, n] = error.abs().max().item()
    assert 1.7 < errors[euler, 20] / errors[euler, 40] < 2.4
    assert 3.3 < errors[heun, 20] / errors[heun, 40] < 4.8


def test_one_euler_step_is_the_mean_of_the_images():
    eps = torch.randn(50, 1, dtype=torch.float64)
    torch.testing.assert_close(few_steps(Exact(), eps, None, 1), torch.full_like(eps, MEAN))


def test_a_gan_moves_each_player_by_its_own_loss():
    model = Game(small_neighbour("gan"))
    x, _, _, c = batch()
    loss, logged = gan_loss(2.0)(model, x, c, torch.Generator().manual_seed(0))
    loss.backward()
    with torch.no_grad():
        eps = gaussian(x, c, torch.Generator().manual_seed(0))
        fake = neighbours.generated(model.generator, eps, c)
        gap = model.critic(x, c) - model.critic(fake, c)
    torch.testing.assert_close(logged["critic"], nnf.softplus(-gap).mean())
    torch.testing.assert_close(logged["generator"], nnf.softplus(gap).mean())
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fake = neighbours.generated(model.generator, eps, c)
    nnf.softplus(model.critic(x, c) - model.critic(fake, c)).mean().backward()
    for name, p in model.generator.named_parameters():
        torch.testing.assert_close(got[f"generator.{name}"], p.grad)
    assert any(name.startswith("critic.") for name in got)


def test_penalties_of_a_linear_critic_are_known():
    """d(x) = w·x has the slope w everywhere, on real images and on fakes: γ/2 (‖w‖² + ‖w‖²)."""

    class Linear(torch.nn.Module):
        def __init__(self, dims):
            super().__init__()
            self.w = torch.nn.Parameter(torch.linspace(-1, 2, dims, dtype=torch.float64))

        def forward(self, x, c):
            return x.flatten(1) @ self.w

    x, _, _, c = batch()
    game = Game(small_neighbour("gan").double(), Linear(x[0].numel()))
    bare, full = (
        gan_loss(gamma)(game, x.double(), c, torch.Generator().manual_seed(0))[0]
        for gamma in (0.0, 3.0)
    )
    torch.testing.assert_close(full - bare, 3.0 * game.critic.w.square().sum())


def test_two_times_are_apart_in_a_share_of_the_samples():
    x = torch.zeros(20_000, 1, dtype=torch.float64)
    for share in (0.0, 0.3, 1.0):
        r, t = neighbours.two_times(x, share, torch.Generator().manual_seed(0))
        assert (r <= t).all() and abs((r < t).double().mean() - share) < 0.01
        # of two uniform draws the larger has mean 2/3, the smaller 1/3
        assert abs(t.mean() - 2 / 3) < 0.01 and abs(r.mean() - (2 - share) / 3) < 0.01


def test_fresh_noise_on_the_way_is_a_batchs_own():
    model, (x, r, t, c) = small_neighbour("consistency"), batch()
    ends = [neighbours.renoise(model, images, r, t, c) for images in (x, x, x + 1e-3)]
    assert torch.equal(ends[0], ends[1])
    assert (ends[0] - ends[2]).abs().mean() > 0.1  # of nearly the same images


def test_a_derivative_in_bfloat16_is_a_few_per_cent_off():
    model, (x, r, t, c) = small_neighbour("mean-flow"), batch()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    exact = total_derivative(model, x, r, t, c, v)
    with torch.autocast("cpu", torch.bfloat16):
        short = total_derivative(model, x, r, t, c, v)
    assert 0 < (short - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith("imagenet")])
def test_a_neighbour_has_the_parameters_of_g(name):
    cfg = replace(PAIRS[name]().reverse, max_guidance=0.0)
    with torch.device("meta"):
        own, of_g = num_parameters(Neighbour(beside(cfg))), num_parameters(ReverseModel(cfg))
    assert abs(own / of_g - 1) < 0.02


@pytest.mark.filterwarnings("ignore:.*pairs are few")
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_every_method_trains_samples_and_is_stored(name, tmp_path):
    pixels = torch.randint(256, (40, 1, 6, 6), dtype=torch.uint8)
    images = Images(pixels, torch.arange(40) % 3, ("a", "b", "c"))
    cfg = TrainConfig(steps=8, batch_size=8, log_every=8, precision="fp32")
    start = small_neighbour(name)
    model = train_neighbour(start, images, cfg, tmp_path / "run", small_flow())
    assert isinstance(model, Neighbour) and model.cfg == start.cfg
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))
    ran = json.loads((tmp_path / "run" / "stage-0" / "run.json").read_text())["train"]
    two_players = name == "gan"  # smaller steps, no momentum
    assert (ran["lr"] < cfg.lr, ran["betas"][0] == 0) == (two_players, two_players)
    again = train_neighbour(start, images, cfg, tmp_path / "run", small_flow(), resume=True)
    save_model(model, tmp_path / "stored")
    loaded = load_model(tmp_path / "stored", Neighbour)
    z, c = sample_noise(model.cfg, 4), torch.tensor([0, 1, 2, -1])
    sampler = samplers_of(model)[0]
    assert sampler.name == f"{name}-1" and sampler.nfe == 1
    x = sampler(z, c)
    assert x.shape == (4, 1, 6, 6) and x.isfinite().all()
    for other in (again, loaded):
        torch.testing.assert_close(FewSteps(other, 1)(z, c), x)


def test_a_method_of_ones_own_is_one_function_and_one_entry(tmp_path, monkeypatch):
    def stages(F):
        return (Stage(flow_matching_loss()),)

    monkeypatch.setitem(NEIGHBOURS, "own", Method(stages, heun, (3,)))
    (sampler,) = samplers_of(small_neighbour("own"))
    assert (sampler.name, sampler.nfe) == ("own-3", 6)


def test_what_is_refused():
    model, (x, r, t, c) = small_neighbour(), batch()
    with pytest.raises(BitflowError, match="later than t"):
        model(x, t, r, c)
    with pytest.raises(BitflowError, match="times of shapes"):
        model(x, r[:1], t, c)
    with pytest.raises(BitflowError, match="0 steps"):
        few_steps(model, x, c, 0)
    with pytest.raises(BitflowError, match="gap is 0"):
        consistency_loss(0)
    with pytest.raises(BitflowError, match="unknown method 'drift'"):
        find_neighbour("drift")
    with pytest.raises(BitflowError, match="num_blocks is 0"):
        NeighbourConfig(num_blocks=0)


def test_an_f_of_another_shape_is_refused(tmp_path):
    model, cfg = small_neighbour("normalizing-flow-matching"), TrainConfig(steps=1)
    for F, said in ((None, "needs a trained F"), (small_flow(side=4), "'image_size': 8")):
        with pytest.raises(BitflowError, match=said):
            train_neighbour(model, None, cfg, tmp_path, F)
    with pytest.raises(BitflowError, match="a TARFlow belongs here"):
        codes_of(model)


def test_the_models_of_the_lesson_are_small():
    """Those that lesson 18 loads, all together: 6 MB at most."""
    files = [asset(f"chapters/18-{name}") for name in (*NEIGHBOURS, "biflow")]
    assert sum(f.stat().st_size for folder in files for f in folder.iterdir()) < 6e6


def test_a_stage_that_another_began_from_keeps_its_budget(tmp_path):
    """More steps for it would be thrown away: the next one goes on from its own checkpoint."""
    for name in ("stage-0", "stage-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(
            json.dumps({"train": {"steps": 4, "minutes": None}})
        )
    check_stages(tmp_path, TrainConfig(steps=4))
    with pytest.raises(BitflowError, match="had steps 4, not 8, and the next stage has begun"):
        check_stages(tmp_path, TrainConfig(steps=8))
    (tmp_path / "stage-1" / "run.json").unlink()
    (tmp_path / "stage-1").rmdir()
    check_stages(tmp_path, TrainConfig(steps=8))
