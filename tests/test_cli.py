"""Every command as a user would call it, and every mistake that a user would make."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bitflow_edu import bench, pipeline
from bitflow_edu.cli import main
from bitflow_edu.config import PRESETS, find_preset
from bitflow_edu.data import BitflowError, asset
from bitflow_edu.inverse_strategies import check_pair
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.tarflow import TARFlow
from bitflow_edu.transformer import TransformerConfig

SMOKE, GLOW = "--preset mnist-mini-smoke", "--preset mnist-glow-smoke"


def run(line):
    """A command that must succeed."""
    assert main(shlex.split(line)) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """F and G of the smoke preset, trained by the commands."""
    folder = tmp_path_factory.mktemp("runs")
    run(f"train forward {SMOKE} --steps 10 --out {folder}/f")
    run(f"train reverse {SMOKE} --steps 10 --forward {folder}/f --out {folder}/g")
    return folder


def refused(line, capsys, *words):
    """The command fails as a mistake should.

    Code 2, and one or two lines on stderr that hold all the words."""
    before = capsys.readouterr()
    assert main(shlex.split(line)) == 2, before
    said = capsys.readouterr().err.strip()
    assert said.startswith("bitflow: "), said
    assert len(said.splitlines()) <= 2 and len(said) < 700, said
    for word in words:
        assert str(word) in said, f"{word!r} is not in: {said}"


def measurements(path):
    """The lines of a results file."""
    return json.loads(path.read_text())["measurements"]


def test_the_demo_from_end_to_end(tmp_path):
    command = [Path(sys.executable).with_name("bitflow"), "demo", *SMOKE.split()]
    command += ["--out", "runs/demo"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith("report: runs/demo/report.html")
    report = (tmp_path / "runs/demo/report.html").read_text()
    assert len(report) < 3_000_000 and report.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', report)
    result = json.loads((tmp_path / "results/demo-mnist-mini-smoke.json").read_text())
    assert (tmp_path / "results/demo-mnist-mini-smoke.png").exists()
    assert result["command"].startswith("bitflow demo --preset mnist-mini-smoke")
    assert str(tmp_path) not in json.dumps(result)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "--resume" in again.stderr
    resumed = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0 and "report.html" in resumed.stdout
    assert (tmp_path / "runs/demo/report.html").read_text() == report, "nothing is overwritten"
    rows = {(m["row"], m["metric"], m["batch"]) for m in result["measurements"]}
    metrics = ("fd[mnist-cnn]", "label_accuracy", "params", "serial_steps", "flops_per_image")
    for row in ("exact", "exact+denoise", "one-pass"):
        assert {(row, metric, None) for metric in metrics} <= rows
        assert {(row, "ms_per_image", 1), (row, "ms_per_image", 64)} <= rows
    assert ("real", "fd[mnist-cnn]", None) in rows
    assert {("exact", "bits_per_dim", None), ("exact", "round_trip_max_error", None)} <= rows


@pytest.mark.parametrize(
    "folder, more", [("f", ""), ("f", "--denoise --w 0.5"), ("g", "--labels 3,-1"), ("g", "--w 1")]
)
def test_sample(runs, tmp_path, folder, more):
    run(f"sample --checkpoint {runs}/{folder} --n 20 --out {tmp_path}/s.png {more}")
    assert Image.open(tmp_path / "s.png").size == (169, 33)


def test_sample_makes_its_folder(tmp_path):
    checkpoint = asset("mnist-mini/reverse")
    run(f"sample --checkpoint {checkpoint} --n 3 --columns 3 --out {tmp_path}/new/s.png")
    assert (tmp_path / "new" / "s.png").exists()


def test_a_streamed_evaluation_has_a_floor_and_says_how_models_were_trained(
    runs, tmp_path, monkeypatch
):
    """Real images beside the methods, what F knows of test images, both trainings' settings."""
    monkeypatch.chdir(tmp_path)
    words = f"evaluate {SMOKE} --forward {runs}/f --reverse {runs}/g --features mnist-cnn"
    words += " --no-timing --w 0.5 --n 60"
    run(f"{words} --out results/e.json")
    result = json.loads((tmp_path / "results/e.json").read_text())
    found = {(m["row"], m["metric"]): m["value"] for m in result["measurements"]}
    rows = {"exact", "exact+denoise", "one-pass", "guided, w = 0.5", "real"}
    assert {row for row, _ in found} == rows
    assert 0 < found["real", "fd[mnist-cnn]"] < found["one-pass", "fd[mnist-cnn]"]
    assert found["exact", "bits_per_dim"] > 0 and found["one-pass", "reconstruction_mse"] > 0
    config = result["config"]
    assert config["images"] == config["data"]["name"] and config["objective"]["strategy"]
    assert config["train_reverse"]["steps"] == found["one-pass", "train_steps"]
    (tmp_path / "again").mkdir()
    run(f"{words} --rows one-pass --work again --out results/one.json")
    again = {m["row"] for m in measurements(tmp_path / "results/one.json")}
    assert again == {"one-pass", "guided, w = 0.5", "exact"}  # exact: F's training


def test_the_same_seed_draws_the_same(runs, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(f"sample --checkpoint {runs}/g --n 8 --seed {seed} --out {tmp_path}/{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_evaluate(runs, tmp_path, capsys):
    words, out = f"evaluate {SMOKE} --forward {runs}/f --n 50", tmp_path / "e.json"
    run(f"{words} --reverse {runs}/g --out {out}")
    rows = {m["row"] for m in measurements(out)}
    assert rows == {"exact", "exact+denoise", "one-pass", "real"}
    refused(f"{words} --out {out}", capsys, "exists already")
    run(f"{words} --out {tmp_path}/f.json")
    assert "one-pass" not in {m["row"] for m in measurements(tmp_path / "f.json")}


@pytest.fixture(scope="module")
def glow(tmp_path_factory):
    """A coupling flow, trained for its likelihood and gone on with."""
    folder = tmp_path_factory.mktemp("glow") / "glow"
    run(f"train forward {GLOW} --steps 4 --out {folder}")
    run(f"train forward {GLOW} --steps 4 --out {folder} --resume")
    return folder


def test_a_flow_alone(glow, tmp_path):
    """Measured under one protocol, and drawn from; no labels."""
    run(f"evaluate {GLOW} --forward {glow} --n 20 --out {tmp_path}/e.json")
    lines = [m for m in measurements(tmp_path / "e.json") if m["row"] == "exact"]
    found = {m["metric"]: m for m in lines if m["batch"] is None}
    assert {"bits_per_dim", "bits_per_dim[8 draws]", "round_trip_max_error"} <= set(found)
    assert {"fd[mnist-cnn]", "params", "flops_per_density", "train_steps", "train_s"} <= set(found)
    assert "label_accuracy" not in found, "no label was asked for"
    one, eight = found["bits_per_dim"], found["bits_per_dim[8 draws]"]
    assert eight["value"] < one["value"] < 9 and one["n"] == 2000
    assert "not given" in one["protocol"] and found["train_steps"]["value"] == 4
    run(f"sample --checkpoint {glow} --n 4 --temperature 0.5 --out {tmp_path}/s.png")


def test_mistakes_with_a_flow_alone(glow, tmp_path, capsys):
    """It has no labels, no noise to remove, no tokens and no G."""
    draw = f"sample --checkpoint {glow} --out {tmp_path}/l.png"
    refused(f"{draw} --labels 3", capsys, "reads no labels")
    refused(f"{draw} --denoise", capsys, "--denoise")
    refused(f"{draw} --w 1", capsys, "--w 1")
    refused(f"{draw} --temperature -1", capsys, "-1")
    train = f"train forward {GLOW} --patch-size 2 --out {tmp_path}/p"
    refused(train, capsys, "--patch-size 2")
    refused(f"train reverse {GLOW} --out {tmp_path}/g", capsys, "flow alone", "mnist-mini")
    refused(f"demo {GLOW} --out {tmp_path}/d", capsys, "flow alone")
    evaluate = f"--forward {glow} --out {tmp_path}/x.json"
    refused(f"evaluate {SMOKE} {evaluate}", capsys, "CouplingFlow", "TARFlow")
    refused(f"evaluate {GLOW} --reverse {glow} {evaluate}", capsys, "flow alone")
    assert not list(tmp_path.iterdir()), "nothing was written"


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
    lines = [m for m in lines if m["guidance"] == 1.0]
    ms = {m["row"]: m["value"] for m in lines if m["metric"] == "ms_per_image"}
    gain = {m["metric"]: m["value"] for m in lines if m["row"] == "one pass"}
    denoised = (ms["exact"] + ms["score step"]) / ms["one pass"]
    assert gain["speedup_vs_exact+denoise"] == pytest.approx(denoised)
    ours = min(v for row, v in ms.items() if row.startswith("one pass"))
    exact = min(v for row, v in ms.items() if not row.startswith(("one pass", "score step")))
    assert gain["speedup_vs_exact, fastest"] == pytest.approx(exact / ours)
    assert "one pass, packed" in ms


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


def test_a_tarflow_alone_goes_through_the_same_steps(digits):
    """On logits, without labels: the preset of chapter 07's table, at the digits' size."""
    transformer = TransformerConfig(width=16, head_dim=8, num_layers=1)
    cfg = find_preset("mnist-tarflow").forward
    small = replace(cfg, image_size=16, transformer=transformer)
    flow = pipeline.build(TARFlow, small, 0).train()
    x, c, generator = digits.x[:8], torch.full((8,), -1), torch.Generator().manual_seed(0)
    loss, _ = pipeline.stage_one_loss(small)(flow, x, c, generator)
    done = pipeline.evaluate_flow(flow.eval(), digits, digits[:50], n=10, timing=False)
    found = {m["metric"]: m["value"] for m in done.measurements if m["row"] == "exact"}
    assert torch.isfinite(loss) and found["bits_per_dim[8 draws]"] < found["bits_per_dim"]
    assert found["round_trip_max_error"] < 1e-3
    assert found["serial_steps"] == 4 * 15 and found["broken_samples"] == 0
    reverse = find_preset("mnist-mini").reverse
    with pytest.raises(BitflowError, match="logit"):
        check_pair(flow, pipeline.build(ReverseModel, reverse, 0))


def test_samples_that_overflow_are_counted(digits, monkeypatch):
    """Without clipping an inverse can overflow.

    The likelihood is measured all the same, and the share of such samples stands beside it."""
    cfg = replace(find_preset("mnist-mini-smoke").forward, noise_std=0.0)
    flow, whole = pipeline.build(TARFlow, cfg, 0).eval(), pipeline.undo

    def every_fifth(model, z, c, guidance=None):
        broken = torch.arange(len(z))[:, None, None, None] % 5 == 0
        return torch.where(broken, torch.nan, whole(model, z, c))

    def all_of_them(model, z, c, guidance=None):
        return torch.full((len(z), 1, 16, 16), torch.nan)

    monkeypatch.setattr(pipeline, "undo", every_fifth)
    done = pipeline.evaluate_flow(flow, digits, digits[:50], n=20, timing=False)
    found = {m["metric"]: m for m in done.measurements if m["row"] == "exact"}
    assert abs(found["broken_samples"]["value"] - 0.2) < 1e-6
    assert found["fd[mnist-cnn]"]["n"] == 16 and found["bits_per_dim"]["value"] > 0
    monkeypatch.setattr(pipeline, "undo", all_of_them)
    with pytest.raises(BitflowError, match="0 finite samples"):
        pipeline.evaluate_flow(flow, digits, digits[:50], n=20, timing=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_info(preset, capsys):
    run(f"info --preset {preset}")
    said = capsys.readouterr().out
    assert "parameters" in said and "FLOP" in said


def test_info_of_a_checkpoint(runs, capsys):
    run(f"info --checkpoint {runs}/g")
    assert "ReverseModel" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["naive", "hidden-distillation"])
def test_other_strategies_train(runs, tmp_path, strategy):
    more = f"--steps 2 --strategy {strategy} --out {tmp_path}/g"
    run(f"train reverse {SMOKE} --forward {runs}/f {more}")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert e.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("demo", "train", "sample", "evaluate", "info"))


def test_mistakes_in_words(capsys, tmp_path):
    refused("", capsys, "--help")
    refused("dmeo", capsys, "dmeo")
    refused("train", capsys, "forward", "reverse")
    refused("demo --stepz 3", capsys, "--stepz")
    refused("demo --steps many", capsys, "--steps", "many")
    refused(f"demo --preset mnist-mimi --out {tmp_path}/d", capsys, "mnist-mimi", "mnist-mini")
    refused("info --preset imagenet", capsys, "imagenet")
    refused("sample", capsys, "--checkpoint")
    assert not (tmp_path / "d").exists()


OUT_OF_RANGE = """--steps 0, --steps -3, --minutes 0, --minutes -1.5, --batch-size 0, --lr -0.1,
--patch-size 5, --patch-size 0, --device tpu, --data-root nowhere"""


@pytest.mark.parametrize("option", [option.strip() for option in OUT_OF_RANGE.split(",")])
def test_options_out_of_range(capsys, tmp_path, option):
    refused(f"train forward {SMOKE} --out {tmp_path}/f {option}", capsys, option.split()[1])
    assert not (tmp_path / "f").exists(), "nothing was written"


def test_mistakes_with_trainings_of_g(capsys, tmp_path, runs):
    train = f"train reverse --out {tmp_path}/g --forward"
    refused(f"{train} {tmp_path}/none {SMOKE}", capsys, "none", "does not exist")
    refused(f"{train} {runs}/g {SMOKE}", capsys, "ReverseModel", "TARFlow")
    osmosis = f"{train} {runs}/f {SMOKE} --strategy osmosis"
    refused(osmosis, capsys, "osmosis", "hidden-alignment")
    refused(f"{train} {runs}/f", capsys, "num_blocks")
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_mistakes_with_checkpoints(capsys, tmp_path, runs):
    evaluate = f"evaluate --out {tmp_path}/e.json --forward"
    refused(f"{evaluate} {runs}/g {SMOKE}", capsys, "ReverseModel")
    refused(f"{evaluate} {runs}/f --reverse {runs}/f {SMOKE}", capsys, "TARFlow")
    refused(f"{evaluate} {runs}/f --n 0 {SMOKE}", capsys, "0")
    refused(f"{evaluate} {runs}/f --preset mnist", capsys, "16", "28")
    draw = f"sample --checkpoint {runs}/g --out {tmp_path}/s.png"
    refused(f"{draw} --labels 12", capsys, "12")
    refused(f"{draw} --labels x", capsys, "x")
    refused(f"{draw} --n 0", capsys, "0")
    refused(f"{draw} --w -1", capsys, "--w -1")
    refused(f"{draw} --denoise", capsys, "--denoise")
    refused(f"info --checkpoint {tmp_path}/none", capsys, "none")
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_mistakes_with_folders(capsys, tmp_path, runs):
    train = f"train forward {SMOKE} --out {runs}/f"
    refused(train, capsys, "exists already", "--resume")
    refused(f"{train} --steps 11 --resume", capsys, "was made with")
    file = tmp_path / "file"
    file.write_text("kept")
    for command in ("demo", "train forward"):
        refused(f"{command} {SMOKE} --out {file}", capsys, file)
        refused(f"{command} {SMOKE} --out {file}/run", capsys, file)
    refused(f"demo {SMOKE} --out {tmp_path}/d --results {file}", capsys, file)
    refused(f"sample --checkpoint {runs}/g --out {file}", capsys, "exists already")
    (tmp_path / "mnist-mini.npz").write_bytes(b"no archive")
    demo = f"demo {SMOKE} --out {tmp_path}/d --results {tmp_path}/r"
    refused(f"{demo} --data-root {tmp_path}", capsys, "mnist-mini.npz")
    assert file.read_text() == "kept"
    assert not (tmp_path / "d").exists() and not (tmp_path / "r").exists()
