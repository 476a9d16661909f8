"""The plain programs and every exact inverse beside them."""

from dataclasses import replace

import torch

from bitflow_edu.lab.bench import geometry, inverse_calls, is_original, one_pass_calls, random_flow
from bitflow_edu.lab.bench_speed import inputs_for
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
