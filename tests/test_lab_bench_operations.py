"""How many operations a step dispatches: what counts, and that it does not grow."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from torch.autograd.profiler import profile

from bitflow_edu.cli.main import main
from bitflow_edu.io.results import load_result
from bitflow_edu.lab.bench_operations import (
    Operations,
    bench_operations,
    compiled_operations,
    count_started,
    gradient_operations,
    update_operations,
)
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.tarflow import TARFlow, forward_loss
from bitflow_edu.transformer import (
    MODERN,
    Layer,
    Transformer,
    TransformerConfig,
    allow_variants,
    compile_layers,
    find_compiler,
)
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
    assert all(now[key] < then[key] for key in then)
    guided = load_result("bench-operations-guided", RESULTS)
    for preset, lines in (("-mse", stored), ("", guided)):
        found = bench_operations(find_preset(f"imagenet256-b2{preset}"))
        kept = {(m["row"], m["metric"]): m["value"] for m in lines["measurements"]}
        assert {(m["row"], m["metric"]): m["value"] for m in found}.items() <= kept.items()
    for row in ("F", "G"):
        left = now[row, "gradient_operations_compiled"]
        assert left < then[row, "gradient_operations"] / 2
    assert (
        now["G", "gradient_operations_compiled"]
        < now["G, F not compiled", "gradient_operations_compiled"]
    )


def started_in(call) -> int:
    with profile() as found:
        call()
    return count_started([e for e in found.function_events if e.cpu_parent is None])


def test_a_profile_counts_an_operation_once():
    """Without what it calls, without views, and without memory that nothing is written to."""
    t, w, b = torch.ones(2, 3), torch.ones(3, 3), torch.ones(3)
    assert started_in(lambda: (t.view(6), t.mT, t.unbind(), torch.empty(3))) == 0
    assert started_in(lambda: (t + 1, t.add_(1), t.zero_())) == 3
    assert started_in(lambda: nnf.linear(t, w, b)) == 1  # addmm, of a transposed view


@pytest.mark.skipif(find_compiler() is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_layer_starts_less():
    cfg = TransformerConfig(16, 1, 16, **MODERN)
    layer, x = Transformer(cfg, 2, causal=True), torch.randn(2, 4, 16)

    def loss(model, x, c, generator):
        return model(x).square().mean(), {}

    plain = compiled_operations(loss, layer, (x, None))
    compile_layers(layer)
    assert 0 < compiled_operations(loss, layer, (x, None)) < plain / 2


def test_more_than_eight_forms_of_a_layer_are_compiled():
    """As in a table whose rows have other widths: torch.compile alone gives up after eight."""
    allow_variants()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for width in range(8, 88, 8):
        layer = Layer(TransformerConfig(width, 1, head_dim=8), causal=True)
        layer.compile(backend="eager")
        layer(torch.zeros(2, 4, width))
    assert torch._dynamo.utils.counters["frames"]["ok"] == 10
