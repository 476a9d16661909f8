"""How many operations a step dispatches: what counts, and that it does not grow."""

from dataclasses import replace
from pathlib import Path

import torch

from bitflow_edu.cli.main import main
from bitflow_edu.io.results import load_result
from bitflow_edu.lab.bench_operations import (
    Operations,
    bench_operations,
    gradient_operations,
    update_operations,
)
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.tarflow import TARFlow, forward_loss
from conftest import small_flow

RESULTS = Path(__file__).resolve().parent.parent / "results"


def test_views_do_not_count():
    t = torch.ones(2, 3, device="meta")
    with Operations() as found:
        t.view(6).split(2), t.mT.detach(), t[0], t.unbind()
    assert found.count == 0
    with Operations() as found:
        t.add_(1), t + 1, t.clone()
    assert found.count == 3


def test_the_update_is_a_handful_whatever_the_size():
    """Weights are clipped, stepped and averaged in groups, not one by one."""
    small = small_flow()
    large = TARFlow(replace(small.cfg, num_blocks=2 * small.cfg.num_blocks))
    assert update_operations(small) == update_operations(large) < 30


def test_batches_and_metrics_do_not_change_the_count():
    flow = small_flow(side=3, patch=2).to("meta")

    def count(n):
        batch = torch.empty(n, 1, 6, 6, device="meta"), torch.empty(n, device="meta").long()
        return gradient_operations(forward_loss, flow, batch, fused=False)

    assert count(2) == count(7) > 0


def test_the_command_and_what_is_stored(tmp_path, monkeypatch):
    """The stored counts of B/2 are today's, and lower than those before."""
    monkeypatch.chdir(tmp_path)
    assert main("bench --what operations --geometry imagenet256-b2-smoke".split()) in (0, None)
    assert len(load_result("bench-operations", tmp_path / "results")["measurements"]) == 6
    stored, before = (load_result(f"bench-operations{w}", RESULTS) for w in ("", "-before"))
    then = {(m["row"], m["metric"]): m["value"] for m in before["measurements"]}
    now = {(m["row"], m["metric"]): m["value"] for m in stored["measurements"]}
    assert then.keys() == now.keys() and all(now[key] < then[key] for key in now)
    found = bench_operations(find_preset("imagenet256-b2"))
    assert {(m["row"], m["metric"]): m["value"] for m in found} == now
