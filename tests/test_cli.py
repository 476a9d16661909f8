"""Every command as a user would call it, and every mistake that a user would make."""

import json
import re
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

SMOKE = ["--preset", "mnist-mini-smoke"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """F and G of the smoke preset, trained by the commands."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "forward", *SMOKE, "--steps", "10", "--out", str(folder / "f")]) == 0
    assert (
        main(
            [
                "train",
                "reverse",
                *SMOKE,
                "--steps",
                "10",
                "--forward",
                str(folder / "f"),
                "--out",
                str(folder / "g"),
            ]
        )
        == 0
    )
    return folder


def refused(argv, capsys, *words):
    """The command fails as a mistake should: code 2, one or two lines on stderr that hold all the words."""
    before = capsys.readouterr()
    assert main([str(a) for a in argv]) == 2, before
    said = capsys.readouterr().err.strip()
    assert said.startswith("bitflow: ") and len(said.splitlines()) <= 2 and len(said) < 700, said
    for word in words:
        assert str(word) in said, f"{word!r} is not in: {said}"


def test_the_demo_from_end_to_end(tmp_path):
    bitflow = Path(sys.executable).with_name("bitflow")
    command = [bitflow, "demo", *SMOKE, "--out", "runs/demo"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith("report: runs/demo/report.html")
    report = (tmp_path / "runs/demo/report.html").read_text()
    assert (
        len(report) < 3_000_000
        and report.count("data:image/png;base64,") == 4
        and not re.search(r'(src|href)="(?!data:)', report)
    )
    result = json.loads((tmp_path / "results/demo-mnist-mini-smoke.json").read_text())
    assert (tmp_path / "results/demo-mnist-mini-smoke.png").exists()
    rows = {(m["row"], m["metric"], m["batch"]) for m in result["measurements"]}
    for row in ("exact", "exact+denoise", "one-pass"):
        for metric in (
            "fd[mnist-cnn]",
            "label_accuracy",
            "params",
            "serial_steps",
            "flops_per_image",
        ):
            assert (row, metric, None) in rows
        assert {(row, "ms_per_image", 1), (row, "ms_per_image", 64)} <= rows
    assert {
        ("real", "fd[mnist-cnn]", None),
        ("exact", "bits_per_dim", None),
        ("exact", "round_trip_max_error", None),
    } <= rows
    assert result["command"].startswith("bitflow demo --preset mnist-mini-smoke") and str(
        tmp_path
    ) not in json.dumps(result)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "--resume" in again.stderr
    resumed = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0 and "report.html" in resumed.stdout
    assert (tmp_path / "runs/demo/report.html").read_text() == report, "nothing is overwritten"


def test_sample(runs, tmp_path):
    for folder, more, size in (
        ("f", [], (169, 33)),
        ("f", ["--denoise", "--w", "0.5"], (169, 33)),
        ("g", ["--labels", "3,-1"], (169, 33)),
        ("g", ["--w", "1"], (169, 33)),
    ):
        out = tmp_path / f"{folder}{''.join(more)}.png"
        assert (
            main(
                [
                    "sample",
                    "--checkpoint",
                    str(runs / folder),
                    "--n",
                    "20",
                    "--out",
                    str(out),
                    *more,
                ]
            )
            == 0
        )
        assert Image.open(out).size == size
    assert (
        main(
            [
                "sample",
                "--checkpoint",
                str(asset("mnist-mini/reverse")),
                "--n",
                "3",
                "--columns",
                "3",
                "--out",
                str(tmp_path / "new" / "s.png"),
            ]
        )
        == 0
    )


def test_a_streamed_evaluation_has_a_floor_and_says_how_models_were_trained(
    runs, tmp_path, monkeypatch
):
    """Real training images beside the methods, what F knows of test images, the settings of both trainings."""
    monkeypatch.chdir(tmp_path)
    words = [
        "evaluate",
        *SMOKE,
        "--forward",
        str(runs / "f"),
        "--reverse",
        str(runs / "g"),
        "--features",
        "mnist-cnn",
        "--no-timing",
        "--w",
        "0.5",
    ]
    assert main([*words, "--n", "60", "--out", "results/e.json"]) == 0
    result = json.loads((tmp_path / "results/e.json").read_text())
    found = {(m["row"], m["metric"]): m["value"] for m in result["measurements"]}
    assert {row for row, _ in found} == {
        "exact",
        "exact+denoise",
        "one-pass",
        "guided, w = 0.5",
        "real",
    }
    assert 0 < found["real", "fd[mnist-cnn]"] < found["one-pass", "fd[mnist-cnn]"]
    assert found["exact", "bits_per_dim"] > 0 and found["one-pass", "reconstruction_mse"] > 0
    config = result["config"]
    assert (
        config["images"] == config["data"]["name"]
        and config["train_reverse"]["steps"] == found["one-pass", "train_steps"]
        and config["objective"]["strategy"]
    )
    (tmp_path / "again").mkdir()
    assert (
        main(
            [
                *words,
                "--n",
                "60",
                "--rows",
                "one-pass",
                "--work",
                "again",
                "--out",
                "results/one.json",
            ]
        )
        == 0
    )
    assert {
        m["row"] for m in json.loads((tmp_path / "results/one.json").read_text())["measurements"]
    } == {"one-pass", "guided, w = 0.5", "exact"}  # exact: F's training


def test_the_same_seed_draws_the_same(runs, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            main(
                [
                    "sample",
                    "--checkpoint",
                    str(runs / "g"),
                    "--n",
                    "8",
                    "--seed",
                    str(seed),
                    "--out",
                    str(tmp_path / f"{name}.png"),
                ]
            )
            == 0
        )
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_evaluate(runs, tmp_path, capsys):
    out = tmp_path / "e.json"
    assert (
        main(
            [
                "evaluate",
                *SMOKE,
                "--forward",
                str(runs / "f"),
                "--reverse",
                str(runs / "g"),
                "--n",
                "50",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert {m["row"] for m in json.loads(out.read_text())["measurements"]} == {
        "exact",
        "exact+denoise",
        "one-pass",
        "real",
    }
    refused(["evaluate", *SMOKE, "--forward", runs / "f", "--out", out], capsys, "exists already")
    assert (
        main(
            [
                "evaluate",
                *SMOKE,
                "--forward",
                str(runs / "f"),
                "--n",
                "50",
                "--out",
                str(tmp_path / "f.json"),
            ]
        )
        == 0
    )
    assert "one-pass" not in (tmp_path / "f.json").read_text().split('"measurements"')[1]


def test_a_flow_alone(tmp_path, capsys):
    """Trained for its likelihood, gone on with, measured under one protocol, drawn from; no pair, no labels, no noise to remove."""
    glow, run = ["--preset", "mnist-glow-smoke"], tmp_path / "glow"
    assert main(["train", "forward", *glow, "--steps", "4", "--out", str(run)]) == 0
    assert main(["train", "forward", *glow, "--steps", "4", "--out", str(run), "--resume"]) == 0
    out = tmp_path / "e.json"
    assert main(["evaluate", *glow, "--forward", str(run), "--n", "20", "--out", str(out)]) == 0
    found = {
        m["metric"]: m
        for m in json.loads(out.read_text())["measurements"]
        if m["row"] == "exact" and m["batch"] is None
    }
    assert {
        "bits_per_dim",
        "bits_per_dim[8 draws]",
        "round_trip_max_error",
        "fd[mnist-cnn]",
        "params",
        "flops_per_density",
        "train_steps",
        "train_s",
    } <= set(found)
    assert "label_accuracy" not in found, "no label was asked for"
    assert (
        found["bits_per_dim[8 draws]"]["value"] < found["bits_per_dim"]["value"] < 9
        and found["bits_per_dim"]["n"] == 2000
    )
    assert "not given" in found["bits_per_dim"]["protocol"] and found["train_steps"]["value"] == 4
    assert (
        main(
            [
                "sample",
                "--checkpoint",
                str(run),
                "--n",
                "4",
                "--temperature",
                "0.5",
                "--out",
                str(tmp_path / "s.png"),
            ]
        )
        == 0
    )
    refused(
        ["sample", "--checkpoint", run, "--labels", "3", "--out", tmp_path / "l.png"],
        capsys,
        "reads no labels",
    )
    refused(
        ["sample", "--checkpoint", run, "--denoise", "--out", tmp_path / "l.png"],
        capsys,
        "--denoise",
    )
    refused(
        ["sample", "--checkpoint", run, "--w", "1", "--out", tmp_path / "l.png"], capsys, "--w 1"
    )
    refused(
        ["sample", "--checkpoint", run, "--temperature", "-1", "--out", tmp_path / "l.png"],
        capsys,
        "-1",
    )
    refused(
        ["train", "forward", *glow, "--patch-size", "2", "--out", tmp_path / "p"],
        capsys,
        "--patch-size 2",
    )
    refused(
        ["train", "reverse", *glow, "--out", tmp_path / "g"], capsys, "flow alone", "mnist-mini"
    )
    refused(["demo", *glow, "--out", tmp_path / "d"], capsys, "flow alone")
    refused(
        ["evaluate", *SMOKE, "--forward", run, "--out", tmp_path / "x.json"],
        capsys,
        "CouplingFlow",
        "TARFlow",
    )
    refused(
        ["evaluate", *glow, "--forward", run, "--reverse", run, "--out", tmp_path / "x.json"],
        capsys,
        "flow alone",
    )
    assert not (tmp_path / "l.png").exists() and not (tmp_path / "d").exists()


def test_bench_counts_tokens_and_memory():
    found = bench.bench_tokens(sides=(2, 4), repeats=2)
    peak = {(m["row"], m["tokens"]): m["value"] * 2**20 for m in found if m["metric"] == "peak_mb"}
    assert {m["row"] for m in found} == {"training", "exact", "jacobi", "dense"} and all(
        m["value"] > 0 for m in found
    )
    caches = {
        side: 2 * 2 * side**2 * 128 * 4 for side in (2, 4)
    }  # k and v of 2 layers, one block at a time
    assert all(caches[side] < peak["exact", side**2] < caches[side] + 200_000 for side in (2, 4))
    assert peak["training", 4] > peak["dense", 4] > 0

    def call():
        """Two tensors alive at most; the third takes the first one's place."""
        a, b = torch.zeros(1000), torch.zeros(1000)
        del a
        torch.zeros(500), b.view(10, 100)

    assert bench.peak_bytes(call) == 8000


def test_bench(tmp_path, capsys, runs, monkeypatch):
    monkeypatch.setitem(bench.GEOMETRIES, "mnist", (8, 4))
    for what, metric in (
        ("inverse", "speedup_vs_plain"),
        ("training", "training_speedup_vs_plain"),
    ):
        out = tmp_path / f"{what}.json"
        assert main(["bench", "--what", what, "--out", str(out)]) == 0
        found = [m for m in json.loads(out.read_text())["measurements"] if m["metric"] == metric]
        assert {m["row"] for m in found} >= {"plain", "exact"} and all(
            m["value"] == 1 for m in found if m["row"] == "plain"
        )
    differences = [
        m["value"]
        for m in json.loads((tmp_path / "inverse.json").read_text())["measurements"]
        if m["metric"] == "max_difference_from_plain"
    ]
    assert len(differences) == 20 and max(differences) < 1e-3
    assert main(["bench", "--checkpoint", str(runs / "f"), "--out", str(tmp_path / "c.json")]) == 0
    assert (
        main(
            [
                "bench",
                "--what",
                "pair",
                "--geometry",
                "mnist-mini-smoke",
                "--out",
                str(tmp_path / "p.json"),
            ]
        )
        == 0
    )
    pair = json.loads((tmp_path / "p.json").read_text())["measurements"]
    ms = {
        m["row"]: m["value"]
        for m in pair
        if (m["metric"], m["batch"], m["guidance"]) == ("ms_per_image", 64, 1.0)
    }
    gain = {
        m["metric"]: m["value"]
        for m in pair
        if m["row"] == "one pass" and (m["batch"], m["guidance"]) == (64, 1.0)
    }
    assert gain["speedup_vs_exact+denoise"] == pytest.approx(
        (ms["exact"] + ms["score step"]) / ms["one pass"]
    )
    exact, ours = (
        min(
            v
            for row, v in ms.items()
            if row.startswith("one pass") == mine and not row.startswith("score step")
        )
        for mine in (False, True)
    )
    assert (
        gain["speedup_vs_exact, fastest"] == pytest.approx(exact / ours)
        and "one pass, packed" in ms
    )
    refused(
        ["bench", "--what", "pair", "--geometry", "64-tokens", "--out", tmp_path / "x.json"],
        capsys,
        "64-tokens",
        "mnist-mini",
    )
    refused(
        ["bench", "--what", "pair", "--geometry", "mnist-glow", "--out", tmp_path / "x.json"],
        capsys,
        "mnist-glow",
    )
    refused(["bench", "--what", "coffee", "--out", tmp_path / "x.json"], capsys, "coffee", "tokens")
    refused(["bench", "--segments", "1,two", "--out", tmp_path / "x.json"], capsys, "1,two")
    refused(
        ["bench", "--geometry", "mnits", "--out", tmp_path / "x.json"],
        capsys,
        "mnits",
        "256-tokens",
    )
    refused(["bench", "--out", tmp_path / "c.json"], capsys, "exists already")


def test_a_tarflow_alone_goes_through_the_same_steps(digits):
    """On logits, without labels: the preset of chapter 07's table, at the size of the embedded digits."""
    small = replace(
        find_preset("mnist-tarflow").forward,
        image_size=16,
        transformer=TransformerConfig(width=16, head_dim=8, num_layers=1),
    )
    flow = pipeline.build(TARFlow, small, 0).train()
    loss, _ = pipeline.stage_one_loss(small)(
        flow, digits.x[:8], -torch.ones(8, dtype=torch.int64), torch.Generator().manual_seed(0)
    )
    found = pipeline.evaluate_flow(
        flow.eval(), digits, digits[:50], n=10, timing=False
    ).measurements
    bpd = {m["metric"]: m["value"] for m in found if m["row"] == "exact"}
    assert (
        torch.isfinite(loss)
        and bpd["bits_per_dim[8 draws]"] < bpd["bits_per_dim"]
        and bpd["round_trip_max_error"] < 1e-3
    )
    assert bpd["serial_steps"] == 4 * 15 and bpd["broken_samples"] == 0
    reverse = find_preset("mnist-mini").reverse
    with pytest.raises(BitflowError, match="logit"):
        check_pair(flow, pipeline.build(ReverseModel, reverse, 0))


def test_samples_that_overflow_are_counted(digits, monkeypatch):
    """Without clipping an inverse can overflow: the likelihood is measured all the same, and the share of such samples stands beside it."""
    flow = pipeline.build(
        TARFlow, replace(find_preset("mnist-mini-smoke").forward, noise_std=0.0), 0
    ).eval()
    whole = pipeline.undo
    monkeypatch.setattr(
        pipeline,
        "undo",
        lambda model, z, c, guidance=None: torch.where(
            torch.arange(len(z))[:, None, None, None] % 5 == 0, torch.nan, whole(model, z, c)
        ),
    )
    found = {
        m["metric"]: m
        for m in pipeline.evaluate_flow(flow, digits, digits[:50], n=20, timing=False).measurements
        if m["row"] == "exact"
    }
    assert (
        abs(found["broken_samples"]["value"] - 0.2) < 1e-6
        and found["fd[mnist-cnn]"]["n"] == 16
        and found["bits_per_dim"]["value"] > 0
    )
    monkeypatch.setattr(
        pipeline,
        "undo",
        lambda model, z, c, guidance=None: torch.full((len(z), 1, 16, 16), torch.nan),
    )
    with pytest.raises(BitflowError, match="0 finite samples"):
        pipeline.evaluate_flow(flow, digits, digits[:50], n=20, timing=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_info(preset, capsys):
    assert main(["info", "--preset", preset]) == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "FLOP" in said


def test_info_of_a_checkpoint(runs, capsys):
    assert main(["info", "--checkpoint", str(runs / "g")]) == 0
    assert "ReverseModel" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["naive", "hidden-distillation"])
def test_other_strategies_train(runs, tmp_path, strategy):
    assert (
        main(
            [
                "train",
                "reverse",
                *SMOKE,
                "--steps",
                "2",
                "--strategy",
                strategy,
                "--forward",
                str(runs / "f"),
                "--out",
                str(tmp_path / "g"),
            ]
        )
        == 0
    )


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert e.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("demo", "train", "sample", "evaluate", "info"))


def test_mistakes_in_words(capsys, tmp_path):
    refused([], capsys, "--help")
    refused(["dmeo"], capsys, "dmeo")
    refused(["train"], capsys, "forward", "reverse")
    refused(["demo", "--stepz", "3"], capsys, "--stepz")
    refused(["demo", "--steps", "many"], capsys, "--steps", "many")
    refused(
        ["demo", "--preset", "mnist-mimi", "--out", tmp_path / "d"],
        capsys,
        "mnist-mimi",
        "mnist-mini",
    )
    refused(["info", "--preset", "imagenet"], capsys, "imagenet")
    refused(["sample"], capsys, "--checkpoint")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "option,value",
    [
        ("--steps", 0),
        ("--steps", -3),
        ("--minutes", 0),
        ("--minutes", -1.5),
        ("--batch-size", 0),
        ("--lr", -0.1),
        ("--patch-size", 5),
        ("--patch-size", 0),
        ("--device", "tpu"),
        ("--data-root", "nowhere"),
    ],
)
def test_options_out_of_range(capsys, tmp_path, option, value):
    refused(["train", "forward", *SMOKE, "--out", tmp_path / "f", option, value], capsys, value)
    assert not (tmp_path / "f").exists(), "nothing was written"


def test_mistakes_with_checkpoints(capsys, tmp_path, runs):
    refused(
        ["train", "reverse", *SMOKE, "--forward", tmp_path / "none", "--out", tmp_path / "g"],
        capsys,
        "none",
        "does not exist",
    )
    refused(
        ["train", "reverse", *SMOKE, "--forward", runs / "g", "--out", tmp_path / "g"],
        capsys,
        "ReverseModel",
        "TARFlow",
    )
    refused(
        [
            "train",
            "reverse",
            *SMOKE,
            "--strategy",
            "osmosis",
            "--forward",
            runs / "f",
            "--out",
            tmp_path / "g",
        ],
        capsys,
        "osmosis",
        "hidden-alignment",
    )
    refused(
        ["train", "reverse", "--forward", runs / "f", "--out", tmp_path / "g"], capsys, "num_blocks"
    )
    refused(
        ["evaluate", *SMOKE, "--forward", runs / "g", "--out", tmp_path / "e.json"],
        capsys,
        "ReverseModel",
    )
    refused(
        [
            "evaluate",
            *SMOKE,
            "--forward",
            runs / "f",
            "--reverse",
            runs / "f",
            "--out",
            tmp_path / "e.json",
        ],
        capsys,
        "TARFlow",
    )
    refused(
        ["evaluate", *SMOKE, "--forward", runs / "f", "--n", "0", "--out", tmp_path / "e.json"],
        capsys,
        "0",
    )
    refused(
        ["evaluate", "--preset", "mnist", "--forward", runs / "f", "--out", tmp_path / "e.json"],
        capsys,
        "16",
        "28",
    )
    refused(
        ["sample", "--checkpoint", runs / "g", "--labels", "12", "--out", tmp_path / "s.png"],
        capsys,
        "12",
    )
    refused(
        ["sample", "--checkpoint", runs / "g", "--labels", "x", "--out", tmp_path / "s.png"],
        capsys,
        "x",
    )
    refused(
        ["sample", "--checkpoint", runs / "g", "--n", "0", "--out", tmp_path / "s.png"], capsys, "0"
    )
    refused(
        ["sample", "--checkpoint", runs / "g", "--w", "-1", "--out", tmp_path / "s.png"],
        capsys,
        "--w -1",
    )
    refused(
        ["sample", "--checkpoint", runs / "g", "--denoise", "--out", tmp_path / "s.png"],
        capsys,
        "--denoise",
    )
    refused(["info", "--checkpoint", tmp_path / "none"], capsys, "none")
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_mistakes_with_folders(capsys, tmp_path, runs):
    refused(["train", "forward", *SMOKE, "--out", runs / "f"], capsys, "exists already", "--resume")
    refused(
        ["train", "forward", *SMOKE, "--steps", "11", "--out", runs / "f", "--resume"],
        capsys,
        "was made with",
    )
    (tmp_path / "file").write_text("kept")
    for command in ("demo", "train"):
        more = ["forward"] if command == "train" else []
        refused([command, *more, *SMOKE, "--out", tmp_path / "file"], capsys, tmp_path / "file")
        refused(
            [command, *more, *SMOKE, "--out", tmp_path / "file" / "run"], capsys, tmp_path / "file"
        )
    refused(
        ["demo", *SMOKE, "--out", tmp_path / "d", "--results", tmp_path / "file"],
        capsys,
        tmp_path / "file",
    )
    refused(
        ["sample", "--checkpoint", runs / "g", "--out", tmp_path / "file"], capsys, "exists already"
    )
    (tmp_path / "mnist-mini.npz").write_bytes(b"no archive")
    refused(
        [
            "demo",
            *SMOKE,
            "--data-root",
            tmp_path,
            "--out",
            tmp_path / "d",
            "--results",
            tmp_path / "r",
        ],
        capsys,
        "mnist-mini.npz",
    )
    assert (
        (tmp_path / "file").read_text() == "kept"
        and not (tmp_path / "d").exists()
        and not (tmp_path / "r").exists()
    )
