"""The cost model: exact where it is counted, and moving the right way with every assumption."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bitflow_edu.imagenet import GPUS, Around, Gpu, Plan
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build
from bitflow_edu.lab.plotting import plot_bill
from bitflow_edu.lab.presets import find_preset, with_strategy
from bitflow_edu.lab.sampling import pair_samplers, sampler_flops
from bitflow_edu.reverse_model import ReverseModel, one_pass, sample_noise
from bitflow_edu.scale.autoencoder import decode_latents, decoded, load_vae, tiny_vae
from bitflow_edu.scale.costs import (
    Stage,
    bill,
    bill_table,
    budget_of,
    caching_stage,
    flow_step,
    images_per_hour,
    inverse_flops,
    kept_bytes,
    kept_bytes_of,
    memory_gb,
    model_cost,
    on_meta,
    pass_flops,
    perceptual_flops,
    perceptual_gb,
    reverse_step,
    score_bytes,
    speed_of,
    step_cost,
    training_stage,
)
from bitflow_edu.speed import count_flops
from bitflow_edu.tarflow import TARFlow, nll_per_dim
from bitflow_edu.training import apply_compile_and_checkpointing


def test_flops_on_shapes_are_those_of_real_models():
    """Training step and every method; also where blocks differ, and for a G with token states."""
    p = find_preset("cifar10-smoke")
    forward = replace(p.forward, image_size=8, block_layers=(2, 1))
    deep = replace(p, forward=forward, reverse=replace(p.reverse, image_size=8))
    tokens = with_strategy(deep, "hidden-distillation")
    for preset in (find_preset("mnist-mini-smoke"), deep, tokens):
        F = build(TARFlow, preset.forward, 0)
        G = build(ReverseModel, preset.reverse, 0)
        shadow = on_meta(TARFlow, preset.forward)
        derived = pass_flops(shadow, on_meta(ReverseModel, preset.reverse))
        samplers = pair_samplers(F, G)
        assert {sampler.name for sampler in samplers} == derived.keys() - {"density"}
        for sampler in samplers:
            assert derived[sampler.name] == sampler_flops(sampler), sampler.name
        x = torch.zeros(1, F.cfg.channels, F.cfg.image_size, F.cfg.image_size)
        real = count_flops(lambda F=F, x=x: nll_of(F, x).backward())
        assert step_cost(shadow, flow_step).flops == real


def nll_of(F, x):
    return nll_per_dim(F(x, torch.zeros(len(x), dtype=torch.int64)))


def test_memory_of_a_step():
    """Grows with layers; guidance in training runs G twice; a real step holds that memory."""
    p = find_preset("mnist-mini-smoke")
    F = step_cost(on_meta(TARFlow, p.forward), flow_step)
    deeper = replace(p.forward, transformer=replace(p.forward.transformer, num_layers=2))
    more = step_cost(on_meta(TARFlow, deeper), flow_step)
    assert F.kept > 2 * 16 * 64 * 4 * 6 and 1.5 < more.kept / F.kept < 2.1
    assert more.scores == 2 * F.scores
    guided = replace(p, reverse=replace(p.reverse, max_guidance=3.0))
    once, twice = budget_of(p).reverse, budget_of(guided).reverse
    assert 1.4 < twice.flops / once.flops < 2 < 1.2 * twice.kept / once.kept
    flow, held = build(TARFlow, p.forward, 0), {}

    def keep(t):
        return held.setdefault(t.untyped_storage().data_ptr(), t)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        nll_of(flow, torch.zeros(8, 1, 16, 16))
    own = {q.data_ptr() for q in flow.parameters()}
    real = sum(t.untyped_storage().nbytes() for address, t in held.items() if address not in own)
    assert 8 * (F.kept + F.scores) == pytest.approx(real, rel=0.25)


def test_hours():
    assert images_per_hour(10**12, 1.0, 0.5) == 1800


PLAN = Plan()


SMOKE = find_preset("imagenet256-b2-mse-smoke")


@pytest.fixture(scope="module")
def pair():
    """F and G of the smoke twin."""
    return model_cost(TARFlow, SMOKE.forward), model_cost(ReverseModel, SMOKE.reverse)


@pytest.fixture(scope="module")
def stages():
    """Its bill under the default plan."""
    return {s.name: s for s in bill(SMOKE, PLAN)}


def perceptual(preset):
    """The preset with an image end behind a decoder."""
    end = dict(features=("lpips-vgg",), feature_weights=(1.0,))
    objective = replace(preset.objective, **end, decoder="anywhere")
    return replace(preset, objective=objective)


def resized(cfg, blocks, layers):
    """The settings of a deeper model."""
    transformer = replace(cfg.transformer, num_layers=layers)
    return replace(cfg, num_blocks=blocks, transformer=transformer)


DEPTHS = [("imagenet256-b2-smoke", 3, 2), ("mnist-mini", 2, 3)]


@pytest.mark.parametrize("name, blocks, layers", DEPTHS)
def test_three_small_models_give_the_cost_of_any_depth_to_the_last_operation(name, blocks, layers):
    p = find_preset(name)
    forward, reverse = (resized(cfg, blocks, layers) for cfg in (p.forward, p.reverse))
    whole = budget_of(replace(p, forward=forward, reverse=reverse))
    F, G, passes = model_cost(TARFlow, forward), model_cost(ReverseModel, reverse), whole.passes
    own = whole.forward
    assert (F.params, F.step, F.kept) == (own.params, own.flops, own.kept)
    own = whole.reverse
    assert (G.params, G.step + F.forward, G.kept) == (own.params, own.flops, own.kept)
    assert (F.forward, G.forward) == (passes["density"], passes["one-pass"])
    assert F.layers == blocks * layers and G.layers == (blocks + 1) * layers


@pytest.mark.parametrize("scale_token", [False, True])
def test_what_a_guidance_scale_costs(scale_token):
    """Whether w is added to all tokens or is one more: counted from shapes as it is in a pass."""
    p = find_preset("mnist-mini-smoke")
    cfg = resized(replace(p.reverse, max_guidance=3.0, scale_token=scale_token), 3, 2)
    G, whole = build(ReverseModel, cfg, 0), model_cost(ReverseModel, cfg)
    z, c = sample_noise(cfg, 1), torch.zeros(1, dtype=torch.int64)
    flops = count_flops(lambda: one_pass(G, z, c, 1.0))
    shadow = on_meta(ReverseModel, cfg)
    assert pass_flops(on_meta(TARFlow, p.forward), shadow)["one-pass"] == flops == whole.forward
    own = step_cost(shadow, reverse_step)
    assert whole.params == own.params == sum(q.numel() for q in G.parameters())
    assert (whole.step, whole.kept) == (own.flops, own.kept)
    tokens = cfg.num_tokens + scale_token
    assert score_bytes(cfg) == 4 * 8 * tokens**2 * cfg.transformer.width // cfg.transformer.head_dim


@pytest.mark.parametrize("layers", [(1, 3), (2, 2)])
def test_blocks_with_depths_of_their_own_are_refused(layers):
    with pytest.raises(BitflowError, match="budget_of"):
        model_cost(TARFlow, replace(SMOKE.forward, block_layers=layers))


def test_a_flow_alone_and_a_budget_in_minutes_have_no_bill(pair):
    with pytest.raises(BitflowError, match="mnist-glow-smoke"):
        bill(find_preset("mnist-glow-smoke"))
    with pytest.raises(BitflowError, match="minutes"):
        training_stage(
            "stage 1", pair[0], replace(SMOKE.train_forward, steps=None, minutes=3.0), PLAN
        )


def test_the_published_size_is_met():
    p = find_preset("imagenet256-b2-mse")
    F, G = model_cost(TARFlow, p.forward), model_cost(ReverseModel, p.reverse)
    assert abs(F.params / 120e6 - 1) < 0.03 and abs(G.params / 133e6 - 1) < 0.03


def test_the_stages_are_what_a_hand_would_write(pair, stages):
    F, G = pair
    per_step, speed = SMOKE.train_forward.batch_size, 989e12 * 0.35 * 0.9 * 3600
    assert stages["stage 1: F"].flops == SMOKE.train_forward.steps * per_step * F.step
    assert stages["stage 2: G"].flops == SMOKE.train_reverse.steps * per_step * (G.step + F.forward)
    assert stages["100 by one pass"].gpu_hours == pytest.approx(100 * G.forward / speed)
    exact = 100 * 100 * inverse_flops(SMOKE.forward, F.forward)
    assert stages["100 by exact inverse"].gpu_hours == pytest.approx(exact / speed)
    assert stages["100 decoded"].flops == 100 * 622e9
    assert stages["cache latents"].gpu_hours == pytest.approx(2 * 1_281_167 * 273e9 / speed)
    assert stages["cache latents"].disk_gb == pytest.approx(1_281_167 * 2 * 2 * 4 * 8 * 8 * 2 / 1e9)


def test_pixels_need_neither_encoder_nor_decoder():
    names = ["stage 1: F", "stage 2: G", "2,000 by one pass", "2,000 by exact inverse"]
    assert [s.name for s in bill(find_preset("mnist-mini"))] == names


def test_more_gpus_shorten_the_days_and_cost_no_less():
    p = replace(SMOKE, train_forward=replace(SMOKE.train_forward, checkpoint_every=10**9))
    few, many = (bill(p, replace(PLAN, num_gpus=n))[1] for n in (2, 16))
    few_days, many_days = few.days(replace(PLAN, num_gpus=2)), many.days(replace(PLAN, num_gpus=16))
    assert few_days / 8 <= many_days < few_days
    assert many.dollars(PLAN) >= few.dollars(PLAN) == pytest.approx(few.gpu_hours * 3.0)


HALVED = [{"mfu": 0.175}, {"gpu": Gpu("half", 989 / 2, 80, 1.0)}, {"scaling": 0.45}]


@pytest.mark.parametrize("change", HALVED)
def test_half_the_speed_takes_twice_the_hours(change):
    slow = replace(PLAN, **change)
    assert speed_of(PLAN) / speed_of(slow) == pytest.approx(2)
    before, after = caching_stage(SMOKE, PLAN), caching_stage(SMOKE, slow)
    assert after.gpu_hours == pytest.approx(2 * before.gpu_hours)


def test_one_gpu_loses_nothing_to_the_others():
    assert speed_of(replace(PLAN, num_gpus=1, scaling=0.1)) == pytest.approx(3600 * 989e12 * 0.35)


def test_sharding_and_checkpointing_save_memory_and_the_frozen_flow_takes_some(pair):
    F, G = pair
    train = replace(SMOKE.train_reverse, batch_size=256, num_microbatches=1)
    plain = memory_gb(G, train, PLAN)
    assert plain == pytest.approx((22 * G.params + 256 * 0.6 * G.kept) / 1e9)
    sharded = memory_gb(G, train, replace(PLAN, sharded=True))
    assert sharded == pytest.approx(plain - 20 * G.params * 7 / 8 / 1e9)
    lighter = memory_gb(G, replace(train, activation_checkpointing=True), PLAN)
    assert lighter < plain < memory_gb(G, train, PLAN, F.params)
    assert memory_gb(G, replace(train, num_microbatches=4), PLAN) < plain


def test_checkpointing_costs_a_second_pass_of_the_layers(pair):
    F, train = pair[0], replace(SMOKE.train_forward, checkpoint_every=10**9)
    plan = replace(PLAN, around=replace(PLAN.around, gpu_hours_a_failure=1e15, disk_gb_s=1e15))
    plain = training_stage("F", F, train, plan).gpu_hours
    again = training_stage("F", F, replace(train, activation_checkpointing=True), plan).gpu_hours
    assert again / plain == pytest.approx((F.step + F.layers * F.layer) / F.step)
    assert 1.2 < again / plain < 1.34


def test_what_a_step_keeps_agrees_with_a_model_whose_layers_are_checkpointed():
    F = model_cost(TARFlow, SMOKE.forward)
    model = on_meta(TARFlow, SMOKE.forward)
    apply_compile_and_checkpointing(
        model, replace(SMOKE.train_forward, activation_checkpointing=True)
    )
    kept = kept_bytes(lambda m: flow_step(m, 2), model) // 2
    inside = F.layer_kept  # one layer at a time is computed again
    assert kept <= kept_bytes_of(F, True, 1.0) <= 1.5 * (kept + inside)
    assert kept_bytes_of(F, False, 1.0) == F.kept and score_bytes(SMOKE.forward) > 0


def test_the_image_end_is_counted_where_a_decoder_is_named_and_nowhere_else():
    p = perceptual(SMOKE)
    assert perceptual_flops(SMOKE, PLAN) == 0
    assert perceptual_flops(replace(p, objective=replace(p.objective, decoder="")), PLAN) == 0
    one = 4 * 622e9 + 3 * 61e9
    for asked, seen in ((1, 4), (6, 8), (16, 16), (1000, 32)):  # in 4 pieces of 8 images
        some = replace(p, objective=replace(p.objective, decoded_images=asked))
        assert perceptual_flops(some, PLAN) == seen * one
    with_end, without = bill(p, PLAN)[2], bill(SMOKE, PLAN)[2]
    assert perceptual_gb(SMOKE, PLAN) == 0
    assert with_end.memory_gb - without.memory_gb == pytest.approx(perceptual_gb(p, PLAN))
    assert with_end.flops - without.flops == pytest.approx(30 * perceptual_flops(p, PLAN))


def test_a_decoded_image_costs_what_is_counted_for_it(tmp_path):
    pytest.importorskip("diffusers")
    vae = load_vae(tiny_vae(tmp_path / "vae"))
    x, real = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randn(3, 4, 8, 8)
    one = count_flops(lambda: decode_latents(vae, real[:1]))
    distance = decoded(lambda a, b: (a - b).square().flatten(1).mean(1), vae, sub_batch=2)
    both = count_flops(lambda: distance(x, real).sum().backward())
    assert both == pytest.approx(2 * 4 * one, rel=0.05)


def test_overhead_counts_for_each_layer_pass_and_piece(pair):
    F, G = pair
    around = Around(gpu_hours_a_failure=1e15, disk_gb_s=1e15)
    plan = replace(PLAN, overhead_s=1.0, num_gpus=1, around=around)
    first, second = bill(SMOKE, plan)[1:3]
    assert first.gpu_hours * 3600 == pytest.approx(30 * 4 * 3 * F.layers, rel=1e-3)
    assert second.gpu_hours * 3600 == pytest.approx(30 * 4 * (3 * G.layers + F.layers), rel=1e-3)


def test_the_table_and_the_picture_show_every_stage(stages):
    text = bill_table(SMOKE, PLAN)
    assert all(name in text for name in (*stages, "in all", "H100", "35%"))
    too_small = replace(PLAN, gpu=Gpu("toy", 1, 1e-4, 1))
    assert "does not fit" not in text and "does not fit" in bill_table(SMOKE, too_small)
    ax = plot_bill({"smoke": SMOKE}, PLAN)
    drawn = np.concatenate([line.get_xdata() for line in ax.get_lines()])
    assert sorted(drawn) == pytest.approx(sorted(s.dollars(PLAN) for s in stages.values()))


NOTEBOOKS = sorted((Path(__file__).parents[1] / "nbs").rglob("*.ipynb"))


def test_the_bill_beside_each_command_for_imagenet_is_todays():
    """What notebooks say in words: the hours of every preset that a cell's commands name."""
    seen = set()
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            names = set(re.findall(r"torchrun .*--preset (imagenet256-[a-z0-9]+)\b(?!-)", text))
            names |= set(re.findall(r"^\| `(imagenet256-[a-z0-9-]+)`", text, re.MULTILINE))
            if path.name.startswith("17"):  # the commands of the twins, with the large ones' bills
                twins = r"^bitflow train .*--preset (imagenet256-[a-z0-9-]+)-smoke"
                names |= set(re.findall(twins, text, re.MULTILINE))
            for name in names:
                stages = bill(find_preset(name))
                hours, dollars = (f"{sum(v):,.0f}" for v in zip(*map(paid, stages)))
                assert f"{hours} GPU-hours" in text and f"${dollars}" in text.replace("\\$", "$"), (
                    path,
                    name,
                )
            seen |= names
    assert seen == {"imagenet256-b2", "imagenet256-b2-mse", "imagenet256-l2", "imagenet256-xl2"}


def paid(stage):
    """GPU-hours and dollars of a line of the bill."""
    return stage.gpu_hours, stage.dollars(PLAN)


def test_prices_are_the_gpus(stages):
    assert Stage("x", 0.0, 10.0).dollars(replace(PLAN, gpu=GPUS["A100"])) == 15.0
    assert Stage("x", 0.0, 48.0).days(replace(PLAN, num_gpus=2)) == 1.0
