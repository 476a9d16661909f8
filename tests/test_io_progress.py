"""What a run writes and shows while it goes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitflow_edu.io.checkpoints import read_metrics
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.processes import SINGLE_PROCESS, SingleProcess
from bitflow_edu.io.progress import (
    check_samples_drawn,
    draw_grid,
    log_step,
    open_logs,
    progress_bar,
    whole_model,
)


def state_of(processes=SINGLE_PROCESS, step=5):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.25}])
    counters = {"step": step, "seconds": 1.23456}
    model = torch.nn.Linear(1, 1)
    return SimpleNamespace(averaged=model, optimizer=optimizer, processes=processes, **counters)


class Second(SingleProcess):
    """One of two processes, not the one that writes."""

    rank, size, main = 1, 2, False

    def on_rank_zero(self, fn):
        return None


def write_line(state, run, watcher=None):
    with open_logs(state, run, watcher) as (log, opened), progress_bar(state, 9) as bar:
        metrics = {"loss": torch.tensor(9.0), "z_rms": torch.tensor(1.0)}
        log_step(log, bar, state, torch.tensor(0.5), torch.tensor(2.0), metrics, opened)
    return log


def test_a_line_of_metrics(tmp_path):
    log = write_line(state_of(), tmp_path)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    expected = {"step": 5, "loss": 0.5, "grad_norm": 2.0, "lr": 0.25, "seconds": 1.235}
    assert line == {**expected, "z_rms": 1.0}, "a metric cannot take the place of the loss"
    assert log.file.closed


def test_only_the_main_process_writes(tmp_path):
    state = state_of(Second())
    assert write_line(state, tmp_path) is None
    draw_grid(state, lambda model: pytest.fail("drawn twice"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samples_are_written_and_shown(tmp_path):
    state, seen = state_of(), []
    watcher = SimpleNamespace(samples=lambda step, x: seen.append((step, x)))
    drawn = SimpleNamespace(picture=np.zeros((4, 4, 3), np.uint8), x="samples")
    draw_grid(state, lambda model: drawn, tmp_path, watcher)
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-00000005.png"]
    assert seen == [(5, "samples")] and whole_model(state) is state.averaged


def test_logs_are_closed_where_training_fails(tmp_path):
    closed = []
    watcher = SimpleNamespace(close=lambda: closed.append(True))
    with pytest.raises(RuntimeError), open_logs(state_of(), tmp_path, lambda *_: watcher) as logs:
        raise RuntimeError
    assert logs[0].file.closed and closed == [True]


def test_a_training_whose_samples_are_all_broken_is_no_success():
    """One whole sample is enough; pictures alone, and no samples, say nothing."""
    x = torch.full((3, 1, 2, 2), torch.nan)
    with pytest.raises(BitflowError, match="all 3 samples"):
        check_samples_drawn(state_of(), SimpleNamespace(x=x))
    x[1] = 0
    for fine in (SimpleNamespace(x=x), None, np.zeros((2, 2, 3))):
        check_samples_drawn(state_of(), fine)
