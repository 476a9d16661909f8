"""The bench for speed: counted costs, limits, what is named when it is left out, guidance."""

import math
import time
from functools import partial

import pytest
import torch

from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build
from bitflow_edu.lab import bench_speed
from bitflow_edu.lab.bench import geometry, random_flow
from bitflow_edu.lab.bench_speed import BenchCase, Cost, Limits, Workload
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.scale.costs import inverse_flops, on_meta
from bitflow_edu.speed import Machine, count_flops
from bitflow_edu.tarflow import TARFlow
from conftest import small_flow, small_reverse

MACHINE = Machine(peak=1e12, bandwidth=1e11)
COSTS = {"flops_per_image", "bytes_per_image", "nfe", "serial_steps"}


def test_costs_follow_from_shapes():
    preset = find_preset("imagenet256-b2")
    one, many = (bench_speed.pair_costs(preset.forward, preset.reverse, n) for n in (1, 64))
    half = bench_speed.pair_costs(preset.forward, preset.reverse, 1, torch.bfloat16)
    weights = 0
    for name, p in on_meta(TARFlow, preset.forward).blocks.named_parameters():
        if p.dim() == 2 and not name.endswith("pos_embed"):
            weights += p.nbytes
    assert one["exact"].serial == 8 * 255 and one["one-pass"].serial == 1
    flops = inverse_flops(preset.forward, one["density"].flops)
    assert one["exact"].flops == many["exact"].flops == flops
    # every step reads a block's weights
    assert one["exact"].moved == pytest.approx(255 * weights, rel=0.05)
    assert many["exact"].moved < 64 * 0.2 * one["exact"].moved  # and a batch shares them
    assert weights < one["density"].moved < 3 * weights  # once, with T tokens of activations
    assert half["exact"].moved == pytest.approx(one["exact"].moved / 2, rel=0.05)


def test_jacobi_is_charged_for_the_passes_it_took():
    F = random_flow(geometry("mnist-mini-smoke"))
    G = build(ReverseModel, bench_speed.reverse_for("mnist-mini-smoke", F.cfg), 0).eval()
    for row in ("jacobi", "gs-jacobi"):
        case = bench_speed.eager_cases(Workload(F, G, 2))[row]
        states, how = case.call()
        cost = case.after((states, how))
        density = bench_speed.pair_costs(F.cfg, G.cfg, 2)["density"]
        assert cost.serial == sum(sum(h.iterations) for h in how)
        passes = sum(sum(h.iterations) / len(h.iterations) for h in how)
        assert cost.flops == round(density.flops * passes / 2)
        assert cost.moved >= density.moved


def test_slow_broken_and_hopeless_rows_are_named_not_dropped():
    def broken():
        """Fails as a GPU does that is full."""
        raise RuntimeError("out of memory\nand a long story")

    ran = []
    cases = {
        "slow": BenchCase(partial(time.sleep, 0.2), Cost(1, 1, 1, 1)),
        "broken": BenchCase(broken, Cost(1, 1, 1, 1)),
        "hopeless": BenchCase(lambda: ran.append(1), Cost(1, 1, 1, 10**12)),
        "good": BenchCase(partial(time.sleep, 0.01), Cost(1, 2, 10**9, 1000)),
    }
    limits, found = Limits(repeats=4, row_s=0.5), {}
    for row, case in cases.items():
        found[row] = bench_speed.time_case(row, case, {"batch": 4}, MACHINE, limits, math.inf)
    reasons = {"slow": "a call takes 0.2", "broken": "out of memory", "hopeless": "roofline"}
    for row, part in reasons.items():
        m, *cost = found[row]
        assert {x["metric"] for x in cost} == COSTS
        assert m["metric"] == "left_out" and m["batch"] == 4
        assert part in m["why"] and "long story" not in m["why"]
    of = {m["metric"]: m for m in found["good"]}
    seconds = of["ms_per_image"]["value"] * 4 / 1000
    assert not ran and of["bytes_per_image"]["value"] == 250
    assert of["mfu"]["value"] == pytest.approx(4e9 / seconds / 1e12)
    assert of["ms_per_image"]["n"] == 4 and of["serial_steps"]["value"] == 2


@pytest.mark.parametrize("cold, warm, kept", [(1.5, 0.8, True), (1.5, 1.2, False), (4, 0.1, False)])
def test_a_row_is_not_judged_by_a_cold_call(cold, warm, kept, monkeypatch):
    """The first call loads what the others find; it decides only where it fills a row's time."""
    clock, calls = [0.0], []

    def call():
        calls.append(clock[0])
        clock[0] += cold if len(calls) == 1 else warm

    def call_times(fn, repeats):
        begun = clock[0]
        for _ in range(repeats):
            fn()
        return [1000 * (clock[0] - begun) / repeats] * repeats

    monkeypatch.setattr(bench_speed, "call_times", call_times)
    monkeypatch.setattr(
        bench_speed, "timed", lambda fn, *a, **k: {"median_ms": call_times(fn, 1)[0]}
    )
    case = BenchCase(call, Cost(1, 1, 1, 1))
    if kept:
        assert bench_speed.timed_within(case, Limits(row_s=3.0))[1]["median_ms"] == pytest.approx(
            800
        )
    else:
        with pytest.raises(BitflowError, match="a call takes"):
            bench_speed.timed_within(case, Limits(row_s=3.0))


def test_a_batch_is_complete_before_the_next_begins(monkeypatch):
    """So that the time of a run cuts the largest batch, and not what is compiled."""
    seen = []
    monkeypatch.setattr(
        bench_speed, "time_case", lambda row, case, at, *a: seen.append((at["batch"], row)) or []
    )
    F = random_flow(geometry("mnist-mini-smoke"))
    bench_speed.bench_geometry("mnist-mini-smoke", F, batches=(1, 2), compiled=True)
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)
    assert (1, "one-pass, compiled") in seen and (2, "one-pass, compiled") in seen


def test_a_run_that_is_over_starts_nothing():
    F = random_flow(geometry("mnist-mini-smoke"))
    found = bench_speed.bench_geometry(
        "mnist-mini-smoke", F, batches=(1,), limits=Limits(2, 1.0, 0.0)
    )
    rows = [m for m in found if m["row"] != "machine"]
    assert {m["row"] for m in rows} >= {"one-pass", "exact", "jacobi"}
    assert "ms_per_image" not in {m["metric"] for m in rows}
    assert all("run were over" in m["why"] for m in rows if m["metric"] == "left_out")


def test_bench_of_a_latent_preset_has_every_row_and_metric():
    pytest.importorskip("diffusers")
    F = random_flow(geometry("imagenet256-b2-smoke"))
    before = {name: p.clone() for name, p in F.named_parameters()}
    limits = Limits(2, 20.0, 60.0)
    found = bench_speed.bench_geometry("imagenet256-b2-smoke", F, "bf16", (2,), limits=limits)
    at = {(m["row"], m["metric"]): m["value"] for m in found}
    decoders, backs = ("vae-decoder", "tiny-decoder"), ("exact", "jacobi", "gs-jacobi")
    for row in ("one-pass", "score-step", *backs, *decoders):
        assert COSTS | {"ms_per_image", "mfu"} <= {m for r, m in at if r == row}, row
    assert ("packed", "ms_per_image") not in at and ("plain", "ms_per_image") not in at
    ratio = at["exact", "ms_per_image"] / at["one-pass", "ms_per_image"]
    assert at["one-pass", "speedup_vs_exact"] == pytest.approx(ratio)
    assert at["machine", "measured_peak_tflops"] > 0
    assert all(torch.equal(p, before[name]) for name, p in F.named_parameters())
    assert at["vae-decoder", "flops_per_image"] > 5 * at["tiny-decoder", "flops_per_image"]


def test_without_decoders_the_ways_back_are_measured_all_the_same(monkeypatch):
    def missing(*args):
        raise BitflowError("the decoders of latents come from diffusers, which is not installed")

    monkeypatch.setattr(bench_speed, "latent_decoders", missing)
    name = "imagenet256-b2-smoke"
    F = random_flow(geometry(name))
    limits = bench_speed.Limits(repeats=2, row_s=1.0, run_s=0.0)
    found = bench_speed.bench_geometry(name, F, "fp32", (1, 2), limits=limits)
    at = [(m["batch"], m["why"]) for m in found if m["row"] == "vae-decoder"]
    assert [batch for batch, _ in at] == [1, 2] and "diffusers" in at[0][1]
    assert "one-pass" in {m["row"] for m in found}


def test_the_decoder_has_the_published_size():
    """49M parameters; 308 GFLOP an image of 256², a multiplication and an addition taken as one."""
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        decoder = bench_speed.latent_decoders("meta")["vae-decoder"]
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(49e6, rel=0.03)
    latent = torch.empty(1, 4, 32, 32, device="meta")
    assert count_flops(lambda: decoder.decode(latent)) / 2 == pytest.approx(308e9, rel=0.02)


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(BitflowError, match="fp8.*bf16"):
        bench_speed.find_dtype("fp8", "cpu")
    assert bench_speed.find_dtype("auto", "cuda") is torch.bfloat16
    assert bench_speed.find_dtype("auto", "cpu") is torch.float32
    assert bench_speed.reverse_for("64-tokens", geometry("64-tokens")).num_tokens == 64


def test_guidance_costs_the_exact_inverse_a_second_branch_and_one_pass_nothing():
    preset = find_preset("mnist-mini")
    plain, guided = (
        bench_speed.pair_costs(preset.forward, preset.reverse, 1, branches=n) for n in (1, 2)
    )
    for row in ("one-pass", "score-step"):
        assert guided[row] == plain[row]
    for row in ("exact", "density"):
        assert guided[row].flops == 2 * plain[row].flops
        assert guided[row].serial == plain[row].serial
        # both branches share the weights that a step reads
        assert plain[row].moved < guided[row].moved < 2 * plain[row].moved
    two_images = bench_speed.pair_costs(preset.forward, preset.reverse, 2)["exact"]
    assert guided["exact"].moved == two_images.moved


@pytest.mark.parametrize("w", [None, 0.0, 1.5])
def test_cases_of_a_workload_draw_the_same_image(w):
    flow = small_flow()
    G = small_reverse(flow, max_guidance=0.0 if w is None else 2.0)
    cases = bench_speed.eager_cases(Workload(flow, G, 2, w, tolerance=1e-6))
    assert ("plain" in cases) == (w is not None)
    assert {"one-pass", "score-step", "exact", "jacobi", "gs-jacobi"} <= set(cases)
    truth = cases["exact"].call()
    for row in ("plain", "packed"):
        if row in cases:
            torch.testing.assert_close(cases[row].call(), truth, atol=1e-4, rtol=1e-4)
    for row in ("jacobi", "gs-jacobi"):
        states, _ = cases[row].call()
        torch.testing.assert_close(states[0], truth, atol=1e-3, rtol=1e-3)
    key = {"batch": 2} if w is None else {"batch": 2, "guidance": w}
    assert Workload(flow, G, 2, w).at == key


def test_a_g_takes_w_where_scales_are_measured():
    cfg = geometry("mnist-mini-smoke")
    preset = find_preset("mnist-mini-smoke")
    assert bench_speed.reverse_for("mnist-mini-smoke", cfg).max_guidance == 0
    limit = bench_speed.reverse_for("mnist-mini-smoke", cfg, (0.0, 1.0)).max_guidance
    assert limit == (preset.reverse.max_guidance or 3.0)
    assert bench_speed.reverse_for("64-tokens", geometry("64-tokens"), (5.0,)).max_guidance == 5.0


def test_guided_measurements_name_their_scale():
    F = random_flow(geometry("mnist-mini-smoke"))
    limits = Limits(2, 300.0, 3000.0)
    scales = (0.0, 1.0)
    found = bench_speed.bench_geometry(
        "mnist-mini-smoke", F, batches=(1,), limits=limits, scales=scales
    )
    lines = [m for m in found if m["row"] != "machine"]
    assert {m["guidance"] for m in lines} == set(scales)
    at = {(m["row"], m["metric"], m["guidance"]): m["value"] for m in lines}
    for w in scales:
        ms = {
            row: v
            for (row, metric, scale), v in at.items()
            if (metric, scale) == ("ms_per_image", w)
        }
        assert {"one-pass", "score-step", "plain", "exact", "packed", "jacobi"} <= set(ms)
        denoised = (ms["exact"] + ms["score-step"]) / ms["one-pass"]
        assert at["one-pass", "speedup_vs_exact+denoise", w] == pytest.approx(denoised)
        assert at["one-pass", "speedup_vs_exact", w] == ms["exact"] / ms["one-pass"]
        ours = min(v for row, v in ms.items() if row.startswith("one-pass"))
        exact = min(v for row, v in ms.items() if not row.startswith(("one-pass", "score-step")))
        assert at["one-pass", "speedup_vs_exact, fastest", w] == pytest.approx(exact / ours)


def test_an_f_without_label_dropout_cannot_be_guided_and_the_file_says_so():
    cfg = geometry("mnist-mini-smoke")
    F = random_flow(bench_speed.replace(cfg, label_dropout=0.0))
    G = build(ReverseModel, bench_speed.reverse_for("mnist-mini-smoke", cfg, (1.0,)), 0).eval()
    work = Workload(F, G, 1, 1.0)
    case = bench_speed.eager_cases(work)["exact"]
    line, *_ = bench_speed.time_case("exact", case, work.at, MACHINE, Limits(), math.inf)
    assert line["metric"] == "left_out" and line["guidance"] == 1.0
    assert "label_dropout" in line["why"]
