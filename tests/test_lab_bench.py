"""The plain programs and every exact inverse beside them."""

from dataclasses import replace

import pytest
import torch

from bitflow_edu.io.models import build
from bitflow_edu.lab import bench
from bitflow_edu.lab.bench import geometry, inverse_calls, is_original, one_pass_calls, random_flow
from bitflow_edu.lab.bench_speed import inputs_for
from bitflow_edu.tarflow import TARFlow
from conftest import small_flow, small_reverse


def test_parts_that_the_plain_version_does_not_know_keep_it_out():
    modern, old = geometry("imagenet256-b2-smoke"), geometry("mnist-mini-smoke")
    assert is_original(old) and not is_original(modern) and not is_original(replace(old, clip=2.0))

    def calls_of(cfg):
        flow = random_flow(cfg)
        return inverse_calls(flow, *inputs_for(flow, 1), 0.0, 1e-4, 2)

    assert next(iter(calls_of(old))) == "plain" and next(iter(calls_of(modern))) == "exact"
    results = [call() for call in calls_of(modern).values()]
    assert all(torch.allclose(results[0], x, atol=1e-3) for x in results)


def test_every_guided_exact_inverse_agrees():
    flow = small_flow(side=2)
    z, c = inputs_for(flow, 3)
    calls = inverse_calls(flow, z, c, 1.5, 1e-6, 2)
    results = {row: call() for row, call in calls.items()}
    assert {"plain", "exact", "jacobi", "gs-jacobi"} <= set(results)
    for row, x in results.items():
        torch.testing.assert_close(x, results["exact"], atol=1e-3, rtol=1e-3, msg=row)
    unguided = inverse_calls(flow, z, c, 0.0, 1e-6, 2)["exact"]()
    assert not torch.allclose(unguided, results["exact"], atol=1e-3)


def test_one_pass_is_called_in_several_ways_and_gives_the_same():
    flow = small_flow()
    G = small_reverse(flow, max_guidance=2.0)
    z, c = inputs_for(flow, 3)
    images = [call() for call in one_pass_calls(G, z, c, 1.0).values()]
    assert all(torch.allclose(x, images[0], atol=1e-5) for x in images)


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.02])
def test_a_training_step_of_both_versions_has_the_same_loss_and_gradient(modern, clip):
    """All parts that a preset may have: else the two would be timed at different work."""
    flow = small_flow(side=4, patch=2, num_classes=10, modern=modern)
    model = build(TARFlow, replace(flow.cfg, clip=clip), 0)
    model.load_state_dict(flow.state_dict())
    found = {}
    for row, loss in bench.training_losses(model, 3, "cpu").items():
        model.zero_grad()
        value = loss()
        value.backward()
        found[row] = value.detach(), [p.grad.clone() for p in model.parameters()]
    (plain, slopes), (own, known) = found["plain"], found["exact"]
    torch.testing.assert_close(plain, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slopes, known, rtol=1e-3, atol=1e-5)
