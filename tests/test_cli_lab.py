"""`bitflow demo` and `bitflow bench`: what they measure and write, and what they refuse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import SMOKE, measurements, refused, run

from bitflow_edu.lab import bench
from bitflow_edu.lab.preset_fields import write_preset
from bitflow_edu.lab.presets import find_preset


def test_the_demo_from_end_to_end(tmp_path):
    command = [Path(sys.executable).with_name("bitflow"), "demo", *SMOKE.split()]
    command += ["--out", "runs/demo"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # prints ASCII alone
    plain = os.environ | plain | {"PYTHONIOENCODING": "ascii"}
    more = {"cwd": tmp_path, "check": True, "env": plain}
    done = subprocess.run(command, **more, capture_output=True, text=True)
    assert done.stdout.strip().endswith("report: runs/demo/report.html")
    report = (tmp_path / "runs/demo/report.html").read_text(encoding="utf-8")
    assert len(report) < 3_000_000 and report.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', report)
    result = json.loads((tmp_path / "runs/demo/demo-mnist-mini-smoke.json").read_text())
    assert (tmp_path / "runs/demo/demo-mnist-mini-smoke.png").exists()
    assert result["command"].startswith("bitflow demo --preset mnist-mini-smoke")
    assert str(tmp_path) not in json.dumps(result)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "--resume" in again.stderr
    resumed = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0 and "report.html" in resumed.stdout
    same = (tmp_path / "runs/demo/report.html").read_text(encoding="utf-8") == report
    assert same, "nothing is overwritten"
    rows = {(m["row"], m["metric"], m.get("batch")) for m in result["measurements"]}
    metrics = ("fd[mnist-cnn]", "label_accuracy", "params", "serial_steps", "flops_per_image")
    for row in ("exact", "exact+denoise", "one-pass"):
        assert {(row, metric, None) for metric in metrics} <= rows
        assert {(row, "ms_per_image", 1), (row, "ms_per_image", 64)} <= rows
    assert ("real", "fd[mnist-cnn]", None) in rows
    assert {("exact", "bits_per_dim", None), ("exact", "round_trip_max_error", None)} <= rows


def test_bench(tmp_path, runs, monkeypatch):
    monkeypatch.setitem(bench.GEOMETRIES, "mnist", (8, 4))
    metrics = {"inverse": "speedup_vs_plain", "training": "training_speedup_vs_plain"}
    for what, metric in metrics.items():
        run(f"bench --what {what} --out {tmp_path}/{what}.json")
        lines = measurements(tmp_path / f"{what}.json")
        found = {m["row"]: m["value"] for m in lines if m["metric"] == metric}
        assert set(found) >= {"plain", "exact"}
        assert all(m["value"] == 1 for m in lines if (m["metric"], m["row"]) == (metric, "plain"))
    lines = measurements(tmp_path / "inverse.json")
    differences = [m["value"] for m in lines if m["metric"] == "max_difference_from_plain"]
    assert len(differences) == 20 and max(differences) < 1e-3
    run(f"bench --checkpoint {runs}/f --out {tmp_path}/c.json")


def test_bench_of_a_pair(tmp_path):
    """What G gains, counted from the milliseconds that stand in the same file."""
    run(f"bench --what pair --geometry mnist-mini-smoke --out {tmp_path}/p.json")
    lines = [m for m in measurements(tmp_path / "p.json") if m["batch"] == 64]
    lines = [m for m in lines if m.get("guidance") == 1.0]
    ms = {m["row"]: m["value"] for m in lines if m["metric"] == "ms_per_image"}
    gain = {m["metric"]: m["value"] for m in lines if m["row"] == "one-pass"}
    denoised = (ms["exact"] + ms["score-step"]) / ms["one-pass"]
    assert gain["speedup_vs_exact+denoise"] == pytest.approx(denoised)
    ours = min(v for row, v in ms.items() if row.startswith("one-pass"))
    exact = min(v for row, v in ms.items() if not row.startswith(("one-pass", "score-step")))
    assert gain["speedup_vs_exact, fastest"] == pytest.approx(exact / ours)
    assert "one-pass, packed" in ms


def test_mistakes_with_bench(tmp_path, capsys):
    bench_to = f"bench --out {tmp_path}/x.json"
    pair = f"{bench_to} --what pair --geometry"
    refused(f"{pair} 64-tokens", capsys, "64-tokens", "mnist-mini")
    refused(f"{pair} mnist-glow", capsys, "mnist-glow")
    refused(f"{bench_to} --what coffee", capsys, "coffee", "tokens")
    refused(f"{bench_to} --segments 1,two", capsys, "1,two")
    refused(f"{bench_to} --geometry mnits", capsys, "mnits", "256-tokens")
    (tmp_path / "x.json").touch()
    refused(bench_to, capsys, "exists already")
    refused(f"bench --out {tmp_path}/x", capsys, "x.json exists already")


UNREAD = {
    "tokens": "--segments 3, --compiled, --geometry 64-tokens, --w 1, --device cuda",
    "operations": "--segments 3, --device cpu, --checkpoint x",
    "inverse": "--batches 4, --precision bf16, --w 1, --checkpoint x --geometry 64-tokens",
    "training": "--segments 3, --batches 4, --checkpoint x --geometry 64-tokens",
    "pair": "--batches 4, --precision bf16, --w 1",
}
UNREAD = [(what, more) for what, options in UNREAD.items() for more in options.split(", ")]


@pytest.mark.parametrize("what, more", UNREAD)
def test_bench_refuses_options_that_it_would_not_read(capsys, tmp_path, what, more):
    refused(f"bench --what {what} --out {tmp_path}/x.json {more}", capsys, *more.split()[-2:])
    assert not list(tmp_path.iterdir())


def test_a_geometry_is_a_name_and_no_path(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("bench --geometry ../../x", capsys, "../../x")
    refused("bench --what speed --checkpoint y --geometry ../../x", capsys, "../../x")
    assert not list(tmp_path.iterdir())


def test_a_demo_keeps_the_results_of_another(capsys, tmp_path):
    demo = f"demo {SMOKE} --out {tmp_path}/d --results {tmp_path}"
    for suffix in ("json", "png"):
        path = tmp_path / f"demo-mnist-mini-smoke.{suffix}"
        path.write_text("kept")
        refused(demo, capsys, path.name, "--results")
        path.unlink()
    assert not list(tmp_path.iterdir())


def test_a_finished_demo_is_not_taken_for_another(capsys, tmp_path):
    write_preset(find_preset("mnist-mini-smoke"), tmp_path / "forward" / "preset.yaml")
    (tmp_path / "report.html").touch()
    for more in ("", "--train-forward.checkpoint-every 3"):  # no weight depends on this one
        run(f"demo {SMOKE} --resume {more} --out {tmp_path}")
    refused(f"demo {SMOKE} --resume --seed 3 --out {tmp_path}", capsys, "seed", "3")
    refused(f"demo --resume --out {tmp_path}", capsys, "num_blocks = 2, not 4")


def test_bench_counts_tokens_and_memory():
    found = bench.bench_tokens(sides=(2, 4), repeats=2)
    assert {m["row"] for m in found} == {"training", "exact", "jacobi", "dense"}
    assert all(m["value"] > 0 for m in found)
    memory = [m for m in found if m["metric"] == "peak_mb"]
    peak = {(m["row"], m["tokens"]): m["value"] * 2**20 for m in memory}
    for side in (2, 4):
        cache = 2 * 2 * side**2 * 128 * 4  # k and v of 2 layers, one block at a time
        assert cache < peak["exact", side**2] < cache + 200_000
    assert peak["training", 4] > peak["dense", 4] > 0

    def call():
        # two tensors alive at most; the third takes the first one's place
        a, b = torch.zeros(1000), torch.zeros(1000)
        del a
        torch.zeros(500), b.view(10, 100)

    assert bench.peak_bytes(call) == 8000


def test_a_table_of_neighbours_grows_seed_by_seed(tmp_path, capsys):
    """What the results file holds is not trained again, in whatever folder."""
    few = "--train-forward.steps 2 --train-reverse.steps 2 --num-samples 20"
    words = f"neighbours --preset mnist-mini-smoke {few} --methods flow-matching"
    out = tmp_path / "n.json"
    run(f"{words} --seeds 1 --work {tmp_path}/first --out {out}")
    before = {(m["row"], m["metric"]): m["value"] for m in measurements(out) if m["seed"] == 0}
    text = out.read_text()
    asked = find_preset("mnist-mini-smoke").objective.decoded_images
    assert f'"decoded_images": {asked}' in text, "without a decoder this field has no effect"
    out.write_text(text.replace(f'"decoded_images": {asked}', '"decoded_images": 4'))
    other = words.replace("flow-matching", "quarter-naive")
    run(f"{other} --seeds 1 --seed 1 --work {tmp_path}/second --out {out} --resume")
    after = {(m["row"], m["metric"]): m["value"] for m in measurements(out) if m["seed"] == 0}
    assert before == after and {m["seed"] for m in measurements(out)} == {None, 0, 1}
    of_seed = [{m["row"] for m in measurements(out) if m["seed"] == seed} for seed in (0, 1)]
    assert "flow-matching-8" in of_seed[0] - of_seed[1] and "quarter-naive" in of_seed[1]
    assert not list((tmp_path / "second").glob("forward-0-*"))
    assert list((tmp_path / "second").glob("forward-1-*"))
    refused(f"{words} --out {out} --resume --num-samples 21", capsys, "num_samples = 20", "--out")
