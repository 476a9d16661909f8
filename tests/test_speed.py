"""Timing, counted costs, limits, and what is made of a results file."""

import math
import time
from dataclasses import replace

import pytest
import torch

from bitflow_edu import speed
from bitflow_edu.bench import geometry, inverse_ways, is_original, random_flow
from bitflow_edu.budget import inverse_flops, on_meta
from bitflow_edu.config import find_preset
from bitflow_edu.data import BitflowError
from bitflow_edu.evaluation import measurement, timed
from bitflow_edu.pipeline import build, count_flops
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.speed import Cost, Limits, Machine, Way
from bitflow_edu.tarflow import TARFlow

MACHINE = Machine(peak=1e12, bandwidth=1e11)
COSTS = {"flops_per_image", "bytes_per_image", "nfe", "serial_steps"}


class FakeGpu:
    """Takes work at once; its own clock moves by what was ordered. An event notes that clock."""

    def __init__(self):
        self.clock, self.waited = 0.0, []

    def event(self, enable_timing):
        """An event of this device."""

        class Event:
            def record(mark):
                mark.at = self.clock

            def elapsed_time(mark, other):
                assert self.waited, "read before the device was done"
                return other.at - mark.at

        return Event()


def test_on_a_gpu_its_own_clock_is_read_and_waited_for_once(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.waited.append(gpu.clock))
    work = iter([1000.0] * 2 + [3.0, 5.0, 4.0, 6.0, 7.0])

    def call():
        """Orders work that takes no time on this side."""
        gpu.clock += next(work)

    t = timed(call, repeats=5, warmup=2)
    assert t == {"median_ms": 5.0, "low_ms": 3.5, "high_ms": 6.5, "repeats": 5}
    assert gpu.waited == [2025.0]


def test_on_a_processor_the_wall_clock_is_read_without_the_first_calls():
    calls = []

    def call():
        """Slow at first."""
        time.sleep(0.1 if len(calls) < 2 else 0.01)
        calls.append(1)

    t = timed(call, repeats=5, warmup=2)
    assert 10 <= t["median_ms"] < 90 and len(calls) == 7


def test_traffic_of_a_linear_layer_and_of_a_convolution_is_operands_and_results():
    layer, conv = torch.nn.Linear(6, 4), torch.nn.Conv2d(3, 5, 3, padding=1)
    assert speed.bytes_moved(lambda: layer(torch.zeros(7, 6))) == 4 * (6 * 4 + 4 + 7 * 6 + 7 * 4)
    weights, operands = 5 * 3 * 9 + 5, 2 * 3 * 64 + 2 * 5 * 64
    assert speed.bytes_moved(lambda: conv(torch.zeros(2, 3, 8, 8))) == 4 * (weights + operands)
    alone = speed.bytes_moved(lambda: layer(torch.zeros(7, 6)))
    assert speed.bytes_moved(lambda: layer(torch.zeros(7, 6)).exp() + 1) == alone


def test_costs_follow_from_shapes():
    preset = find_preset("imagenet256-b2")
    one, many = (speed.pair_costs(preset.forward, preset.reverse, n) for n in (1, 64))
    half = speed.pair_costs(preset.forward, preset.reverse, 1, torch.bfloat16)
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
    G = build(ReverseModel, speed.reverse_for("mnist-mini-smoke", F.cfg), 0).eval()
    for row in ("jacobi", "gs-jacobi"):
        way = speed.eager_ways(F, G, 2)[row]
        states, how = way.call()
        cost, density = way.after((states, how)), speed.pair_costs(F.cfg, G.cfg, 2)["density"]
        assert cost.serial == sum(sum(h.iterations) for h in how)
        passes = sum(sum(h.iterations) / len(h.iterations) for h in how)
        assert cost.flops == round(density.flops * passes / 2)
        assert cost.moved >= density.moved


def test_slow_broken_and_hopeless_rows_are_named_not_dropped():
    def broken():
        """Fails as a GPU does that is full."""
        raise RuntimeError("out of memory\nand a long story")

    ran = []
    ways = {
        "slow": Way(lambda: time.sleep(0.2), Cost(1, 1, 1, 1)),
        "broken": Way(broken, Cost(1, 1, 1, 1)),
        "hopeless": Way(lambda: ran.append(1), Cost(1, 1, 1, 10**12)),
        "good": Way(lambda: time.sleep(0.01), Cost(1, 2, 10**9, 1000)),
    }
    limits, found = Limits(repeats=4, row_s=0.5), {}
    for row, way in ways.items():
        found[row] = speed.time_way(row, way, 4, MACHINE, limits, math.inf, False)
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


def test_a_run_that_is_over_starts_nothing():
    F = random_flow(geometry("mnist-mini-smoke"))
    found = speed.bench_geometry("mnist-mini-smoke", F, batches=(1,), limits=Limits(2, 1.0, 0.0))
    rows = [m for m in found if m["row"] != "machine"]
    assert {m["row"] for m in rows} >= {"one-pass", "exact", "jacobi"}
    assert "ms_per_image" not in {m["metric"] for m in rows}
    assert all("run were over" in m["why"] for m in rows if m["metric"] == "left_out")


def test_bench_of_a_latent_preset_has_every_row_and_metric():
    pytest.importorskip("diffusers")
    F = random_flow(geometry("imagenet256-b2-smoke"))
    before = {name: p.clone() for name, p in F.named_parameters()}
    limits = Limits(2, 20.0, 60.0)
    found = speed.bench_geometry("imagenet256-b2-smoke", F, "bf16", (2,), limits=limits)
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


def test_the_decoder_has_the_published_size():
    """49M parameters; 308 GFLOP an image of 256², a multiplication and an addition taken as one."""
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        decoder = speed.latent_decoders("meta")["vae-decoder"]
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(49e6, rel=0.03)
    latent = torch.empty(1, 4, 32, 32, device="meta")
    assert count_flops(lambda: decoder.decode(latent)) / 2 == pytest.approx(308e9, rel=0.02)


def test_parts_that_the_plain_version_does_not_know_keep_it_out():
    modern, old = geometry("imagenet256-b2-smoke"), geometry("mnist-mini-smoke")
    assert is_original(old) and not is_original(modern) and not is_original(replace(old, clip=2.0))

    def ways(cfg):
        flow = random_flow(cfg)
        return inverse_ways(flow, *speed.example(flow, 1), 0.0, 1e-4, 2)

    assert next(iter(ways(old))) == "plain" and next(iter(ways(modern))) == "exact"
    results = [call() for call in ways(modern).values()]
    assert all(torch.allclose(results[0], x, atol=1e-3) for x in results)


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(BitflowError, match="fp8.*bf16"):
        speed.find_type("fp8", "cpu")
    assert speed.find_type("auto", "cuda") is torch.bfloat16
    assert speed.find_type("auto", "cpu") is torch.float32
    assert speed.reverse_for("64-tokens", geometry("64-tokens")).num_tokens == 64


@pytest.fixture
def result():
    """A results file with the paper's times: one pass 0.29 ms, decoder 1.3 ms."""
    ms = {"one-pass": 0.5, "one-pass, compiled": 0.29, "exact": 202.0, "graph": 101.0}
    ms |= {"score-step": 3.0, "vae-decoder": 1.3, "tiny-decoder": 0.1}
    found = [
        measurement("machine", "measured_peak_tflops", 100.0),
        measurement("machine", "measured_bandwidth_gbs", 1000.0),
    ]
    for row, value in ms.items():
        found += [
            measurement(row, "ms_per_image", value, "ms", batch=8),
            measurement(row, "flops_per_image", 1e9, batch=8),
            measurement(row, "bytes_per_image", 1e7, batch=8),
        ]
    return {"name": "x", "measurements": found + [speed.left_out("exact", 256, "too slow")]}


def test_the_table_gives_the_papers_ratios(result):
    table = speed.with_decoders(result, 8)
    ours, exact = table["one pass"], table["exact, by default"]
    small, large = "+ small decoder", "+ VAE decoder"
    assert ours == {"alone": 0.29, small: pytest.approx(0.39), large: pytest.approx(1.59)}
    assert exact["alone"] / 0.29 == pytest.approx(697, abs=1)
    assert exact[large] / ours[large] == pytest.approx(128, abs=1)
    assert table["exact, fastest + score step"]["alone"] == 104.0
    text = speed.speed_table(result)
    assert "696.55 ×" in text and "left out: exact at batch 256: too slow" in text


def test_pictures_come_from_a_results_file_alone(result):
    intensity, reached, batch = speed.roofline_points(result)["one-pass"][0]
    assert (intensity, batch) == (100, 8) and reached == pytest.approx(2.0)  # 10⁹ in 0.5 ms
    ax = speed.plot_roofline(result)
    x, y = ax.lines[0].get_data()
    assert max(y) == pytest.approx(100.0)
    assert y[0] == pytest.approx(x[0])  # 1000 GB/s: 1 operation a byte is 1 TFLOP/s
    fig = speed.plot_speed(result)
    texts = [t.get_text() for t in fig.axes[0].texts]
    assert "697×" in texts and "128×" in texts
    with pytest.raises(BitflowError, match="x holds no time"):
        speed.plot_speed(result | {"measurements": [speed.left_out("one-pass", 8, "too slow")]})
