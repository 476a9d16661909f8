"""The training loop: resuming bit for bit, and refusing what cannot work."""

import doctest
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitflow_edu import training
from bitflow_edu.data import load_data
from bitflow_edu.io.checkpoints import read_metrics
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import newest_checkpoint
from bitflow_edu.tarflow import forward_loss
from bitflow_edu.training import (
    TrainConfig,
    batch_indices,
    drop_labels,
    learning_rate,
    step_generator,
    train,
    training_batch,
    update_ema,
)
from conftest import small_flow

CFG = TrainConfig(steps=8, batch_size=16, log_every=1, sample_every=4, checkpoint_every=6, lr=1e-3)


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


def test_minutes_are_a_budget(tmp_path, data, monkeypatch):
    """On a clock where every step takes 1/8 s, 3.75 s are 30 steps and the first one, and the
    schedule ends there."""
    clock = [100.0]
    monkeypatch.setattr("bitflow_edu.training.time.perf_counter", lambda: clock[0])

    def slow(*batch):
        clock[0] += 0.125
        return forward_loss(*batch)

    train(new_flow(), slow, data, replace(CFG, steps=None, minutes=0.0625), tmp_path)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] == 31 and last["seconds"] == 3.75 and last["lr"] < CFG.lr / 10


def test_the_first_step_is_not_on_the_clock(tmp_path, data, monkeypatch):
    """It compiles and loads: a schedule that counted it would skip the warm-up. Nor is that of a
    resumed run."""
    clock, calls = [100.0], []
    monkeypatch.setattr("bitflow_edu.training.time.perf_counter", lambda: clock[0])

    def cold_first(*batch):
        calls.append(1)
        clock[0] += 30.0 if len(calls) in (1, 11) else 0.125
        if len(calls) == 10:
            raise KeyboardInterrupt
        return forward_loss(*batch)

    cfg = replace(CFG, steps=None, minutes=0.0625, log_every=1, checkpoint_every=1, warmup=0.2)
    with pytest.raises(KeyboardInterrupt):
        train(new_flow(), cold_first, data, cfg, tmp_path)
    train(new_flow(), cold_first, data, cfg, tmp_path, resume=True)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[0]["seconds"] == 0 and lines[0]["lr"] == lines[1]["lr"] == 0
    assert lines[2]["lr"] == pytest.approx(CFG.lr * 0.125 / 0.75) and lines[-1]["lr"] < CFG.lr / 10
    assert lines[-1]["step"] == 32 and lines[-1]["seconds"] == 3.75


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


def test_microbatches_are_the_batch_in_its_order(data):
    """The images do not depend on their number, the noise does; a number too large is named."""
    cfg = replace(CFG, batch_size=12, num_microbatches=3, label_dropout=0.0)
    parts = [training_batch(data, cfg, 5, "cpu", k) for k in range(3)]
    whole = training_batch(data, replace(cfg, num_microbatches=1), 5, "cpu")
    assert torch.equal(torch.cat([x for x, _, _ in parts]), whole[0])
    assert torch.equal(torch.cat([c for _, c, _ in parts]), whole[1])
    assert len({g.initial_seed() for _, _, g in parts}) == 3
    with pytest.raises(BitflowError, match="2 images .*3 microbatches"):
        training_batch(data[:2], cfg, 0, "cpu")


def test_the_example_of_train_runs():
    tests = doctest.DocTestFinder().find(train, "train", globs=dict(vars(training)))
    results = [doctest.DocTestRunner(verbose=False).run(test) for test in tests]
    assert sum(r.attempted for r in results) > 0 and all(r.failed == 0 for r in results)


def test_tf32_is_for_gpus_and_for_the_time_of_a_step():
    """Elsewhere, and after it, float32 products are what they were."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    for device, inside in (("cpu", before), ("cuda", True)):
        with training.tf32_products(device):
            assert matmul.allow_tf32 == inside
        assert matmul.allow_tf32 == before


NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # from PyTorch 2.9 on


@pytest.mark.skipif(not NEWER, reason="this PyTorch has the older name only")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tf32_that_was_chosen_by_its_newer_name_stays(device):
    """PyTorch raises where a setting of the one name is read by the other."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with training.tf32_products(device):
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_a_start_that_is_refused_leaves_no_run(tmp_path, data, monkeypatch):
    """Else its own advice, to leave an option off, would meet a folder that has it."""

    def refuse(model, cfg):
        raise BitflowError("no compiler here; leave compile off")

    monkeypatch.setattr(training, "apply_compile_and_checkpointing", refuse)
    with pytest.raises(BitflowError, match="leave compile off"):
        train(new_flow(), forward_loss, data, CFG, tmp_path / "run")
    monkeypatch.undo()
    train(new_flow(), forward_loss, data, replace(CFG, steps=1), tmp_path / "run")


def test_ctrl_c_while_the_last_checkpoint_is_written_is_heard(tmp_path, data, monkeypatch):
    """The training is done, and what would have followed it is not begun."""
    heard, save, waiting = [], training.save_checkpoint, training.WriteBehind.wait

    class Heard(training.StopSignals):
        def __enter__(self):
            heard.append(self)
            return super().__enter__()

    def interrupted(disk):
        heard[0].number = signal.SIGINT
        return waiting(disk)

    def save_the_last(state, folder, writer):
        save(state, folder, writer=writer)
        monkeypatch.setattr(training.WriteBehind, "wait", interrupted)

    monkeypatch.setattr(training, "StopSignals", Heard)
    monkeypatch.setattr(training, "save_checkpoint", save_the_last)
    with pytest.raises(KeyboardInterrupt, match="step 1, the last, is saved in") as stopped:
        train(new_flow(), forward_loss, data, replace(CFG, steps=1), tmp_path / "run")
    assert stopped.value.code == 130 and newest_checkpoint(tmp_path / "run").name[-1] == "1"
