"""The training loop: resuming bit for bit, and refusing what cannot work."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_flow, small_reverse
from safetensors.torch import load_file

from bitflow_edu.config import find_preset
from bitflow_edu.data import BitflowError, DataConfig, Images, asset, load_data
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.tarflow import TARFlow, forward_loss
from bitflow_edu.training import (
    TrainConfig,
    batch_indices,
    drop_labels,
    kept_model,
    learning_rate,
    load_model,
    newest_checkpoint,
    read_metrics,
    save_model,
    step_generator,
    train,
    update_ema,
)

CFG = TrainConfig(steps=8, batch_size=16, log_every=1, sample_every=4, checkpoint_every=3, lr=1e-3)


@pytest.fixture(scope="module")
def data():
    return load_data(DataConfig("mnist-mini", 6))[:200]


def weights(folder):
    return load_file(newest_checkpoint(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def new_flow():
    return small_flow(side=3, patch=2, num_classes=10).train()


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, data):
    train(new_flow(), forward_loss, data, CFG, tmp_path / "whole")
    calls = []

    def stops(model, x, c, generator):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward_loss(model, x, c, generator)

    with pytest.raises(KeyboardInterrupt):
        train(new_flow(), stops, data, CFG, tmp_path / "parts")
    assert newest_checkpoint(tmp_path / "parts").name == "step-00000003"
    train(new_flow(), forward_loss, data, CFG, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [m["step"] for m in parts] == list(range(1, 9))
    assert [m["loss"] for m in whole] == [m["loss"] for m in parts]


def test_kill_9_and_resume(tmp_path):
    """As a user would: start the command, kill it hard in the middle, start it with --resume."""

    def command(name, *more):
        bitflow = Path(sys.executable).with_name("bitflow")
        words = "train forward --preset mnist-mini-smoke --steps 60 --out".split()
        return [bitflow, *words, str(tmp_path / name), *more]

    subprocess.run(command("whole"), check=True, capture_output=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command("parts"), **quiet)
    deadline = time.time() + 120
    while not list((tmp_path / "parts").glob("checkpoints/step-*")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = int(newest_checkpoint(tmp_path / "parts").name[5:])
    assert 0 < stopped_at < 60, "killed in the middle"
    subprocess.run(command("parts", "--resume"), check=True, capture_output=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_run_is_never_overwritten(tmp_path, data):
    run, cfg = tmp_path / "run", replace(CFG, steps=2)
    train(new_flow(), forward_loss, data, cfg, run)
    before = weights(run)
    with pytest.raises(BitflowError, match="--resume"):
        train(new_flow(), forward_loss, data, cfg, run)
    other = replace(CFG, steps=4, lr=1e-4)
    with pytest.raises(BitflowError, match="was made with"):
        train(new_flow(), forward_loss, data, other, run, resume=True)
    assert same(before, weights(run))


def test_nan_stops_with_step_and_checkpoint(tmp_path, data):
    def breaks(model, x, c, generator):
        loss, metrics = forward_loss(model, x, c, generator)
        breaks.step += 1
        return (loss * math.nan if breaks.step == 6 else loss), metrics

    breaks.step = 0
    with pytest.raises(BitflowError, match=r"step 5.*step-00000003") as e:
        train(new_flow(), breaks, data, CFG, tmp_path)
    assert len(str(e.value).splitlines()) <= 2
    assert all(t.isfinite().all() for t in weights(tmp_path).values())


def test_overflow_in_the_gradient_never_reaches_the_weights(tmp_path, data):
    def explodes(model, x, c, generator):
        loss, metrics = forward_loss(model, x, c, generator)
        return loss * 3e38 * 1e30**0.5, metrics

    model = new_flow()
    with pytest.raises(BitflowError, match="step 0"):
        train(model, explodes, data, CFG, tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())


def test_minutes_are_a_budget(tmp_path, data):
    start = time.perf_counter()
    train(new_flow(), forward_loss, data, replace(CFG, steps=None, minutes=0.05), tmp_path)
    assert 2.5 < time.perf_counter() - start < 20
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["seconds"] >= 3.0 and lines[-1]["lr"] < CFG.lr / 10


def test_schedule():
    cfg = replace(CFG, lr=1.0, warmup=0.1)
    assert learning_rate(0, cfg) == 0 and learning_rate(1.0, cfg) < 1e-9
    for progress, rate in ((0.05, 0.5), (0.1, 1), (0.55, 0.5)):
        assert abs(learning_rate(progress, cfg) - rate) < 1e-9


def test_an_epoch_shows_every_image_once():
    seen = torch.cat([batch_indices(64, 16, seed=3, step=s) for s in range(4)])
    assert sorted(seen.tolist()) == list(range(64))
    first, later = batch_indices(64, 16, 3, 0), batch_indices(64, 16, 3, 4)
    assert not torch.equal(first, later), "another order in the next epoch"


def test_labels_are_dropped_at_the_rate_asked_for():
    c = drop_labels(torch.full((10_000,), 7), 0.1, step_generator(0, 0))
    assert set(c.tolist()) == {7, -1} and abs((c == -1).float().mean().item() - 0.1) < 0.015


def test_ema_is_the_average_it_claims():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    old = a.weight.detach().clone()
    update_ema(a, b, 0.9, step=10**6)
    torch.testing.assert_close(a.weight, 0.9 * old + 0.1 * b.weight)


@pytest.mark.parametrize(
    "field,value",
    [("steps", 0), ("steps", -5), ("batch_size", 0), ("lr", -1.0), ("ema", 1.0)]
    + [("precision", "fp16")],
)
def test_bad_training_options(field, value):
    with pytest.raises(BitflowError, match=str(value)):
        replace(CFG, **{field: value})
    with pytest.raises(BitflowError, match="minutes"):
        replace(CFG, minutes=1.0)
    with pytest.raises(BitflowError, match="minutes"):
        replace(CFG, steps=None, minutes=-1.0)


def saved(tmp_path, model=None):
    save_model(model or new_flow(), tmp_path / "m")
    return tmp_path / "m"


def test_models_come_back_as_they_were(tmp_path):
    flow = new_flow()
    folder = saved(tmp_path, flow)
    assert same(load_model(folder, TARFlow).state_dict(), flow.state_dict())
    G = small_reverse(flow, token_states=True)
    save_model(G, tmp_path / "g", dtype=torch.bfloat16)
    back = load_model(tmp_path / "g", ReverseModel)
    assert back.cfg == G.cfg and all(p.dtype == torch.float32 for p in back.parameters())


def test_bad_checkpoints(tmp_path):
    with pytest.raises(BitflowError, match="does not exist"):
        load_model(tmp_path / "none", TARFlow)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BitflowError, match="config.json is missing"):
        load_model(tmp_path / "empty", TARFlow)
    folder = saved(tmp_path)
    with pytest.raises(BitflowError, match="holds a TARFlow, but a ReverseModel"):
        load_model(folder, ReverseModel)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BitflowError, match="no intact safetensors"):
        load_model(folder, TARFlow)
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weights": os.system}))
    with pytest.raises(BitflowError, match="pickles are never loaded"):
        load_model(folder, TARFlow)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BitflowError, match="missing"):
        load_model(folder, TARFlow)
    (folder / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    config["config"]["num_blocks"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitflowError, match="does not fit its config"):
        load_model(folder, TARFlow)
    config["config"]["depth"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitflowError, match="unknown field 'depth'"):
        load_model(folder, TARFlow)
    (folder / "config.json").write_text("{")
    with pytest.raises(BitflowError, match="damaged"):
        load_model(folder, TARFlow)


def test_a_half_written_checkpoint_is_not_seen(tmp_path, data):
    train(new_flow(), forward_loss, data, replace(CFG, steps=3), tmp_path)
    (tmp_path / "checkpoints" / ".step-00000009.part").mkdir()
    (tmp_path / "checkpoints" / ".step-00000009.part" / "config.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "step-00000003"


def test_pictures_are_drawn_while_it_runs(tmp_path):
    from bitflow_edu.pipeline import train_forward

    preset = find_preset("mnist-mini-smoke")
    preset = replace(preset, train_forward=replace(preset.train_forward, steps=4, sample_every=2))
    train_forward(preset, load_data(preset.data)[:100], tmp_path / "run")
    names = [p.name for p in sorted((tmp_path / "run" / "samples").iterdir())]
    assert names == ["step-00000002.png", "step-00000004.png"]
    assert isinstance(load_data(preset.data)[:3], Images)


CHAPTERS = asset("chapters")


@pytest.mark.parametrize("name", sorted(p.parent.name for p in CHAPTERS.glob("*/config.json")))
def test_small_models_of_the_chapters_load_untrained(name, monkeypatch):
    """What a chapter asks for comes with the course; nothing is trained unless RETRAIN says so."""
    monkeypatch.delenv("RETRAIN", raising=False)
    kind = json.loads((CHAPTERS / name / "config.json").read_text())["kind"]
    kind = {"TARFlow": TARFlow, "ReverseModel": ReverseModel}[kind]
    model, log = kept_model(name, kind, lambda folder: pytest.fail("it was trained"))
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert log[-1]["step"] >= 100 and log[-1]["loss"] < log[0]["loss"]
