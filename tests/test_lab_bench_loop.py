"""What a training waits for: both forms are measured, and ours waits less."""

import math

import pytest
import same_bits
import torch
from commands import measurements, refused

from bitflow_edu.cli.main import main
from bitflow_edu.io.results import load_result
from bitflow_edu.lab import bench_loop


def test_every_wait_is_measured_in_both_forms(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_loop, "GPU_S", 0.001)
    quick = bench_loop.bench_loop(quick=True)
    stored = load_result("bench-loop")["measurements"]
    of_one_process = [m for m in stored if m["metric"] != "touched_mb"]
    names = [[(m["row"], m["metric"]) for m in found] for found in (quick, of_one_process)]
    assert names[0] == names[1] and len(stored) == 10
    plain, ours = stored[::2], stored[1::2]
    assert all(b["value"] < a["value"] for a, b in zip(plain, ours, strict=True)), stored
    monkeypatch.setattr("bitflow_edu.cli.lab.bench_loop", lambda: quick)
    assert main(f"bench --what loop --out {tmp_path}/x.json".split()) in (0, None)
    for again, line in zip(measurements(tmp_path / "x.json"), quick, strict=True):
        assert again == pytest.approx(line)
    refused(f"bench --what loop --compiled --out {tmp_path}/y.json", capsys, "--compiled")


def test_logging_costs_operations():
    found = bench_loop.logged_and_not()
    assert 0 < found["step, not logged"] < found["step, logged"]


def test_trainings_kept_their_bits():
    """The stored comparison of the code before and after, and what it counts."""
    found = load_result("same-bits-mnist-mini")["measurements"]
    counts = {(m["row"], m["metric"]): m["value"] for m in found}
    for part in ("F", "G"):
        assert counts[part, "values"] > 1e6 and counts[part, "differing_values"] == 0
    a, nan = torch.tensor([0.0, 1.0, math.nan]), torch.tensor([math.nan])
    assert same_bits.differing(a, torch.tensor([-0.0, 1.0, math.nan])) == 1
    half = a[:2].bfloat16()
    assert same_bits.differing(half, half * 2) == 1
    assert same_bits.differing(nan, nan.clone()) == 0
    lines = same_bits.compared("F", {"w": a}, {"w": a + 1})
    assert [m["value"] for m in lines] == [3, 2]
    with pytest.raises(SystemExit, match="only one of both has"):
        same_bits.compared("F", {"w": a}, {"v": a})
