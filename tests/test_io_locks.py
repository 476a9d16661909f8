"""Locks of run folders: one command at a time, and none that a dead process holds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.locks import LOCK, mark_of, run_lock, take_lock
from bitflow_edu.tarflow import forward_loss
from bitflow_edu.training import TrainConfig, train
from conftest import small_flow

CFG = TrainConfig(steps=2, batch_size=8, precision="fp32")


def test_one_training_a_folder(tmp_path, digits):
    """A lock of a live process refuses; it goes with the training, with errors, and with death."""
    run, data = tmp_path / "run", digits[:40]
    lock = run / LOCK

    def flow():
        return small_flow(side=8, patch=2, num_classes=10).train()

    def fails(*batch):
        with pytest.raises(BitflowError, match=f"in use.*process {os.getpid()}"):
            train(flow(), forward_loss, data, CFG, run, resume=True)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        train(flow(), fails, data, CFG, run)
    assert not lock.exists()
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "mark": "of an earlier process"}
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for stale in (holder, {**holder, "pid": dead.pid}):
        lock.write_text(json.dumps(stale))
        with run_lock(run):
            assert json.loads(lock.read_text())["mark"] != holder["mark"]
        assert not lock.exists()
    for other in ({**holder, "host": "elsewhere"}, {**holder, "pid": "1/../1"}, {}):
        lock.write_text(json.dumps(other))
        with pytest.raises(BitflowError, match=f"delete {lock}"):
            take_lock(run)
    lock.write_text("")
    with pytest.raises(BitflowError, match=f"{lock}.*delete that file"):
        take_lock(run)
    assert [p.name for p in run.iterdir() if "lock" in p.name] == [lock.name]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_killed_process_that_nobody_waited_for_holds_no_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert mark_of(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert mark_of(child.pid) is None


def test_a_job_that_slurm_starts_again_takes_the_lock_of_its_earlier_start(tmp_path, monkeypatch):
    """On another machine, too: the job's number stays, and its starts are counted."""
    lock = tmp_path / LOCK
    earlier = {"host": "elsewhere", "pid": 7, "mark": "1", "job": "88", "starts": "0"}
    monkeypatch.setenv("SLURM_JOB_ID", "88")
    for starts, fine in (("0", False), ("1", True), ("2", True), ("", False)):
        lock.write_text(json.dumps({**earlier, "starts": "1"} if starts == "2" else earlier))
        monkeypatch.setenv("SLURM_RESTART_COUNT", starts)
        if not fine:  # another process of the same start may be at work
            with pytest.raises(BitflowError, match="in use"):
                take_lock(tmp_path)
            continue
        assert json.loads(take_lock(tmp_path).read_text())["starts"] == starts
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    for other in ({**earlier, "job": "89"}, {**earlier, "starts": "x"}, {**earlier, "job": "0"}):
        lock.write_text(json.dumps(other))
        with pytest.raises(BitflowError, match="in use"):
            take_lock(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")  # by hand: nothing says that it is over
    lock.write_text(json.dumps({**earlier, "job": "0"}))
    with pytest.raises(BitflowError, match="in use"):
        take_lock(tmp_path)
