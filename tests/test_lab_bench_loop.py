"""What a training waits for: both forms are measured, and ours waits less."""

import math
import re

import pytest
import same_bits
import torch
from commands import measurements, refused

from bitflow_edu.cli.main import main
from bitflow_edu.io.results import load_result
from bitflow_edu.lab import bench_loop, bench_processes

SEVERAL = re.compile("of two|processes|checkpoint,.* read")


def test_every_wait_is_measured_in_both_forms(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_loop, "GPU_S", 0.001)
    quick = bench_loop.bench_loop(quick=True)
    stored = load_result("bench-loop")["measurements"]
    of_several = [m for m in stored if SEVERAL.search(m["row"])]
    of_one = [m for m in stored if m not in of_several]
    names = [[(m["row"], m["metric"]) for m in found] for found in (quick, of_one)]
    assert names[0] == names[1] and (len(of_one), len(of_several)) == (14, 6)
    deviations = [m["value"] for m in stored if m["metric"] == "loss_deviation"]
    assert len(deviations) == 2 and max(deviations) < 1e-7
    pairs = [m for m in stored if m["metric"] != "loss_deviation"]
    plain, ours = pairs[::2], pairs[1::2]
    assert all(b["value"] < a["value"] for a, b in zip(plain, ours, strict=True)), stored
    monkeypatch.setattr("bitflow_edu.cli.lab.bench_loop", lambda: quick)
    assert main(f"bench --what loop --out {tmp_path}/x.json".split()) in (0, None)
    for again, line in zip(measurements(tmp_path / "x.json"), quick, strict=True):
        assert again == pytest.approx(line)
    refused(f"bench --what loop --compiled --out {tmp_path}/y.json", capsys, "--compiled")


def test_logging_costs_operations():
    found = bench_loop.logged_and_not()
    assert 0 < found["step, not logged"] < found["step, logged"]


def test_several_processes_are_measured(tmp_path, capfd):
    """Spawned as the bench does it, in small: what is written, and what the numbers may be."""
    times = bench_processes.wrapper_times(tmp_path, "mnist-mini-smoke", steps=3)
    assert list(times) == list(bench_processes.WRAPPED)
    assert all(len(ms) == 3 and min(ms) > 0 for ms in times.values())
    found = bench_processes.loss_deviations(tmp_path, "mnist-mini-smoke", steps=2)
    assert len(found) == 2 and max(found.values()) < 1e-7
    assert "deprecated" not in capfd.readouterr().err, "an option that goes out of use"


def test_trainings_kept_their_bits():
    """The stored comparison of the code before and after, and what it counts."""
    found = load_result("same-bits-mnist-mini")["measurements"]
    counts = {(m["row"], m["metric"]): m["value"] for m in found}
    for part in ("F", "G"):
        assert counts[part, "values"] > 1e6 and counts[part, "differing_values"] == 0
        assert counts[f"{part}, before", "reads"] > 1 and counts[f"{part}, after", "reads"] == 0
        assert 0.5 < counts[f"{part}, after / before", "step_ms"] < 1.5
    a, nan = torch.tensor([0.0, 1.0, math.nan]), torch.tensor([math.nan])
    assert same_bits.differing(a, torch.tensor([-0.0, 1.0, math.nan])) == 1
    half = a[:2].bfloat16()
    assert same_bits.differing(half, half * 2) == 1
    assert same_bits.differing(nan, nan.clone()) == 0
    lines = same_bits.compared("F", {"w": a}, {"w": a + 1})
    assert [m["value"] for m in lines] == [3, 2]
    with pytest.raises(SystemExit, match="only one of both has"):
        same_bits.compared("F", {"w": a}, {"v": a})
