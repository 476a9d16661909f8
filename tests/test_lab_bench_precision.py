"""Weights in bfloat16: what stays float32, and what the rounding costs."""

from statistics import mean, stdev

import pytest
import torch
from commands import refused

from bitflow_edu.exact_inverse import exact_trajectory, score_denoise
from bitflow_edu.io.results import load_result
from bitflow_edu.lab.bench_precision import bench_precision, round_trips, rounded
from bitflow_edu.lab.hub import load_pretrained
from bitflow_edu.lab.presets import find_preset
from conftest import small_flow


def test_states_stay_float32_beside_weights_in_bfloat16():
    flow, x, c = rounded(small_flow()), torch.rand(2, 1, 6, 6), torch.tensor([1, -1])
    trajectory = flow(x, c)
    assert {s.dtype for s in (*trajectory.states, trajectory.logdet)} == {torch.float32}
    assert {s.dtype for s in exact_trajectory(flow, trajectory.z, c)} == {torch.float32}
    assert score_denoise(flow, x, c).dtype == torch.float32


def test_states_in_float32_come_back_nearer():
    flow, x = small_flow(), torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    found = round_trips(flow, x, torch.arange(20) % 3)
    exact, short, all_short = (e.square().mean().sqrt().item() for e in found.values())
    assert exact < 1e-5 < short < all_short
    assert next(flow.parameters()).dtype == torch.float32  # the copies were rounded


def test_both_forms_are_measured_from_the_same_noise(capsys, tmp_path):
    found = bench_precision(*load_pretrained("mnist-mini"), find_preset("mnist-mini"), range(2), 40)
    value = {(m["row"], m["metric"], m["seed"]): m["value"] for m in found}
    for row in ("exact", "exact+denoise", "one-pass"):
        of_row = [[value[r, "fd[mnist-cnn]", s] for s in (0, 1)] for r in (row, f"{row}, bf16")]
        assert of_row[0] != of_row[1] == pytest.approx(of_row[0], rel=0.02)
        difference = value[f"{row}, bf16", "difference fd[mnist-cnn]", None]
        assert difference == pytest.approx(mean(of_row[1]) - mean(of_row[0]))
    words = f"bench --what precision --geometry cifar10 --out {tmp_path}/x.json"
    refused(words, capsys, "'cifar10'", "choose cifar10-mini, mnist, mnist-mini")


@pytest.mark.parametrize("pair, part", [("mnist-mini", 10), ("mnist", 4)])
def test_no_stored_figure_moves_as_much_as_another_seed_moves_it(pair, part):
    stored, compared = load_result(f"bench-precision-{pair}")["measurements"], 0
    for m in stored:
        if m["metric"].startswith("difference "):
            own = m["versus"], m["metric"].removeprefix("difference ")
            seeds = [o["value"] for o in stored if (o["row"], o["metric"]) == own]
            assert abs(m["value"]) < stdev(seeds), m
            if own[1].startswith("fd"):  # the whole interval, and by far
                assert max(abs(m["low"]), abs(m["high"])) < stdev(seeds) / part, m
            compared += 1
    assert compared == 15
