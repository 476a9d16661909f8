"""`bitflow evaluate`: in memory, in a stream, and of a flow alone."""

import json

from commands import GLOW, SMOKE, measurements, refused, run


def test_evaluate(runs, tmp_path, capsys):
    words, out = f"evaluate {SMOKE} --forward {runs}/f --n 50", tmp_path / "e.json"
    run(f"{words} --reverse {runs}/g --out {out}")
    rows = {m["row"] for m in measurements(out)}
    assert rows == {"exact", "exact+denoise", "one-pass", "real"}
    refused(f"{words} --out {out}", capsys, "exists already")
    run(f"{words} --out {tmp_path}/f.json")
    assert "one-pass" not in {m["row"] for m in measurements(tmp_path / "f.json")}


def test_the_chosen_methods_are_measured_in_memory(runs, tmp_path, capsys):
    words = f"evaluate {SMOKE} --forward {runs}/f --reverse {runs}/g --n 50 --out {tmp_path}/e.json"
    run(f"{words} --rows exact one-pass --w 0.5")
    found = measurements(tmp_path / "e.json")
    judged = {m["row"] for m in found if m["metric"] == "fd[mnist-cnn]"}
    timed = {m["row"] for m in found if m["metric"] == "ms_per_image"}
    assert judged == {"exact", "one-pass", "guided, w = 0.5", "real"}
    assert timed == {"exact", "one-pass"} and (tmp_path / "e.png").exists()


def test_methods_that_are_not_there(runs, tmp_path, capsys):
    """Refused before anything is measured, the same in memory and in a stream."""
    for more in ("", "--features mnist-cnn"):
        words = f"evaluate {SMOKE} --forward {runs}/f --n 50 --out {tmp_path}/e.json {more}"
        refused(f"{words} --rows bogus", capsys, "--rows bogus", "exact+denoise")
        refused(f"{words} --rows one-pass", capsys, "--rows one-pass", "--reverse")
        refused(f"{words} --w 1", capsys, "--w", "--reverse")
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
