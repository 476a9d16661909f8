"""Guidance: its algebra, at inference through every block, and in training as an input of G."""

import copy
import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitflow_edu.guidance import (
    cfg_apply_block,
    cfg_extrapolate,
    cfg_recover,
    draw_scales,
    guided_pass,
    guided_run,
)
from bitflow_edu.inverse_strategies import reverse_loss
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build
from bitflow_edu.lab.presets import check_preset, find_preset
from bitflow_edu.lab.recipes import image_distance, stage_two_loss
from bitflow_edu.reverse_model import ReverseModel, one_pass, sample_noise
from bitflow_edu.tarflow import TARFlow
from conftest import shake, small_flow, small_reverse


@pytest.fixture(scope="module")
def flow():
    return small_flow()


@pytest.fixture(scope="module")
def plain(flow):
    return small_reverse(flow)


@pytest.fixture()
def guided(flow):
    return small_reverse(flow, max_guidance=2.0)


def noise(model, n=4):
    return sample_noise(model.cfg, n, seed=0), torch.tensor([0, 1, 2, -1])[:n]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


scale = st.floats(0, 20)


@settings(max_examples=50, deadline=None)
@given(scale, st.integers(0, 1000))
def test_push_and_unpush_are_inverse(w, seed):
    a, b = torch.randn(2, 3, 5, generator=generator(seed), dtype=torch.float64)
    assert torch.allclose(cfg_extrapolate(cfg_recover(a, b, w), b, w), a)
    assert torch.allclose(cfg_recover(cfg_extrapolate(a, b, w), b, w), a)
    assert torch.allclose(cfg_extrapolate(a, b, w) - b, (1 + w) * (a - b))
    assert torch.allclose(cfg_extrapolate(a, a, w), a)
    assert torch.equal(cfg_extrapolate(a, b, 0), a) and torch.equal(cfg_recover(a, b, 0), a)


@settings(max_examples=50, deadline=None)
@given(scale, scale)
def test_pushing_twice_multiplies(w, v):
    a, b = torch.randn(2, 7, generator=generator(), dtype=torch.float64)
    assert torch.allclose(
        cfg_extrapolate(cfg_extrapolate(a, b, w), b, v), cfg_extrapolate(a, b, w + v + w * v)
    )


def test_scale_zero_is_one_pass(plain):
    z, c = noise(plain)
    for zero in (0, 0.0, torch.zeros(4), torch.zeros(4, 4)):
        assert torch.allclose(guided_pass(plain, z, c, zero), one_pass(plain, z, c), atol=1e-5)
    guided, unguided = guided_pass(plain, z, c, 1.0), one_pass(plain, z, c)
    assert not torch.allclose(guided[:3], unguided[:3], atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"denoise": False}, {"token_states": True}])
def test_every_block_is_pushed(flow, options):
    model = small_reverse(flow, **options)
    z, c = noise(model)
    none, w = -torch.ones_like(c), torch.rand(4, flow.cfg.num_blocks + 1, generator=generator())

    def by_hand(block, h, i):
        return cfg_extrapolate(block(h, c), block(h, none), w[:, i, None, None])

    with torch.no_grad():
        assert torch.allclose(
            guided_pass(model, z, c, w), model.run_blocks(z, by_hand).image, atol=1e-5
        )


def test_one_scale_is_the_same_scale_for_each_block(plain):
    z, c = noise(plain)
    each = torch.tensor([0.5, 1.0, 2.0, 3.0])
    table = torch.full((4, 4), 1.5)
    assert torch.equal(guided_pass(plain, z, c, 1.5), guided_pass(plain, z, c, table))
    together = guided_pass(plain, z, c, each)
    assert torch.equal(together, guided_pass(plain, z, c, each[:, None].expand(4, 4)))
    for n, w in enumerate(each.tolist()):
        alone = guided_pass(plain, z[n : n + 1], c[n : n + 1], w)
        assert torch.allclose(together[n : n + 1], alone, atol=1e-5)


def test_each_column_guides_its_own_block(plain):
    z, c = noise(plain, 3)
    seen = [guided_pass(plain, z, c, torch.eye(4)[i].expand(3, 4)) for i in range(4)]
    for x, y in itertools.combinations([one_pass(plain, z, c), *seen], 2):
        assert not torch.allclose(x, y, atol=1e-4)


def test_no_label_is_not_pushed(plain):
    z = noise(plain)[0]
    none = torch.full((4,), -1)
    assert torch.allclose(guided_pass(plain, z, none, 3.0), one_pass(plain, z, none), atol=1e-4)


def test_what_does_not_fit_is_refused(plain, guided):
    z, c = noise(plain)
    with pytest.raises(BitflowError, match="guided already"):
        guided_pass(guided, z, c, 1.0)
    with pytest.raises(BitflowError, match="max_guidance"):
        one_pass(plain, z, c, 1.0)


@pytest.mark.parametrize(
    "w, seen",
    [
        (3.0, "w from 3 to 3"),
        (-0.5, "w from -0.5 to -0.5"),
        (torch.tensor([0.0, 1.0, 2.0, 2.5]), "w from 0 to 2.5"),
    ],
)
def test_a_scale_outside_the_trained_range_warns(guided, w, seen):
    with pytest.warns(UserWarning, match=f"{seen}, .* trained with w from 0 to 2"):
        one_pass(guided, *noise(guided), w)


def test_scales_inside_the_range_do_not_warn_and_matter(guided):
    z, c = noise(guided)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends = [one_pass(guided, z, c, w) for w in (None, 0.0, 2.0)]
        assert torch.allclose(one_pass(guided, z, c, torch.full((4, 4), 2.0)), ends[2], atol=1e-6)
    assert torch.equal(ends[0], ends[1]) and not torch.allclose(ends[1], ends[2], atol=1e-4)


def test_drawn_scales(guided):
    one, each = (draw_scales(guided.cfg, 500, each, generator()) for each in (False, True))
    assert one.shape == each.shape == (500, guided.cfg.num_blocks + 1)
    assert (one == one[:, :1]).all() and not (each == each[:, :1]).all()
    for w in (one, each):
        assert 0 <= w.min() < 0.1 and 1.9 < w.max() <= 2 and abs(w.mean() - 1) < 0.1
    again, other = (draw_scales(guided.cfg, 500, False, generator(seed)) for seed in (0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("per_block", [False, True])
def test_without_labels_the_compared_states_are_plain(guided, per_block):
    z = noise(guided)[0]
    none = torch.full((4,), -1)
    with torch.no_grad():
        out = guided_run(per_block)(guided, z, none, generator())
        plain = guided(z, none, draw_scales(guided.cfg, 4, per_block, generator()))
    for p, q in zip(out.hidden + out.projected, plain.hidden + plain.projected):
        assert torch.allclose(p, q, atol=1e-5)
    assert torch.allclose(out.image, plain.image, atol=1e-5) and out.denoised == plain.denoised


def test_the_compared_state_is_the_weighted_mean(guided):
    z, c = noise(guided)
    last, w = guided.cfg.num_blocks - 1, draw_scales(guided.cfg, 4, True, generator())
    with torch.no_grad():
        h = guided.embed(z)
        a, b = (guided.blocks[last](h, k, w[:, last]) for k in (c, -torch.ones_like(c)))
        out = guided_run(True)(guided, z, c, generator())
        assert torch.allclose(
            out.hidden[last], cfg_recover(a, b, w[:, last, None, None]), atol=1e-5
        )
        state = cfg_apply_block(guided, c, w, cfg_extrapolate)(guided.blocks[last], h, last)
    assert torch.allclose(state, cfg_extrapolate(a, b, w[:, last, None, None]), atol=1e-5)


def test_training_teaches_w_and_leaves_F_alone(flow, guided):
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    loss_of = reverse_loss(flow, run=guided_run())
    optimiser = torch.optim.AdamW(guided.parameters(), 1e-3)
    x = torch.rand(4, 1, 6, 6, generator=generator()) * 2 - 1
    c, start = torch.tensor([0, 1, 2, -1]), guided.blocks[0].scale_embed[0].weight.detach().clone()
    for step in range(3):
        optimiser.zero_grad()
        loss, terms = loss_of(guided, x, c, generator(step))
        loss.backward()
        for block in (*guided.blocks, guided.denoiser):
            for p in block.scale_embed.parameters():
                assert p.grad is not None and p.grad.abs().max() > 0
        optimiser.step()
        depths = {f"depth_{i}" for i in range(flow.cfg.num_blocks)}
        assert loss.isfinite() and {"image"} | depths <= set(terms)
    assert not torch.equal(start, guided.blocks[0].scale_embed[0].weight)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert all(p.grad is None for p in flow.parameters())


def test_training_with_guidance_needs_a_model_that_takes_w():
    with pytest.raises(BitflowError, match="max_guidance is 0"):
        draw_scales(small_reverse(small_flow()).cfg, 2, False)


def test_drawn_scales_by_default_are_one_draw_an_image(guided):
    columns, drawn = guided.cfg.num_blocks + 1, torch.rand(6, 1, generator=generator())
    w = draw_scales(guided.cfg, 6, False, generator())
    assert torch.equal(w, (2.0 * drawn).expand(6, columns))
    each = draw_scales(guided.cfg, 6, True, generator())
    assert torch.equal(each, 2.0 * torch.rand(6, columns, generator=generator()))
    assert torch.equal(each, draw_scales(guided.cfg, 6, True, generator(), denoiser_scale=True))


def test_the_denoising_block_can_have_a_scale_of_its_own(guided):
    w = draw_scales(guided.cfg, 500, False, generator(), denoiser_scale=True)
    assert w.shape == (500, guided.cfg.num_blocks + 1)
    assert (w[:, :-1] == w[:, :1]).all() and (w[:, -1] != w[:, 0]).all()
    for column in (w[:, 0], w[:, -1]):
        assert 0 <= column.min() < 0.1 and 1.9 < column.max() <= 2
    assert abs(torch.corrcoef(w[:, [0, -1]].T)[0, 1]) < 0.1
    z, c = noise(guided)
    states = [
        guided_run(denoiser_scale=apart)(guided, z, c, generator()) for apart in (False, True)
    ]
    seen = draw_scales(guided.cfg, 4, False, generator(), denoiser_scale=True)
    with torch.no_grad():
        apply = cfg_apply_block(guided, c, seen, cfg_recover)
        wanted = guided.run_blocks(z, apply).image
    assert torch.equal(states[1].image, wanted)
    assert not torch.allclose(states[0].image, wanted, atol=1e-4)


def test_the_denoising_block_can_be_left_unguided_in_one_pass(guided):
    z, c = noise(guided)
    table = torch.full((4, guided.cfg.num_blocks + 1), 1.5)
    table[:, -1] = 0
    seen = {}
    for i, block in enumerate((*guided.blocks, guided.denoiser)):
        block.register_forward_hook(lambda block, args, out, i=i: seen.update({i: args[2]}))
    one_pass(guided, z, c, table)
    assert all((w == (0 if i == guided.cfg.num_blocks else 1.5)).all() for i, w in seen.items())


def inputs_of_blocks(model, run, z, c):
    """What `run` asks G's blocks: labels and scales, call by call, and whether gradients flow."""
    asked = []

    def note(block, args, out):
        asked.append((args[1], args[2], out.requires_grad))

    hooks = [b.register_forward_hook(note) for b in (*model.blocks, model.denoiser)]
    run(model, z, c, generator())
    for hook in hooks:
        hook.remove()
    return asked


def test_a_fixed_branch_without_label_has_no_gradient_and_no_scale(guided):
    z, c = noise(guided)
    asked = inputs_of_blocks(guided, guided_run(detach_unconditional=True), z, c)
    w = draw_scales(guided.cfg, 4, False, generator())[:, 0]
    assert len(asked) == 2 * (guided.cfg.num_blocks + 1)
    for (labels, own, learns), (none, zero, fixed) in zip(asked[::2], asked[1::2]):
        assert torch.equal(labels, c) and learns
        assert torch.equal(own[:3], w[:3]) and own[3] == 0  # the last label was dropped
        assert (none == -1).all() and (zero == 0).all() and not fixed
    both = inputs_of_blocks(guided, guided_run(), z, c)  # as a default: one call, gradients in all
    assert all(torch.equal(scales, torch.cat([w, w])) and learns for _, scales, learns in both)


@pytest.mark.parametrize("detach, moved", [(False, [0, 1, 2]), (True, [1])])
def test_what_one_labelled_image_moves(guided, detach, moved):
    """No label is the mean of all classes: through it the embeddings of other classes move."""
    z = noise(guided)[0][:1]
    out = guided_run(detach_unconditional=detach)(guided, z, torch.tensor([1]), generator())
    out.image.square().sum().backward()
    for block in (*guided.blocks, guided.denoiser):
        gradient = block.class_embed.weight.grad.flatten(1)
        assert gradient.any(dim=1).nonzero().flatten().tolist() == moved


def test_a_fixed_branch_gives_the_weighted_mean_and_its_gradient(guided):
    z, c = noise(guided)
    last = guided.cfg.num_blocks - 1
    block, w = guided.blocks[last], draw_scales(guided.cfg, 4, False, generator())[:, last]
    w, h = w * (c >= 0), guided.embed(z)
    a, b = block(h, c, w), block(h, -torch.ones_like(c), torch.zeros(4)).detach()
    wanted = (a + w[:, None, None] * b) / (1 + w[:, None, None])
    out = guided_run(detach_unconditional=True)(guided, z, c, generator()).hidden[last]
    torch.testing.assert_close(out, wanted)
    assert torch.equal(out[3], a[3])  # without label: the plain state at w = 0
    parameters = list(block.parameters())
    for p, q in zip(
        torch.autograd.grad(out.square().sum(), parameters),
        torch.autograd.grad(wanted.square().sum(), parameters),
    ):
        torch.testing.assert_close(p, q)


VARIANTS = [
    ({}, {"detach_unconditional": True}),
    ({}, {"denoiser_scale": True}),
    ({"scale_token": True}, {}),
    ({"scale_token": True}, {"detach_unconditional": True, "denoiser_scale": True}),
]


@pytest.mark.parametrize("shape, training", VARIANTS)
@pytest.mark.parametrize("bf16", [False, True])
def test_every_variant_trains_all_weights(flow, shape, training, bf16):
    """Under autocast too, where a cast that was kept without gradient would stop learning."""
    G = small_reverse(flow, max_guidance=2.0, **shape).train()
    loss_of = reverse_loss(flow, run=guided_run(**training))
    optimiser = torch.optim.AdamW(G.parameters(), 1e-3)
    x = torch.rand(4, 1, 6, 6, generator=generator()) * 2 - 1
    before = {name: p.detach().clone() for name, p in G.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = loss_of(G, x, torch.tensor([0, 1, 2, -1]), generator())
    loss.backward()
    optimiser.step()
    assert loss.isfinite()
    still = [name for name, p in G.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still
    assert all(not torch.equal(p, before[name]) for name, p in G.named_parameters())


BASE = find_preset("mnist-mini-smoke")
SCALES = {"max_guidance": 3.0}
CHOICES = {
    "objective.detach_unconditional": ({}, {"detach_unconditional": True}),
    "objective.denoiser_scale": ({}, {"denoiser_scale": True}),
    "reverse.scale_token": ({"scale_token": True}, {}),
}


def changed(reverse, objective):
    reverse = replace(BASE.reverse, **reverse)
    return replace(BASE, reverse=reverse, objective=replace(BASE.objective, **objective))


@pytest.mark.parametrize("name", CHOICES)
def test_choices_about_w_need_a_g_that_takes_w(name, flow):
    reverse, objective = CHOICES[name]
    assert check_preset(changed(SCALES | reverse, objective)).reverse.max_guidance == 3
    wrong = changed(reverse, objective)
    with pytest.raises(BitflowError, match=f"{name} is True.*max_guidance is 0"):
        check_preset(wrong)
    with pytest.raises(BitflowError, match=f"{name} is True.*max_guidance is 0"):
        model = build(ReverseModel, wrong.reverse, 0)
        stage_two_loss(build(TARFlow, BASE.forward, 0), model, wrong.objective, "cpu")


def test_a_scale_of_its_own_needs_a_denoising_block_and_is_not_asked_for_twice():
    with pytest.raises(BitflowError, match="denoiser_scale is True.*denoise is False"):
        check_preset(changed(SCALES | {"denoise": False}, {"denoiser_scale": True}))
    with pytest.raises(BitflowError, match="w_per_block and denoiser_scale"):
        replace(BASE.objective, w_per_block=True, denoiser_scale=True)


@pytest.mark.parametrize("name", [*CHOICES, "objective.w_per_block", "as before"])
def test_a_preset_trains_as_its_objective_says(name, flow):
    """The loss of a preset, on the same draw, is that of `guided_run` with the same choices."""
    reverse, objective = CHOICES.get(name, ({}, {}))
    if name == "objective.w_per_block":
        objective = {"w_per_block": True}
    preset = changed(SCALES | reverse, {"features": (), "feature_weights": (), **objective})
    F, G = build(TARFlow, preset.forward, 0), shake(build(ReverseModel, preset.reverse, 0))
    x, c = torch.rand(6, 1, 16, 16, generator=generator()) * 2 - 1, torch.arange(6) - 1
    loss, _ = stage_two_loss(F, G, preset.objective, "cpu")(G, x, c, generator())
    choices = {"per_block": objective.pop("w_per_block", False), **objective}
    end = image_distance(preset.objective)
    wanted = reverse_loss(F, image_distance=end, distance=end, run=guided_run(**choices))
    assert torch.equal(loss, wanted(G, x, c, generator())[0])
    default = reverse_loss(F, image_distance=end, distance=end, run=guided_run())
    assert torch.equal(loss, default(G, x, c, generator())[0]) == (
        not objective and "w_p" not in name
    )


def test_guidance_at_inference_in_bfloat16(plain):
    """Noise stays in float32, and so would scales make the states."""
    half = copy.deepcopy(plain).bfloat16()
    z, c = noise(half)
    found = guided_pass(half, z, c, 0.5)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert (found.float() - guided_pass(plain, z, c, 0.5)).abs().mean() < 0.05
