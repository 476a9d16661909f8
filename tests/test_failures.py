"""What goes wrong in a long run: kills, a full disk, checkpoints of other versions.

The last good checkpoint survives all of it.
"""

import errno
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import small_flow
from safetensors.torch import load_file, save_file

from bitflow_edu import training
from bitflow_edu.data import BitflowError
from bitflow_edu.tarflow import TARFlow, forward_loss
from bitflow_edu.training import (
    TrainConfig,
    checkpoints_of,
    load_model,
    newest_checkpoint,
    read_metrics,
    read_state,
    train,
)

CFG = TrainConfig(steps=8, batch_size=16, log_every=1, checkpoint_every=3, precision="fp32")

KILLED = """
import os, sys
import torch
torch.set_num_threads(1)
from bitflow_edu.data import DataConfig, load_data
from bitflow_edu.tarflow import TARFlow, TARFlowConfig, forward_loss
from bitflow_edu.training import TrainConfig, train
from bitflow_edu.transformer import TransformerConfig

data = load_data(DataConfig("mnist-mini", 8))[:100]

def run(folder, die_at):
    def loss(model, x, c, generator):
        seen.append(c)
        if len(seen) == die_at:
            os.kill(os.getpid(), 9)
        return forward_loss(model, x, c, generator)
    seen = []
    torch.manual_seed(0)
    tiny = TransformerConfig(width=16, head_dim=8, num_layers=1)
    model = TARFlow(TARFlowConfig(image_size=8, num_blocks=2, transformer=tiny))
    cfg = TrainConfig(steps=120, batch_size=16, checkpoint_every=7, log_every=1, precision="fp32")
    train(model, loss, data, cfg, folder, resume=True)

for die_at in map(int, sys.argv[2:]):
    child = os.fork()
    if not child:
        run(sys.argv[1], die_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), end=" ")
"""


def killed_at(folder, steps):
    """One training, in processes each killed some steps after it took up; how they ended."""
    (folder / "s.py").write_text(KILLED)
    command = [sys.executable, folder / "s.py", folder / "run", *map(str, steps)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    return done.stdout.split(), folder / "run"


def curve(run):
    return [(m["step"], m["loss"]) for m in read_metrics(run / "metrics.jsonl")]


def test_killed_twenty_times(tmp_path):
    """kill -9 at 20 random steps: tensors and logged losses are those of the unbroken run."""
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    _, whole = killed_at(tmp_path / "whole", [10**9])
    steps = [random.Random(0).randint(1, 12) for _ in range(20)]
    codes, parts = killed_at(tmp_path / "parts", [*steps, 10**9])
    assert codes[:20].count("-9") >= 15 and codes[-1] == "0", f"most hit an unfinished run: {codes}"
    a, b = (read_state(newest_checkpoint(run)) for run in (whole, parts))
    assert a["step"] == b["step"] == 120
    for kind in ("averaged", "training"):
        assert all(torch.equal(a[kind][k], b[kind][k]) for k in a[kind])
    assert curve(whole) == curve(parts)


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
@pytest.mark.parametrize("what", ["save_file", "write_atomically"])
def test_a_disk_that_fails_later(tmp_path, data, monkeypatch, code, says, what):
    """It stops with the reason; the checkpoint of step 3 is whole, and the run goes on from it."""
    real, calls = getattr(training, what), []

    def fails(*args, **kwargs):
        calls.append(args)
        if any(".step-00000006" in str(a) for a in args):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(training, what, fails)
    with pytest.raises(BitflowError, match=f"{says}.*make room, or name another folder"):
        train(flow(), forward_loss, data, CFG, tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run").name == "step-00000003"
    load_model(tmp_path / "run", TARFlow)
    monkeypatch.setattr(training, what, real)
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
        train(flow(), forward_loss, data, CFG, training.Path("/proc/nobody/run"))


def test_a_run_of_an_older_version_goes_on(tmp_path, data):
    """What an old run.json does not say (pieces, compile, checkpointing) was the default."""
    train(flow(), forward_loss, data, CFG, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    run = json.loads(path.read_text())
    for new in ("pieces", "compile", "checkpointing"):
        del run["train"][new]
    path.write_text(json.dumps(run))
    newest = newest_checkpoint(tmp_path / "run")
    training.discard(newest)
    train(flow(), forward_loss, data, CFG, tmp_path / "run", resume=True)
    assert newest_checkpoint(tmp_path / "run") == newest
    run["train"]["pieces"] = 4
    path.write_text(json.dumps(run))
    with pytest.raises(BitflowError, match="made with train.pieces = 4, not 1"):
        train(flow(), forward_loss, data, CFG, tmp_path / "run", resume=True)


def test_a_checkpoint_of_another_version(tmp_path, data):
    """An unknown field or weight is named, with what to do; the checkpoint before it is whole."""
    train(flow(), forward_loss, data, CFG, tmp_path / "run")
    newest, before = checkpoints_of(tmp_path / "run")[::-1][:2]
    path = newest / "training_state.safetensors"
    save_file({**load_file(path), "weights.blocks.0.new_part": torch.zeros(2)}, path)
    says = f"(?s)new_part should have shape None, the file has.*Delete {newest} to go on from"
    with pytest.raises(BitflowError, match=f"{says} the one before"):
        train(flow(), forward_loss, data, CFG, tmp_path / "run", resume=True)
    config = json.loads((newest / "config.json").read_text())
    config["config"]["wings"] = 2
    (newest / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitflowError, match="unknown field 'wings'; TARFlowConfig has"):
        load_model(newest, TARFlow)
    load_model(before, TARFlow)


def test_a_run_folder_says_how_to_repeat_it(tmp_path):
    """Config, versions, commit, machine and command are there; the YAML starts the same run."""
    from bitflow_edu.cli import main

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
