"""Run folders: what goes wrong in a long run, and that the last good checkpoint survives it."""

import copy
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitflow_edu.cli.main import main
from bitflow_edu.io import checkpoints, models
from bitflow_edu.io.checkpoints import MetricsLog, load_or_train, open_run, read_metrics, read_state
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.locks import LOCK
from bitflow_edu.io.models import checkpoints_of, load_model, newest_checkpoint
from bitflow_edu.io.results import load_result
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.lab.recipes import train_forward
from bitflow_edu.neighbours import Neighbour
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.tarflow import TARFlow, forward_loss
from bitflow_edu.training import TrainConfig, microbatch_indices, new_state, train
from conftest import small_flow

CFG = TrainConfig(steps=8, batch_size=16, log_every=1, checkpoint_every=6, precision="fp32")

KILLED = """
import os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from bitflow_edu.io import checkpoints
from bitflow_edu.data import load_data
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.models import checkpoints_of
from bitflow_edu.tarflow import TARFlow, TARFlowConfig, forward_loss
from bitflow_edu.training import TrainConfig, new_state, train
from bitflow_edu.transformer import TransformerConfig

data = load_data(DataConfig("mnist-mini", 8))[:100]
quick = checkpoints.write_state

def newest(folder):
    return max((int(p.name[5:]) for p in checkpoints_of(folder)), default=0)

def write_slowly(*args):  # a disk that needs more time than the steps until the next write
    time.sleep(0.4)
    quick(*args)

def run(folder, die_at):
    def loss(model, x, c, generator):
        seen.append(c)
        if len(seen) == abs(die_at):
            print(began + len(seen) - 1 - newest(folder), flush=True)
            os.kill(os.getpid(), 9)
        return forward_loss(model, x, c, generator)
    checkpoints.write_state = write_slowly if die_at < 0 else quick
    seen, began = [], newest(folder)
    torch.manual_seed(0)
    tiny = TransformerConfig(width=16, head_dim=8, num_layers=1)
    model = TARFlow(TARFlowConfig(image_size=8, num_blocks=2, transformer=tiny))
    cfg = TrainConfig(steps=120, batch_size=16, checkpoint_every=14, log_every=1, precision="fp32")
    train(model, loss, data, cfg, folder, resume=True)

for die_at in map(int, sys.argv[2:]):
    child = os.fork()
    if not child:
        run(Path(sys.argv[1]), die_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != -9:
        print("failed" if code else "ended", flush=True)
"""


def killed_at(folder, steps):
    """One training, in processes each killed some steps after it took up: how many steps each
    kill lost, or "ended". A negative number of steps: on a slow disk."""
    (folder / "s.py").write_text(KILLED)
    command = [sys.executable, folder / "s.py", folder / "run", *map(str, steps)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split(), folder / "run"


def curve(run):
    return [(m["step"], m["loss"]) for m in read_metrics(run / "metrics.jsonl")]


def test_kills_of_every_kind_of_work_are_on_record():
    """What `tests/kills.py` found: F, G, an evaluation and a cache of latents, killed at random."""
    found = {(m["row"], m["metric"]): m["value"] for m in load_result("kills")["measurements"]}
    works = ("forward", "reverse", "evaluate", "cache-latents")
    assert sum(found[work, "kills"] for work in works) == 20
    for work in works:
        assert found[work, "kills"] >= 4 and found[work, "values"] >= 50
        assert found[work, "differing_values"] == 0
    assert all(0 < found[stage, "steps_lost_at_most"] <= 14 for stage in works[:2])


def test_killed_twenty_times(tmp_path):
    """kill -9 at 20 random steps: tensors and logged losses are those of the unbroken run."""
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    _, whole = killed_at(tmp_path / "whole", [10**9])
    draw = random.Random(0)
    steps = [draw.randint(1, 12) for _ in range(20)]
    lost, parts = killed_at(tmp_path / "parts", [*steps, 10**9])
    hits = sum(n.isdigit() for n in lost[:20])
    assert hits >= 15 and lost[-1] == "ended", f"most hit an unfinished run: {lost}"
    a, b = (read_state(newest_checkpoint(run)) for run in (whole, parts))
    assert a["step"] == b["step"] == 120
    for kind in ("averaged", "training"):
        assert all(torch.equal(a[kind][k], b[kind][k]) for k in a[kind])
    assert curve(whole) == curve(parts)


def test_a_kill_loses_at_most_checkpoint_every_steps(tmp_path):
    """kill -9 also while a slow disk still writes: 14 steps at most, though a write takes longer
    than the 7 steps between two checkpoints."""
    draw = random.Random(0)
    steps = [-draw.randint(6, 30) for _ in range(12)]
    lost, run = killed_at(tmp_path, [*steps, 10**9])
    assert lost.pop() == "ended" and newest_checkpoint(run).name == "step-00000120"
    lost = [int(n) for n in lost if n != "ended"]
    assert len(lost) >= 6 and 7 < max(lost) <= 14, lost


def flow():
    torch.manual_seed(0)
    return small_flow(side=8, patch=2, num_classes=10).train()


@pytest.fixture
def data(digits):
    return digits[:40]


@pytest.mark.parametrize(
    "code, says",
    [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")],
)
@pytest.mark.parametrize(
    "home, what",
    [(models, "save_file"), (models, "write_atomically"), (checkpoints, "write_atomically")],
)
def test_a_disk_that_fails_later(tmp_path, data, monkeypatch, code, says, home, what):
    """It stops with the reason; the checkpoint of step 3 is whole, and the run goes on from it."""
    real, calls = getattr(home, what), []

    def fails(*args, **kwargs):
        calls.append(args)
        if any(".step-00000006" in str(a) for a in args):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(home, what, fails)
    with pytest.raises(BitflowError, match=f"{says}.*make room, or name another folder"):
        train(flow(), forward_loss, data, CFG, tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run").name == "step-00000003"
    load_model(tmp_path / "run", TARFlow)
    monkeypatch.setattr(home, what, real)
    train(flow(), forward_loss, data, CFG, tmp_path / "run", resume=True)
    train(flow(), forward_loss, data, CFG, tmp_path / "whole")
    a, b = (
        load_file(newest_checkpoint(tmp_path / n) / "model.safetensors") for n in ("run", "whole")
    )
    assert all(torch.equal(a[k], b[k]) for k in a) and not list(
        (tmp_path / "run" / "checkpoints").glob(".*")
    )


def test_an_output_that_cannot_be_written(data):
    """/proc takes no folders: nobody, not even root, can write there."""
    with pytest.raises(BitflowError, match="cannot write to /proc/nobody"):
        train(flow(), forward_loss, data, CFG, Path("/proc/nobody/run"))


def test_a_run_of_an_older_version_goes_on(tmp_path, data):
    """What an old run.json does not say (pieces, compile, checkpointing) was the default."""
    train(flow(), forward_loss, data, CFG, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    run = json.loads(path.read_text())
    for new in ("num_microbatches", "compile", "activation_checkpointing"):
        del run["train"][new]
    path.write_text(json.dumps(run))
    newest = newest_checkpoint(tmp_path / "run")
    checkpoints.discard(newest)
    train(flow(), forward_loss, data, CFG, tmp_path / "run", resume=True)
    assert newest_checkpoint(tmp_path / "run") == newest
    run["train"]["num_microbatches"] = 4  # fewer pieces
    path.write_text(json.dumps(run))
    with pytest.raises(BitflowError, match="made with train.num_microbatches = 4, not 1"):
        train(flow(), forward_loss, data, CFG, tmp_path / "run", resume=True)


def test_a_resumed_run_may_have_more_pieces_and_says_so(tmp_path, data):
    """For more processes than there were pieces; the images of a batch stay the same."""
    run, more = tmp_path / "run", replace(CFG, num_microbatches=2)
    train(flow(), forward_loss, data, CFG, run)
    checkpoints.discard(newest_checkpoint(run))
    train(flow(), forward_loss, data, more, run, resume=True)
    (change,) = json.loads((run / "run.json").read_text())["changes"]
    assert "num_microbatches" in json.dumps(change)
    pieces = [microbatch_indices(data, more, 3, m) for m in range(2)]
    assert torch.equal(torch.cat(pieces), microbatch_indices(data, CFG, 3, 0))
    with pytest.raises(BitflowError, match="num_microbatches = 2, not 1"):
        train(flow(), forward_loss, data, CFG, run, resume=True)


def test_a_checkpoint_of_another_version(tmp_path, data):
    """An unknown field or weight is named, with what to do; the checkpoint before it is whole."""
    train(flow(), forward_loss, data, CFG, tmp_path / "run")
    newest, before = checkpoints_of(tmp_path / "run")[::-1][:2]
    path = newest / "training_state.safetensors"
    save_file({**load_file(path), "weights.blocks.0.new_part": torch.zeros(2)}, path)
    says = f"(?s)new_part should be nothing, the file has.*Delete {newest} to go on from"
    with pytest.raises(BitflowError, match=f"{says} the one before"):
        train(flow(), forward_loss, data, CFG, tmp_path / "run", resume=True)
    config = json.loads((newest / "config.json").read_text())
    config["config"]["wings"] = 2
    (newest / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitflowError, match="unknown field 'wings'; TARFlowConfig has"):
        load_model(newest, TARFlow)
    load_model(before, TARFlow)


MOMENT = "adam.exp_avg.blocks.0.proj_in.weight"
STEP = "adam.step.blocks.1.proj_in.bias"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, digits):
    """A run of three steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train(flow(), forward_loss, digits[:40], replace(CFG, steps=3), run)
    return run


def without(name):
    return lambda tensors: {k: t for k, t in tensors.items() if k != name}


def changed(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


@pytest.mark.parametrize(
    "name, damage",
    [
        (MOMENT, changed(MOMENT, lambda t: t[:, :1].contiguous())),  # fused kernels trust sizes
        (MOMENT, changed(MOMENT, lambda t: t.flatten()[:0])),
        (MOMENT, changed(MOMENT, lambda t: t.half())),
        (MOMENT, changed(MOMENT, lambda t: t.long())),
        (MOMENT, changed(MOMENT, lambda t: t * math.nan)),
        (MOMENT, without(MOMENT)),
        (STEP, without(STEP)),
        (STEP, changed(STEP, lambda t: t.expand(2).contiguous())),
        (STEP, changed(STEP, lambda t: -t)),
        ("adam.exp_avg.nobody", lambda t: {**t, "adam.exp_avg.nobody": torch.zeros(2)}),
        ("speed.of.light", lambda t: {**t, "speed.of.light": torch.zeros(2)}),
        ("proj_in.weight should be", without("weights.blocks.0.proj_in.weight")),
        (
            MOMENT,
            lambda t: {k: v for k, v in t.items() if "adam" not in k or "0.proj_in.w" not in k},
        ),
    ],
)
def test_every_tensor_of_the_optimizer_fits_its_weight(stopped, name, damage):
    """Another shape or type, one too many, one missing, or all three: named, nothing is put in."""
    path = newest_checkpoint(stopped) / "training_state.safetensors"
    whole = path.read_bytes()
    save_file(damage(load_file(path)), path)
    state = new_state(flow(), CFG)
    before = copy.deepcopy(state.model.state_dict())
    try:
        with pytest.raises(BitflowError, match=name):
            checkpoints.restore(state, newest_checkpoint(stopped))
    finally:
        path.write_bytes(whole)
    assert not state.optimizer.state
    assert all(torch.equal(before[k], t) for k, t in state.model.state_dict().items())
    checkpoints.restore(state, newest_checkpoint(stopped))


def test_moments_lie_in_memory_as_their_weights_do(digits, tmp_path):
    """A coupling flow's weights are channels-last: moments in another order are others' moments."""
    preset = find_preset("mnist-glow-smoke")
    cfg = replace(preset.train_forward, steps=4, checkpoint_every=4, batch_size=8, lr=1e-2)
    preset = replace(preset, train_forward=cfg)
    train_forward(preset, digits[:40], tmp_path / "run")
    whole = read_state(newest_checkpoint(tmp_path / "run"))["training"]
    checkpoints.discard(newest_checkpoint(tmp_path / "run"))
    train_forward(preset, digits[:40], tmp_path / "run", resume=True)
    again = read_state(newest_checkpoint(tmp_path / "run"))["training"]
    assert [k for k in whole if not torch.equal(whole[k], again[k])] == []


def test_diverged_weights_are_no_good_checkpoint(tmp_path, data):
    """Finite as AdamW made them, and of no use: the checkpoint before them stays the newest."""
    cfg = replace(CFG, lr=1e6, warmup=0.2, checkpoint_every=1)
    with pytest.raises(BitflowError, match="(?s)diverged.*Last good.*step-00000001.*--init-from"):
        train(flow(), forward_loss, data, cfg, tmp_path / "run")
    (good,) = checkpoints_of(tmp_path / "run")
    assert all(t.abs().max() < 100 for t in load_file(good / "model.safetensors").values())
    for bad in (math.nan, math.inf, -1e5):
        assert "w reaches" in checkpoints.sign_of_divergence({}, {"w": torch.tensor([1.0, bad])})
    assert checkpoints.sign_of_divergence({"w": torch.ones(3), "n": torch.tensor(10**9)}) is None


@pytest.fixture
def heard():
    """Signals are not ignored, as a program that runs in the background may inherit it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_first(tmp_path, data, number, heard):
    """The step under way is finished and saved, and going on gives the unbroken run's weights."""
    calls = []

    def loss(*batch):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return forward_loss(*batch)

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="step 5 is saved in .*step-00000005") as e:
        train(flow(), loss, data, CFG, tmp_path / "run")
    assert e.value.code == 128 + number and signal.getsignal(number) == handler
    assert newest_checkpoint(tmp_path / "run").name == "step-00000005" and len(calls) == 5
    train(flow(), forward_loss, data, CFG, tmp_path / "run", resume=True)
    train(flow(), forward_loss, data, CFG, tmp_path / "whole")
    a, b = (read_state(newest_checkpoint(tmp_path / name))["training"] for name in ("run", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_second_signal_ends_at_once(tmp_path, data, heard):
    def loss(*batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one was waited with")

    with pytest.raises(KeyboardInterrupt) as e:
        train(flow(), loss, data, CFG, tmp_path / "run")
    assert not hasattr(e.value, "code") and checkpoints_of(tmp_path / "run") == []
    assert not (tmp_path / "run" / LOCK).exists()


def test_what_a_resumed_run_may_change(tmp_path, data):
    """More steps and other intervals; run.json says what was before. Fewer steps are refused."""
    run = tmp_path / "run"
    train(flow(), forward_loss, data, replace(CFG, steps=3), run)
    longer = replace(CFG, steps=5, log_every=2, checkpoint_every=1)
    train(flow(), forward_loss, data, longer, run, resume=True)
    assert newest_checkpoint(run).name == "step-00000005"
    found = json.loads((run / "run.json").read_text())
    assert found["train"]["steps"] == 5 and found["train"]["log_every"] == 2
    assert found["changes"] == [{"after": 3, "log_every": 1, "checkpoint_every": 6, "steps": 3}]
    train(flow(), forward_loss, data, longer, run, resume=True)
    assert json.loads((run / "run.json").read_text()) == found, "nothing was changed"
    minutes = replace(longer, steps=None, minutes=9.0)
    for other, says in ((replace(longer, steps=4), "steps = 5, not 4"), (minutes, "= None, not 9")):
        with pytest.raises(BitflowError, match=says):
            train(flow(), forward_loss, data, other, run, resume=True)


def test_files_of_a_run_that_are_damaged(tmp_path, stopped):
    """A list or null where an object belongs, counters that count nothing: named, no traceback."""
    run = shutil.copytree(stopped, tmp_path / "run")
    for text in ("[]", "null", "3", '{"train": []}', '{"model": null}', "", "[" * 9999):
        (run / "run.json").write_text(text)
        with pytest.raises(BitflowError, match="run.json"):
            open_run(run, {"train": {}, "model": {}}, resume=True)
    path = newest_checkpoint(run) / "training_state.json"
    bad_steps = [(step, 1) for step in ("Infinity", -1, "true", "1.0", 10**400, "null")]
    for step, seconds in [*bad_steps, (3, "NaN"), (3, -1), (3, "true")]:
        path.write_text(f'{{"step": {step}, "seconds": {seconds}}}')
        with pytest.raises(BitflowError, match="training_state.json"):
            read_state(newest_checkpoint(run))
    bad_steps = [f'{{"step": {step}}}' for step, _ in bad_steps]
    for text in [*bad_steps, "[]", "null", "{}", '"step"']:
        (run / "metrics.jsonl").write_text(f'{{"step": 1}}\n{text}\n')
        with pytest.raises(BitflowError, match="metrics.jsonl"):
            MetricsLog(run / "metrics.jsonl", 3)


def test_a_run_folder_says_how_to_repeat_it(tmp_path):
    """Config, versions, commit, machine and command are there; the YAML starts the same run."""
    first, again, words = (
        tmp_path / "f",
        tmp_path / "again",
        ["train", "forward", "--device", "cpu"],
    )
    smoke = [*words, "--preset", "mnist-mini-smoke", "--steps", "2", "--out", str(first)]
    assert main(smoke) == 0
    assert main([*smoke, "--resume"]) == 0
    starts = [json.loads(line) for line in (first / "starts.jsonl").read_text().splitlines()]
    assert [s["step"] for s in starts] == [0, 2]
    for start in starts:
        assert {"command", "commit", "versions", "hardware", "date"} <= start.keys()
    assert main([*words, "--config", str(first / "preset.yaml"), "--out", str(again)]) == 0
    a, b = (load_file(newest_checkpoint(run) / "model.safetensors") for run in (first, again))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_is_compared_before_it_goes_on(tmp_path):
    run, settings = tmp_path / "run", {"train": {"steps": 10, "lr": 0.1}, "model": {"width": 8}}
    assert open_run(run, settings, resume=False) is None
    before = (run / "run.json").read_text()
    assert open_run(run, settings, resume=True) is None
    with pytest.raises(BitflowError, match="run exists already"):
        open_run(run, settings, resume=False)
    for part, changed in (
        ("train.lr = 0.1", {"train": {"steps": 10, "lr": 0.2}}),
        ("model.width = 8", {"model": {"width": 9}}),
    ):
        with pytest.raises(BitflowError, match=f"{run}.*{part}, not"):
            open_run(run, {**settings, **changed}, resume=True)
    assert (run / "run.json").read_text() == before
    (run / "run.json").write_text("{")
    with pytest.raises(BitflowError, match="run.json.*damaged"):
        open_run(run, settings, resume=True)
    (run / "run.json").unlink()
    (run / "photograph.jpg").write_text("")
    with pytest.raises(BitflowError, match="no run.json"):
        open_run(run, settings, resume=True)


def test_metrics_drop_what_is_newer_than_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 3.0}\n{"step": 20, "loss": 2.0}\n{"step": 30, "lo')
    assert [m["step"] for m in read_metrics(path)] == [10, 20]
    log = MetricsLog(path, step=10)
    log.write(step=20, loss=2.5)
    log.close()
    assert [m["loss"] for m in read_metrics(path)] == [3.0, 2.5]
    path.write_text('{"step": 10\n{"step": 20}\n')
    with pytest.raises(BitflowError, match="metrics.jsonl is damaged"):
        read_metrics(path)
    with pytest.raises(BitflowError, match="none.jsonl"):
        read_metrics(tmp_path / "none.jsonl")


CHAPTERS = asset("chapters")
FLAT = ("18-gan", "18-mean-flow", "18-improved-mean-flow")  # a game; losses divided by their size


@pytest.mark.parametrize("name", sorted(p.parent.name for p in CHAPTERS.glob("*/config.json")))
def test_small_models_of_the_chapters_load_untrained(name, monkeypatch):
    """What a chapter asks for comes with the course; nothing is trained unless RETRAIN says so."""
    monkeypatch.delenv("RETRAIN", raising=False)
    kind = json.loads((CHAPTERS / name / "config.json").read_text())["kind"]
    kind = {k.__name__: k for k in (TARFlow, ReverseModel, Neighbour)}[kind]
    model, log = load_or_train(name, kind, lambda folder: pytest.fail("it was trained"))
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert log[-1]["step"] >= 100 and (name in FLAT or log[-1]["loss"] < log[0]["loss"])


def test_small_models_are_trained_where_asked(tmp_path, data, monkeypatch):
    def fit(folder):
        return train(flow(), forward_loss, data, CFG, folder)

    monkeypatch.setenv("RETRAIN", str(tmp_path))
    kept, log = load_or_train("try", TARFlow, fit)
    assert [m["step"] for m in log] == list(range(1, 9)) and (tmp_path / "try").is_dir()
    with pytest.raises(BitflowError, match="try exists already"):
        load_or_train("try", TARFlow, fit)
    monkeypatch.setenv("RETRAIN", "1")
    trained, again = load_or_train("try", TARFlow, fit)
    assert [m["loss"] for m in again] == [m["loss"] for m in log]
    for p, q in zip(trained.state_dict().values(), kept.state_dict().values()):
        torch.testing.assert_close(p, q, atol=1e-2, rtol=1e-2)  # matrices in bytes
    monkeypatch.delenv("RETRAIN")
    with pytest.raises(BitflowError, match="'try'"):
        load_or_train("try", TARFlow, fit)
