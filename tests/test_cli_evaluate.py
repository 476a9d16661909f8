"""`bitflow evaluate`: in memory, in a stream, and of a flow alone."""

import json
import math
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import GLOW, SMOKE, measurements, refused, run
from safetensors.torch import load_file, save_file

from bitflow_edu.cli import evaluate as cli
from bitflow_edu.cli.main import main
from bitflow_edu.cli.options import parse
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.locks import run_lock
from bitflow_edu.io.models import build, newest_checkpoint
from bitflow_edu.io.shards import sha256_of
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.lab.sampling import Sampler
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.scale.feature_networks import FeatureNetwork

CHOSEN = {"exact, chosen w", "guided, chosen w"}


def test_evaluate(runs, tmp_path, capsys):
    words, out = f"evaluate {SMOKE} --forward {runs}/f --n 50", tmp_path / "e.json"
    run(f"{words} --reverse {runs}/g --out {out}")
    rows = {m["row"] for m in measurements(out)}
    assert rows == {"exact", "exact+denoise", "one-pass", "real"}
    refused(f"{words} --out {out}", capsys, "exists already")
    run(f"{words} --out {tmp_path}/f.json")
    assert "one-pass" not in {m["row"] for m in measurements(tmp_path / "f.json")}


def test_weights_in_bfloat16(runs, glow, tmp_path, capsys):
    """The same noise: figures of samples move a little and not much, and the file says what was
    measured. Likelihood and round trip are those of the weights as they are."""
    words = f"evaluate {SMOKE} --forward {runs}/f --reverse {runs}/g --n 50 --no-timing --out"
    found = {}
    for precision in ("fp32", "bf16"):
        run(f"{words} {tmp_path}/{precision}.json --precision {precision}")
        result = json.loads((tmp_path / f"{precision}.json").read_text())
        assert result["config"]["precision"] == precision
        found[precision] = {(m["row"], m["metric"]): m["value"] for m in result["measurements"]}
    assert found["fp32"].keys() == found["bf16"].keys()
    for row in ("exact", "exact+denoise", "one-pass"):
        fd, rounded = (found[p][row, "fd[mnist-cnn]"] for p in ("fp32", "bf16"))
        assert fd != rounded == pytest.approx(fd, rel=0.02)
    for row, metric in found["fp32"]:
        if metric in ("round_trip_max_error", "bits_per_dim", "reconstruction_mse", "inverse_mse"):
            assert found["fp32"][row, metric] == found["bf16"][row, metric]
    assert found["bf16"]["exact", "round_trip_max_error"] < 1e-4
    refused(f"{words} {tmp_path}/x --precision fp8", capsys, "fp8", "fp32, bf16")
    of_glow = f"evaluate {GLOW} --forward {glow} --n 20 --out {tmp_path}/x.json"
    refused(f"{of_glow} --precision bf16", capsys, "CouplingFlow", "fp32")


def test_one_evaluation_at_a_time_keeps_its_work_in_a_folder(runs, tmp_path, capsys):
    words = f"evaluate {SMOKE} --forward {runs}/f --n 50 --rows exact --features mnist-cnn"
    with run_lock(tmp_path / "w"):
        refused(f"{words} --work {tmp_path}/w --out {tmp_path}/e", capsys, "in use", "w")
    assert not (tmp_path / "e.json").exists()


def test_the_chosen_methods_are_measured_in_memory(runs, tmp_path, capsys):
    words = f"evaluate {SMOKE} --forward {runs}/f --reverse {runs}/g --n 50 --out {tmp_path}/e.json"
    run(f"{words} --rows exact one-pass --w 0.5")
    found = measurements(tmp_path / "e.json")
    judged = {m["row"] for m in found if m["metric"] == "fd[mnist-cnn]"}
    timed = {m["row"] for m in found if m["metric"] == "ms_per_image"}
    unguided = {"exact", "one-pass", "real"}
    assert judged == unguided | {"exact, w = 0.5", "guided, w = 0.5"} | CHOSEN
    assert timed == {"exact", "one-pass"} and (tmp_path / "e.png").exists()


def test_methods_that_are_not_there(runs, tmp_path, capsys):
    """Refused before anything is measured, the same in memory and in a stream."""
    for more in ("", "--features mnist-cnn"):
        words = f"evaluate {SMOKE} --forward {runs}/f --n 50 --out {tmp_path}/e.json {more}"
        refused(f"{words} --rows bogus", capsys, "--rows bogus", "exact+denoise")
        refused(f"{words} --rows one-pass", capsys, "--rows one-pass", "--reverse")
    assert not list(tmp_path.iterdir()), "nothing was written"


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
    rows = {"exact", "exact+denoise", "one-pass", "real"}
    guided = {f"{method}, w = 0.5" for method in ("exact", "exact+denoise", "guided")}
    assert {row for row, _ in found} == rows | guided | CHOSEN | {"exact+denoise, chosen w"}
    for row in rows | guided:
        assert found[row, "fd[mnist-cnn]"] > 0
        assert ((row, "fd_train[mnist-cnn]") in found) == (row != "real"), "of its own images"
    assert {row for row, metric in found if metric == "inverse_mse"} == rows - {"real"}
    assert 0 < found["real", "fd[mnist-cnn]"] < found["one-pass", "fd[mnist-cnn]"]
    assert found["exact", "bits_per_dim"] > 0 and found["one-pass", "reconstruction_mse"] > 0
    config = result["config"]
    assert config["images"] == config["data"]["name"] and config["objective"]["strategy"]
    assert config["train_reverse"]["steps"] == found["one-pass", "train_steps"]
    (tmp_path / "again").mkdir()
    run(f"{words} --rows one-pass --work again --out results/one.json")
    again = {m["row"] for m in measurements(tmp_path / "results/one.json")}
    guided = {"guided, w = 0.5", "guided, chosen w"}
    assert again == {"one-pass", *guided, "exact"}  # exact: F's training


@pytest.mark.parametrize("more", ["", "--features mnist-cnn --work WORK"])
def test_f_alone_is_guided_too(runs, tmp_path, more):
    more = more.replace("WORK", str(tmp_path / "w"))
    words = f"evaluate {SMOKE} --forward {runs}/f --n 20 --no-timing --w 0.5 --rows exact {more}"
    run(f"{words} --out {tmp_path}/e.json")
    found = {(m["row"], m["metric"]): m for m in measurements(tmp_path / "e.json")}
    by_w = [found[row, "fd_train[mnist-cnn]"]["value"] for row in ("exact", "exact, w = 0.5")]
    choice = found["exact, chosen w", "chosen_w"]
    assert list(choice["values"].values()) == by_w
    assert choice["value"] == 0.5 * by_w.index(min(by_w))


def test_a_picture_shows_the_unguided_and_the_chosen(tmp_path):
    samplers = [Sampler("exact", None, None, 1, 1, w) for w in (0.0, 0.5, 1.0)]
    assert cli.not_chosen(samplers, []) == set()
    choice = {"metric": "chosen_w", "same_as": "exact, w = 0.5"}
    assert cli.not_chosen(samplers, [choice]) == {"exact, w = 1"}


def test_scales_that_nothing_can_be_guided_by(runs, glow, tmp_path, capsys):
    words = f"--n 20 --out {tmp_path}/e.json"
    refused(f"evaluate {GLOW} --forward {glow} {words} --w 0.5", capsys, "--w 0.5", "labels")
    G = build(ReverseModel, replace(find_preset("mnist-mini-smoke").reverse, max_guidance=3.0), 0)
    with pytest.raises(BitflowError, match="--w 4 is more than the 3"):
        cli.check_scale(4.0, find_preset("mnist-mini-smoke"), G)
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_scale_is_chosen_beside_a_file_of_statistics(runs, tmp_path, capsys):
    """The file is what is reported against; without training images --w says what it needs."""
    words = f"evaluate {SMOKE} --forward {runs}/f --reverse {runs}/g --features mnist-cnn --n 20"
    words += f" --no-timing --rows one-pass --out {tmp_path}"
    run(f"{words}/a.json --work {tmp_path}/a --w 0.25 0.5")
    (statistics,) = (tmp_path / "a").glob("*-test-*.npz")
    reference = shutil.copy(statistics, tmp_path / "given.npz")
    run(f"{words}/b.json --work {tmp_path}/b --w 0.25 0.5 --reference {reference}")
    a, b = (
        {(m["row"], m["metric"]): m for m in measurements(tmp_path / f"{name}.json")}
        for name in "ab"
    )
    key = "guided, chosen w", "fd[mnist-cnn]"
    assert a.keys() == b.keys() and a[key]["value"] == b[key]["value"]
    assert b[key]["reference"] == "given.npz"
    of_a, of_b = (json.loads((tmp_path / f"{name}.json").read_text())["config"] for name in "ab")
    assert of_a["reference_sha256"] is None and of_b["reference_sha256"] == sha256_of(reference)
    choice = "guided, chosen w", "chosen_w"
    assert a[choice] == b[choice] and "train" in b[choice]["reference"]
    run(f"{words}/c.json --work {tmp_path}/c --w 0.5 --reference {reference}")  # one: no choice
    found = measurements(tmp_path / "c.json")
    assert not any("train[" in m["metric"] or m["metric"] == "chosen_w" for m in found)
    assert {m["row"] for m in found if m["metric"] == key[1]} == {"one-pass", "guided, w = 0.5"}
    assert not list((tmp_path / "c").glob("*-train-*.npz"))
    (tmp_path / "nothing").mkdir()
    nothing = f"--data-root {tmp_path}/nothing --reference {reference} --work {tmp_path}/d"
    other = words.replace(SMOKE, f"{SMOKE} --data.name mnist")
    needs = "--w", "training images", "one scale"
    refused(f"{other}/d.json {nothing} --w 0.25 0.5", capsys, *needs)


def with_weights(run_folder, folder, change):
    """A copy of a run, its newest weights changed."""
    shutil.copytree(run_folder, folder)
    path = newest_checkpoint(folder) / "model.safetensors"
    save_file({k: change(t) for k, t in load_file(path).items()}, path)
    return folder


def nan(t):
    return torch.full_like(t, math.nan)


@pytest.mark.filterwarnings("ignore:.*broken", "ignore:.*left out")
@pytest.mark.parametrize("more", ["", "--features mnist-cnn --work WORK"])
def test_a_broken_model_ends_with_2_and_with_its_results(runs, tmp_path, capsys, more):
    """What could be measured is written, and the rest named."""
    G = with_weights(runs / "g", tmp_path / "nan", nan)
    words = f"evaluate {SMOKE} --forward {runs}/f --reverse {G} --n 20 --out {tmp_path}/e.json"
    more = f"--no-timing {more.replace('WORK', str(tmp_path / 'work'))}"
    refused_after_work(f"{words} {more}", capsys, "one-pass", "broken")
    text = (tmp_path / "e.json").read_text()
    found = {(m["row"], m["metric"]): m["value"] for m in measurements(tmp_path / "e.json")}
    assert found["one-pass", "broken_samples"] == 1 and found["exact", "fd[mnist-cnn]"] > 0
    assert "NaN" not in text and (tmp_path / "e.png").exists()


def refused_after_work(line, capsys, *words):
    """Code 2 and one sentence, after what was written."""
    capsys.readouterr()
    assert main(shlex.split(line)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("bitflow: ")
    for word in words:
        assert word in said


def test_work_of_other_weights_or_images_is_not_taken_over(runs, tmp_path, capsys):
    """The same paths and as many images; only their content differs."""
    F = shutil.copytree(runs / "f", tmp_path / "f")
    data = tmp_path / "data"
    data.mkdir()
    mini = dict(np.load(asset("mnist-mini.npz")))
    np.savez(data / "mnist-mini.npz", **mini)
    words = f"evaluate {SMOKE} --forward {F} --features mnist-cnn --n 20 --no-timing --resume "
    words += f"--work {tmp_path}/work --data-root {data} --out {tmp_path}"
    run(f"{words}/a.json")
    run(f"{words}/b.json")
    assert measurements(tmp_path / "a.json") == measurements(tmp_path / "b.json")
    for split in ("test", "train"):
        changed = {**mini, f"{split}_images": mini[f"{split}_images"][::-1]}
        np.savez(data / "mnist-mini.npz", **changed)
        refused(f"{words}/c.json", capsys, "real_images", "name another folder")
    np.savez(data / "mnist-mini.npz", **mini)
    shutil.rmtree(F)
    with_weights(runs / "f", F, lambda t: t * 1.001)
    refused(f"{words}/c.json", capsys, "weights", "name another folder")
    assert not (tmp_path / "c.json").exists()
    run(f"{words}/c.json --work {tmp_path}/other")
    timed = words.replace(" --no-timing", "")
    run(f"{timed}/d.json --work {tmp_path}/other")
    assert any(m["metric"] == "ms_per_image" for m in measurements(tmp_path / "d.json"))


@pytest.mark.parametrize(
    "option",
    ["--reference no.npz", "--batch-size -7", "--batch-size 7", "--work w", "--resume"]
    + ["--weights no.pth", "--vae no", "--w 0", "--w -1", "--w nan", "--rows bogus"]
    + ["--n 1", "--n -3", "--n 1000000000000", "--seed -1"],
)
def test_every_option_is_used_or_refused(runs, tmp_path, capsys, monkeypatch, option):
    """In memory, where there is no work to go on with, and no batch."""
    monkeypatch.chdir(tmp_path)
    words = f"evaluate {SMOKE} --forward {runs}/f --reverse {runs}/g --out e.json {option}"
    refused(words, capsys, option.split()[0])
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize("option", ["--reference no.npz", "--batch-size 0", "--weights weights"])
def test_options_of_a_stream_are_looked_at(runs, tmp_path, capsys, option):
    words = f"evaluate {SMOKE} --forward {runs}/f --out {tmp_path}/e.json --features mnist-cnn"
    refused(f"{words} --work {tmp_path}/w {option}", capsys, option.split()[-1])


def test_few_samples_and_methods_named_twice(runs, tmp_path):
    """No more splits than samples; each row is measured once."""
    words = f"evaluate {SMOKE} --forward {runs}/f --reverse {runs}/g --n 4 --no-timing --w 1 1"
    words += " --rows one-pass one-pass"
    for more in ("", f"--features mnist-cnn --work {tmp_path}/w"):
        out = tmp_path / f"e{len(more)}.json"
        run(f"{words} {more} --out {out}")
        rows = [m["row"] for m in measurements(out) if m["metric"] == "fd[mnist-cnn]"]
        guided = ["guided, w = 1", "guided, chosen w"]
        assert [row for row in rows if row != "real"] == ["one-pass", *guided]


def test_data_decides_what_judges():
    """Digits in memory, pairs of all other images in a stream; never the words for the classes."""
    one = type("One", (), {"size": 1})
    args, digits = parse(["evaluate"]), find_preset("mnist")
    fashion, glow = find_preset("fashion-mnist"), find_preset("mnist-glow")
    assert not cli.is_streamed(args, digits, one) and not cli.is_streamed(args, glow, one)
    assert cli.is_streamed(args, fashion, one)
    network = FeatureNetwork("mnist-cnn", None)
    assert cli.knows_labels(network, digits) and not cli.knows_labels(network, fashion)


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
    refused(f"{draw} --labels 3", capsys, "--labels 3", "no classes")
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
