"""`bitflow train`: what it writes, how it is repeated, and what it refuses."""

import json
import shutil

import pytest
import torch
from commands import SMOKE, refused, run
from safetensors.torch import load_file

from bitflow_edu.io.models import load_model, newest_checkpoint
from bitflow_edu.lab.recipes import run_settings, training_record
from bitflow_edu.lab.sampling import noise_for
from bitflow_edu.neighbours import Neighbour
from bitflow_edu.reverse_model import ReverseModel, one_pass
from bitflow_edu.tarflow import TARFlow


@pytest.mark.parametrize("strategy", ["naive", "hidden-distillation"])
def test_other_strategies_train(runs, tmp_path, strategy):
    more = f"--steps 2 --strategy {strategy} --out {tmp_path}/g"
    run(f"train reverse {SMOKE} --forward {runs}/f {more}")


def test_a_run_is_repeated_from_the_file_it_leaves(tmp_path, capsys):
    """Fields on the command line reach the run; its preset.yaml gives the same weights again."""
    a, b = tmp_path / "a", tmp_path / "b"
    asked = "--steps 3 --seed 5 --forward.transformer.num-layers 2 --train-forward.lr=1e-3"
    run(f"train forward {SMOKE} {asked} --name mine --out {a}")
    run(f"train forward --config {a}/preset.yaml --out {b}")
    first, again = (json.loads((folder / "run.json").read_text()) for folder in (a, b))
    assert first == again and first["preset"] == "mine"
    assert first["train"]["lr"] == 1e-3 and first["train"]["seed"] == 5
    one, other = (next(folder.glob("checkpoints/*/model.safetensors")) for folder in (a, b))
    assert one.read_bytes() == other.read_bytes()
    assert (a / "preset.yaml").read_text() == (b / "preset.yaml").read_text()
    twice = f"train forward {SMOKE} --steps 3 --train-forward.steps 4 --out {tmp_path}/c"
    refused(twice, capsys, "--steps 3", "--train-forward.steps")
    assert not (tmp_path / "c").exists()


OUT_OF_RANGE = """--steps 0, --steps -3, --minutes 0, --minutes -1.5, --batch-size 0, --lr -0.1,
--patch-size 5, --patch-size 0, --device tpu, --data-root nowhere, --init-from nowhere,
--seed -1, --seed 99999999999999999999, --forward.noise-std nan, --train-forward.lr inf"""


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


def test_mistakes_with_folders(capsys, tmp_path, runs):
    train = f"train forward {SMOKE} --out {runs}/f"
    refused(train, capsys, "exists already", "--resume")
    refused(f"{train} --steps 9 --resume", capsys, "was made with", "steps = 10", "9")
    refused(f"{train} --steps 10 --lr 1 --resume", capsys, "was made with", "lr")
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


def test_g_takes_the_patch_size_of_its_f(tmp_path, monkeypatch):
    sizes = " ".join(f"--{part}.image-size 15" for part in ("data", "forward", "reverse"))
    small = f"{SMOKE} {sizes} --steps 1 --batch-size 4"
    run(f"train forward {small} --patch-size 5 --out {tmp_path}/f")
    run(f"train reverse {small} --forward {tmp_path}/f --out {tmp_path}/g")  # 4 divides no 15
    assert load_model(tmp_path / "g", ReverseModel).cfg.patch_size == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "f").rename(tmp_path / "runs" / "own-forward")  # where F is by default
    run(f"train reverse {small} --name own")
    assert load_model(tmp_path / "runs" / "own-reverse", ReverseModel).cfg.patch_size == 5


def test_weights_to_start_from(runs, tmp_path, capsys):
    """A run of its own with another's first weights says so, and goes on without the option."""
    f, train = tmp_path / "f", f"train forward {SMOKE} --out {tmp_path}/f"
    run(f"{train} --steps 1 --init-from {runs}/f")
    source = newest_checkpoint(runs / "f")
    old, new = (load_file(newest_checkpoint(r) / "model.safetensors") for r in (runs / "f", f))
    assert all(torch.equal(old[k], new[k]) for k in old), "the first step has rate 0"
    assert json.loads((f / "run.json").read_text())["init"] == str(source)
    run(f"{train} --steps 2 --resume")
    run(f"{train} --steps 2 --resume --init-from {source}")
    assert json.loads((f / "run.json").read_text())["init"] == str(source)
    refused(f"{train} --steps 2 --resume --init-from {f}", capsys, "init", source)
    other = f"train forward {SMOKE} --forward.num-blocks 3 --out {tmp_path}/other"
    refused(f"{other} --reverse.num-blocks 3 --init-from {f}", capsys, "blocks.2", f)
    reverse = f"train reverse {SMOKE} --forward {runs}/f --steps 1 --out {tmp_path}/g"
    refused(f"{reverse} --init-from {f}", capsys, "TARFlow", "ReverseModel")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"], "nothing else was written"
    run(f"{reverse} --init-from {runs}/g")


def test_weights_to_start_from_are_read_again_where_there_is_no_checkpoint(runs, tmp_path):
    """Killed before its first checkpoint, a run starts from the weights that run.json names."""
    train = f"train forward {SMOKE} --steps 1 --out {tmp_path}"
    run(f"{train}/a --init-from {runs}/f")
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=lambda *_: ["checkpoints"])
    run(f"{train}/b --resume")
    a, b = (load_file(newest_checkpoint(tmp_path / n) / "model.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("scale_token", [False, True])
def test_a_guided_g_starts_from_one_that_takes_no_w(runs, tmp_path, scale_token):
    """At first w has no effect; as a further input it changes nothing at all."""
    guided = f"--reverse.max-guidance 2 --reverse.scale-token {scale_token} --init-from {runs}/g"
    run(f"train reverse {SMOKE} {guided} --forward {runs}/f --steps 1 --out {tmp_path}/g")
    F, old = load_model(runs / "f", TARFlow), load_model(runs / "g", ReverseModel)
    new = load_model(tmp_path / "g", ReverseModel)  # the first step has rate 0
    z, c = noise_for(F.cfg, 3), torch.tensor([0, 1, -1])
    assert torch.equal(one_pass(new, z, c, w=0.0), one_pass(new, z, c, w=2.0))
    same = torch.allclose(one_pass(new, z, c, w=2.0), one_pass(old, z, c), atol=1e-5)
    assert same != scale_token, "a further token is looked at"


def test_a_run_is_charged_with_the_training_that_it_began_with(runs, tmp_path):
    """Steps, seconds and settings of both; where the other is gone, of its own alone."""
    shutil.copytree(runs / "g", tmp_path / "first")
    begin = f"train reverse {SMOKE} --forward {runs}/f --out {tmp_path}/g --steps 1"
    run(f"{begin} --init-from {tmp_path}/first")
    run(f"{begin.replace('/g ', '/h ')} --init-from {tmp_path}/g")
    (earlier, seconds), (steps, all_seconds) = map(
        training_record, (tmp_path / "first", tmp_path / "h")
    )
    assert steps["value"] == earlier["value"] + 2 and steps["own"] == 1
    assert all_seconds["value"] > seconds["value"] + all_seconds["own"]
    chain = run_settings(tmp_path / "h")["started_from"]
    assert chain["started_from"] == run_settings(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    steps, _ = training_record(tmp_path / "g")
    assert steps["value"] == steps["own"] == 1 and str(tmp_path / "first") in steps["started_from"]
    assert "started_from" not in run_settings(tmp_path / "g")


@pytest.mark.parametrize("method", ["improved-mean-flow", "normalizing-flow-matching", "gan"])
def test_a_neighbour_is_trained_resumed_and_drawn_from(runs, tmp_path, capsys, method):
    out = tmp_path / "n"
    train = f"train neighbour {SMOKE} --method {method} --steps 3 --forward {runs}/f --out {out}"
    run(train)
    kept = load_file(out / "model.safetensors")
    refused(train, capsys, "n exists already")
    run(f"{train} --resume")
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert load_model(out, Neighbour).cfg.method == method
    most = 1 if method == "gan" else 8
    for steps, taken in (("", most), ("--steps 1", 1)):
        run(f"sample --checkpoint {out} --n 10 {steps} --out {tmp_path}/s{taken}{steps[:1]}.png")
        assert f"{method}-{taken}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("s*.png"))) == 2
    refused(f"sample --checkpoint {out} --steps 0 --out {tmp_path}/t.png", capsys, "--steps 0")
    refused(f"sample --checkpoint {out} --w 1 --out {tmp_path}/t.png", capsys, "--w 1")
    refused(f"sample --checkpoint {runs}/g --steps 2 --out {tmp_path}/t.png", capsys, "--steps 2")


def test_a_neighbour_is_measured_at_all_its_steps(runs, tmp_path, capsys):
    out, table = tmp_path / "n", tmp_path / "e.json"
    run(f"train neighbour {SMOKE} --method consistency --steps 4 --out {out}")
    run(f"evaluate {SMOKE} --neighbour {out} --n 20 --out {table}")
    found = json.loads(table.read_text())["measurements"]
    rows = {m["row"] for m in found if m["metric"] == "fd[mnist-cnn]"}
    assert {"consistency-1", "consistency-2", "consistency-4"} <= rows
    times = {m["row"]: m["value"] for m in found if m["metric"] == "nfe"}
    assert times["consistency-1"] == 1 and times["consistency-4"] == 4
    assert table.with_suffix(".png").exists()
    refused(f"evaluate {SMOKE} --neighbour {out} --w 1 --out {tmp_path}/f.json", capsys, "--w 1")
    stream = f"--features mnist-cnn --work {tmp_path}/work --no-timing --out {tmp_path}/s.json"
    run(f"evaluate {SMOKE} --neighbour {out} --n 20 {stream}")  # as photographs are measured
    again = json.loads((tmp_path / "s.json").read_text())["measurements"]
    assert rows <= {m["row"] for m in again if m["metric"] == "fd[mnist-cnn]"}


def test_mistakes_with_neighbours(capsys, tmp_path):
    train = f"train neighbour {SMOKE} --out {tmp_path}/n"
    refused(f"{train} --method osmosis", capsys, "osmosis", "mean-flow")
    coded = f"{train} --method normalizing-flow-matching --forward {tmp_path}/none"
    refused(coded, capsys, "none", "does not exist")
    assert not list(tmp_path.iterdir()), "nothing was written"
