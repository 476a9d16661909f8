"""A step of training reads nothing of its device, and finds a NaN all the same."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitflow_edu import bijections, coupling, neighbours, training
from bitflow_edu.coupling import uniform_noise_loss
from bitflow_edu.data import Images, load_data
from bitflow_edu.excursions.glow import COUPLING_KINDS, CouplingConfig, CouplingFlow
from bitflow_edu.guidance import guided_run
from bitflow_edu.inverse_strategies import STRATEGIES, needs_token_states, reverse_loss
from bitflow_edu.io import checkpoints, checks
from bitflow_edu.io.checkpoints import read_metrics, read_state
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.locks import LOCK
from bitflow_edu.io.models import build, checkpoints_of, newest_checkpoint
from bitflow_edu.io.progress import FiniteCheck, metrics_for, metrics_wanted
from bitflow_edu.lab.presets import ObjectiveConfig, find_preset
from bitflow_edu.lab.recipes import stage_two_loss
from bitflow_edu.neighbours import (
    Game,
    Neighbour,
    beside,
    codes_of,
    consistency_loss,
    flow_matching_loss,
    gan_loss,
    mean_flow_loss,
)
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.tarflow import TARFlow, forward_loss
from bitflow_edu.training import TrainConfig, new_state, train, training_loop
from conftest import small_flow, small_reverse

CFG = TrainConfig(
    steps=6, batch_size=8, log_every=3, sample_every=100, checkpoint_every=100, precision="fp32"
)
READS = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select")
READS += ("unique_dim", "_unique2")
CHEAP_LOOKS = [(module, "may_read") for module in (bijections, coupling)]
CHEAP_LOOKS.append((neighbours, "free_to_read"))
CHEAP_LOOKS += [(checks, "free_to_read")]
DOORS = ("log_step", "save_checkpoint")  # where values may be read


class Refuse(TorchDispatchMode):
    """Inside, reading a value, or moving it to the CPU, is an error, unless a door is open."""

    def __init__(self):
        super().__init__()
        self.open = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        moved = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        masks = [i for i in args[1] if i is not None] if name == "index" else []
        masked = any(i.dtype == torch.bool for i in masks)
        if not self.open and (name in READS or moved or masked):
            raise AssertionError(f"a step waits for its device: {func}")
        return func(*args, **kwargs)


def open_doors(monkeypatch, refuse):
    """Logging and saving may read; how often they did."""
    passed = []

    def through(name, fn):
        def door(*args, **kwargs):
            passed.append(name)
            refuse.open = True
            try:
                return fn(*args, **kwargs)
            finally:
                refuse.open = False

        return door

    for name in DOORS:
        monkeypatch.setattr(training, name, through(name, getattr(training, name)))
    # labels and times are looked at on a CPU alone, where that is free
    for module, look in CHEAP_LOOKS:
        monkeypatch.setattr(module, look, lambda t: False)
    return passed


def data_of(side):
    return load_data(DataConfig("mnist-mini", side))[:64]


STRATEGY = {name: {"token_states": needs_token_states(name)} for name in STRATEGIES}
OTHERS = {
    "flow matching": flow_matching_loss(),
    "mean flow": mean_flow_loss(),
    "consistency": consistency_loss(0.5),
    "GAN": gan_loss(),
}
CASES = ["F", "F on logits", *STRATEGY, "guided", "guided, detached", "whole loss", *OTHERS]
CASES += ["normalized flow matching", *COUPLING_KINDS]
WITHOUT_STATES = (*OTHERS, "normalized flow matching", *COUPLING_KINDS)


LOSS = dict(features=("digits",), feature_weights=(3.0,), adaptive_power=1.0, normalise=True)


def started(cfg):
    """Images and labels of a first batch."""
    images = data_of(cfg.image_size)[:8]
    return images.x, images.labels


def case_of(name, device="cpu"):
    """A model and its loss: F, G by a strategy, or G with guidance, with F on the same device."""
    flow = small_flow(side=3, patch=2, num_classes=10).to(device)
    if name == "F":
        return flow.train(), forward_loss
    if name == "F on logits":
        flow = build(TARFlow, replace(flow.cfg, logit_alpha=0.05, noise_std=0.0), 0).train()
        forward_loss(flow, *started(flow.cfg), torch.Generator())  # its ActNorm sees a batch
        return flow.to(device), forward_loss
    if name in COUPLING_KINDS:  # their ActNorms start from a batch: the one look, in one step
        cfg = CouplingConfig(name, flow.cfg.image_size, levels=1, steps=2, width=8)
        model = build(CouplingFlow, cfg, 0).train()
        uniform_noise_loss(model, *started(flow.cfg), torch.Generator())
        return model.to(device), uniform_noise_loss
    if name in WITHOUT_STATES:
        model = Neighbour(beside(small_reverse(flow).cfg)).to(device)
        loss = OTHERS.get(name) or flow_matching_loss(codes_of(flow))
        return (Game(model) if name == "GAN" else model), loss
    if name in STRATEGY:
        G = small_reverse(flow, **STRATEGY[name])
        return G.to(device), reverse_loss(flow, STRATEGIES[name])
    if name == "whole loss":  # features, adaptive weights, states of one size
        G = small_reverse(flow).to(device)
        return G, stage_two_loss(flow, G, ObjectiveConfig(**LOSS), str(device))
    detach = name != "guided"
    G = small_reverse(flow, max_guidance=2.0, scale_token=detach)
    return G.to(device), reverse_loss(flow, run=guided_run(detach_unconditional=detach))


def test_the_mode_refuses():
    """The test of the tests: each of these would make a GPU wait."""
    t = torch.ones(2)
    for read in (lambda: t[0].item(), lambda: bool(t[0]), lambda: t[t > 0], lambda: t.unique()):
        with pytest.raises(AssertionError, match="waits"), Refuse():
            read()


# a forward derivative copies tensors to the device that they are on, which `Refuse` cannot tell
@pytest.mark.parametrize("case", [case for case in CASES if case != "mean flow"])
def test_no_step_reads_what_it_computes(case, tmp_path, monkeypatch):
    model, loss = case_of(case)
    refuse, data = Refuse(), data_of(6)
    passed = open_doors(monkeypatch, refuse)
    with refuse:
        train(model, loss, data, CFG, tmp_path)
    assert passed == ["log_step", "log_step", "save_checkpoint"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert ("state_rms_0" in lines[0]) == (case not in WITHOUT_STATES)


def test_the_whole_recipe_reads_nothing_either():
    """w, a decoder, crops and two networks behind it: the twin of imagenet256-b2."""
    pytest.importorskip("diffusers")
    preset = find_preset("imagenet256-b2-smoke")
    flow, G = build(TARFlow, preset.forward, 0), build(ReverseModel, preset.reverse, 1).train()
    loss = stage_two_loss(flow, G, preset.objective, "cpu")
    side, channels = preset.forward.image_size, preset.forward.channels
    x, c = torch.randn(4, channels, side, side), torch.tensor([0, 1, 0, 1])
    for wanted in (False, True):  # where nothing is logged, and where it is
        with metrics_for(wanted), pytest.MonkeyPatch.context() as patch, Refuse():
            for module, look in CHEAP_LOOKS:
                patch.setattr(module, look, lambda t: False)
            loss(G, x, c, torch.Generator().manual_seed(0))[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in G.parameters())


# Glow turns autocast off for its 1×1 convolutions, and the meta device knows none
@pytest.mark.parametrize("case", [case for case in CASES if case != "glow"])
def test_the_loop_runs_where_nothing_can_be_read(case, tmp_path, monkeypatch):
    """On the meta device every `.item()`, `.cpu()` and `bool()` raises by itself."""
    meta, images = torch.device("meta"), data_of(6)
    model, loss = case_of(case, meta)
    data = Images(images.pixels.to(meta), images.labels.to(meta), images.classes)
    for name in DOORS:
        monkeypatch.setattr(training, name, lambda *args, **options: None)
    monkeypatch.setattr(FiniteCheck, "settle", lambda self: self.sent.clear())
    monkeypatch.setattr(training, "step_generator", lambda *args: torch.Generator())
    monkeypatch.setattr(training, "autocast", lambda *args: nullcontext())
    cfg = replace(CFG, steps=2)
    state = new_state(model, cfg)
    training_loop(state, loss, data, cfg, tmp_path, None, None, None)
    assert state.step == 2


def test_by_a_clock_the_last_line_is_foreseen():
    """Two steps wide: a step takes 2 seconds here, and a minute is full after 30."""
    cfg = replace(CFG, steps=None, minutes=1.0)
    state = new_state(small_flow(), cfg)
    wanted = []
    for state.step in range(30):
        state.seconds = 2.0 * state.step
        if training.will_log(state, cfg):
            wanted.append(state.step + 1)
    assert wanted == [*range(3, 28, 3), 29, 30]


def test_norms_of_states_are_worked_out_where_a_line_is_due():
    model, asked = small_flow(side=3, patch=2, num_classes=10).train(), []

    def loss(model, *batch):
        value, metrics = forward_loss(model, *batch)
        asked.append((metrics_wanted(), "state_rms_0" in metrics))
        return value, metrics

    state, data = new_state(model, CFG), data_of(6)
    for _ in range(4):
        _, metrics = training.forward_backward(state, loss, data, CFG)
        training.clip_and_step(state, _, CFG)
        assert bool(metrics) == (state.step == 2)
        state.step += 1
    assert asked == [(False, False)] * 2 + [(True, True), (False, False)]
    with metrics_for(False):
        assert not metrics_wanted()
    assert metrics_wanted()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_weights_survive_a_step_that_is_not_finite(broken, fused):
    """An optimiser without a fused kernel, as on an Apple GPU, is asked to wait instead."""
    state = new_state(small_flow(side=3, patch=2, num_classes=10).train(), CFG)
    if not fused:
        state.optimizer = torch.optim.AdamW(state.model.parameters(), fused=False)
    before = [p.detach().clone() for p in state.model.parameters()]
    for p in state.model.parameters():
        p.grad = torch.full_like(p, math.nan if broken == "gradient" else 1.0)
    loss = torch.tensor(math.inf if broken == "loss" else 1.0)
    training.clip_and_step(state, loss, CFG)
    assert all(torch.equal(p, q) for p, q in zip(state.model.parameters(), before))


@pytest.mark.parametrize("broken", [2, 3, 5])
@pytest.mark.parametrize("every", [1, 2, 4, 100])
def test_a_nan_is_named_and_never_written(broken, every, tmp_path):
    """Read one step late, but before anything is saved; the weights are as they were."""
    model, calls = small_flow(side=3, patch=2, num_classes=10).train(), []

    def breaks(model, *batch):
        loss, metrics = forward_loss(model, *batch)
        calls.append(1)
        return (loss * math.nan if len(calls) == broken + 1 else loss), metrics

    cfg = replace(CFG, log_every=every, checkpoint_every=every)
    with pytest.raises(BitflowError, match=f"step {broken}: loss nan"):
        train(model, breaks, data_of(6), cfg, tmp_path)
    assert len(calls) <= broken + 2, "at most one step later"
    saved = [int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step-*")]
    assert all(step <= broken for step in saved)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["step"] <= broken for line in lines)
    assert all(p.isfinite().all() for p in model.parameters())


def saves_every_two_steps(monkeypatch, tmp_path, write):
    """A training of six steps with checkpoints after every two, written by another function."""
    real = checkpoints.write_checkpoint
    monkeypatch.setattr(checkpoints, "write_checkpoint", partial(write, real))
    cfg = replace(CFG, checkpoint_every=4)
    model = small_flow(side=3, patch=2, num_classes=10).train()
    train(model, forward_loss, data_of(6), cfg, tmp_path / "run")
    return read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_a_checkpoint_is_written_while_steps_are_computed(monkeypatch, tmp_path):
    """The first write waits for a later step: without a thread it would wait forever."""
    went_on, written = threading.Event(), []
    real_step = training.forward_backward

    def step(state, *args):
        if state.step == 3:
            went_on.set()
        return real_step(state, *args)

    def write(real, model, saved, folder, keep):
        assert saved["step"] > 2 or went_on.wait(60), "training stood still"
        written.append(saved["step"])
        return real(model, saved, folder, keep)

    monkeypatch.setattr(training, "forward_backward", step)
    saves_every_two_steps(monkeypatch, tmp_path, write)
    assert written == [2, 4, 6]
    steps = [read_state(folder)["step"] for folder in checkpoints_of(tmp_path / "run")]
    assert steps == [4, 6], "whole, the newest two; training did not change what was copied"
    straight = small_flow(side=3, patch=2, num_classes=10).train()
    train(straight, forward_loss, data_of(6), replace(CFG, steps=6), tmp_path / "straight")
    a, b = (newest_checkpoint(tmp_path / name) for name in ("run", "straight"))
    for kind in ("averaged", "training"):
        one, other = read_state(a)[kind], read_state(b)[kind]
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_slow_disk_holds_training_up_before_more_steps_are_at_stake(monkeypatch, tmp_path):
    """At each moment a kill would lose the steps since the newest whole checkpoint, at most 4."""
    interval, at_stake, real_step = 2, [], training.forward_backward

    def step(state, *args):
        folders = checkpoints_of(tmp_path / "run")
        at_stake.append(state.step - (read_state(folders[-1])["step"] if folders else 0))
        return real_step(state, *args)

    def write(real, model, saved, folder, keep):
        ends = time.monotonic() + 60
        while len(at_stake) < min(saved["step"] + interval, 6) and time.monotonic() < ends:
            time.sleep(0.01)  # until training has gone as far as it may meanwhile
        time.sleep(0.2)  # it would go on now, if it were not held up
        return real(model, saved, folder, keep)

    monkeypatch.setattr(training, "forward_backward", step)
    saves_every_two_steps(monkeypatch, tmp_path, write)
    assert at_stake == [0, 1, 2, 3, 2, 3], "begun with fewer than 4 at stake"


@pytest.mark.parametrize("at", [2, 6])
def test_a_write_that_failed_is_told_at_the_next_one_or_at_the_end(monkeypatch, tmp_path, at):
    def write(real, model, saved, folder, keep):
        if saved["step"] == at:
            raise BitflowError("the disk is full")
        return real(model, saved, folder, keep)

    with pytest.raises(BitflowError, match="the disk is full"):
        saves_every_two_steps(monkeypatch, tmp_path, write)
    steps = [read_state(folder)["step"] for folder in checkpoints_of(tmp_path / "run")]
    assert steps == ([] if at == 2 else [2, 4])
    assert not (tmp_path / "run" / LOCK).exists()


KILLED = """
import os, signal, sys, time
sys.path[:0] = [{tests!r}]
import torch
from bitflow_edu.io import checkpoints
from test_training_waits import CFG, data_of, forward_loss, replace, small_flow, train
real = checkpoints.write_state
def write_state(model, saved, folder):
    if saved["step"] == 4 and "--kill" in sys.argv:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)  # in the thread, while step 5 or 6 is computed
    real(model, saved, folder)
checkpoints.write_state = write_state
model = small_flow(side=3, patch=2, num_classes=10).train()
cfg = replace(CFG, checkpoint_every=4, steps=6)
train(model, forward_loss, data_of(6), cfg, sys.argv[1], resume="--resume" in sys.argv)
"""


def test_killed_while_it_writes_it_loses_no_older_checkpoint(tmp_path):
    """kill -9 inside the write of step 4: step 2 is whole, and goes on to the very same end."""
    script = tmp_path / "train.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))

    def start(folder, *options):
        command = [sys.executable, str(script), str(folder), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    assert start(tmp_path / "run", "--kill").returncode == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "run").name == "step-00000002"
    for done in (start(tmp_path / "run", "--resume"), start(tmp_path / "whole")):
        assert done.returncode == 0, done.stderr[-2000:]
    a, b = (read_state(newest_checkpoint(tmp_path / name)) for name in ("run", "whole"))
    assert a["step"] == b["step"] == 6
    for kind in ("averaged", "training"):
        assert all(torch.equal(a[kind][k], b[kind][k]) for k in b[kind])
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "what was half is gone"
