"""Samplers as values: what they draw, what they are called, and what they cost."""

import pytest
import torch

from bitflow_edu.exact_inverse import exact_inverse, score_denoise, serial_steps
from bitflow_edu.excursions.glow import CouplingConfig, CouplingFlow
from bitflow_edu.guidance import Guidance, guided_pass
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build, num_parameters
from bitflow_edu.io.processes import SingleProcess
from bitflow_edu.lab.sampling import (
    METHODS,
    SAMPLERS,
    WITHOUT_REVERSE,
    choose_samplers,
    denoised,
    draw,
    draw_all,
    exact_sampler,
    grid_labels,
    guided_sampler,
    guided_samplers,
    noise_for,
    one_pass_sampler,
    pair_samplers,
    sampler_cost,
    sampler_times,
    takes_labels,
)
from bitflow_edu.reverse_model import one_pass
from conftest import small_flow, small_reverse


@pytest.fixture(scope="module")
def pair():
    flow = small_flow(modern=True)
    return flow, small_reverse(flow)


def coupling():
    """A small NICE, which needs no data to start from."""
    return build(CouplingFlow, CouplingConfig(kind="nice", image_size=6, width=8), 0).eval()


def inputs(cfg, n=5):
    return noise_for(cfg, n, seed=1), grid_labels(cfg, n)


def test_samplers_draw_what_the_functions_behind_them_draw(pair):
    F, G = pair
    z, c = inputs(F.cfg)
    expected = {
        "exact": exact_inverse(F, z, c),
        "exact+denoise": score_denoise(F, exact_inverse(F, z, c), c),
        "one-pass": one_pass(G, z, c),
        "one-pass+denoise": score_denoise(F, one_pass(G, z, c), c),
        "guided": guided_pass(G, z, c, 0.5),
    }
    for kind in ("annealed", "variance-aware"):
        guided = exact_inverse(F, z, c, Guidance(0.5, kind))
        expected[f"exact+denoise, {kind}"] = score_denoise(F, guided, c)
    assert not torch.equal(*list(expected.values())[-2:])
    assert list(expected) == list(SAMPLERS)
    for name, make in SAMPLERS.items():
        sampler = make(F, G, 0.5 if name == "guided" or "," in name else 0.0)
        assert sampler.method == name and torch.equal(sampler(z, c), expected[name])
        assert sampler.model is (F if name in WITHOUT_REVERSE else G)


def test_passes_and_serial_steps():
    flow = small_flow()
    reverse, steps = small_reverse(flow), serial_steps(flow)
    made = {name: make(flow, reverse, 0.0) for name, make in SAMPLERS.items()}
    assert {name: s.nfe for name, s in made.items()} == {
        "exact": 9,
        "exact+denoise": 11,
        "one-pass": 1,
        "one-pass+denoise": 3,
        "guided": 2,
        "exact+denoise, annealed": 11,
        "exact+denoise, variance-aware": 11,
    }
    exact = steps + 2
    assert [s.serial_steps for s in made.values()] == [steps, exact, 1, 3, 1, exact, exact]
    assert exact_sampler(flow, 1.0).nfe == 18 and exact_sampler(flow, 1.0).serial_steps == steps
    assert exact_sampler(coupling()).nfe == exact_sampler(coupling()).serial_steps == 1


def test_names_and_folders(pair):
    _, G = pair
    plain, guided = one_pass_sampler(G), guided_sampler(G, 0.25)
    assert (plain.name, plain.folder) == ("one-pass", "one-pass")
    assert (guided.name, guided.folder) == ("guided, w = 0.25", "guided-w0.25")


def test_a_model_that_takes_w_is_guided_in_one_pass(pair):
    F, _ = pair
    taught = small_reverse(F, max_guidance=2.0)
    sampler = guided_sampler(taught, 0.5)
    z, c = inputs(F.cfg)
    assert sampler.nfe == 1 and sampler.name == "one-pass, w = 0.5"
    assert torch.equal(sampler(z, c), one_pass(taught, z, c, 0.5))


def test_what_a_pair_is_compared_by(pair):
    F, G = pair
    assert [s.name for s in pair_samplers(F, G)] == list(METHODS)
    assert [s.name for s in pair_samplers(F, None)] == ["exact", "exact+denoise"]
    assert [s.name for s in pair_samplers(coupling(), None)] == ["exact"]


def test_samplers_are_chosen_by_name(pair):
    F, G = pair
    assert [s.name for s in choose_samplers(("one-pass", "exact"), F, G)] == ["one-pass", "exact"]
    assert [s.name for s in choose_samplers((), F, G)] == list(METHODS)
    with pytest.raises(BitflowError, match="two-pass.*one-pass"):
        choose_samplers(("two-pass",), F, G)
    with pytest.raises(BitflowError, match="one-pass: no such method here.*name a G"):
        choose_samplers(("one-pass",), F, None)


def test_guidance_is_for_a_reverse_model(pair):
    assert guided_samplers(None, ()) == []
    assert [s.w for s in guided_samplers(pair[1], (0.5, 1.0))] == [0.5, 1.0]
    with pytest.raises(BitflowError, match="guidance scales 0.5, 1 are for G"):
        guided_samplers(None, (0.5, 1.0))


def test_labels_are_checked_and_minus_one_asks_for_no_class(pair):
    F, G = pair
    z, c = inputs(F.cfg, 2)
    assert one_pass_sampler(G)(z, torch.tensor([-1, 0])).shape == (2, 1, 6, 6)
    with pytest.raises(BitflowError, match="label 3 is out of range"):
        denoised(exact_sampler(F), F)(z, torch.tensor([0, 3]))


class Played(SingleProcess):
    """One of several processes; what the others drew is noted beforehand."""

    def __init__(self, rank, size, others):
        self.rank, self.size, self.others = rank, size, others

    def all_gather(self, t):
        parts = {**self.others[t.dtype], self.rank: t}
        return torch.cat([parts[rank] for rank in reversed(range(self.size))])


def test_batches_and_processes_change_no_sample(pair):
    _, G = pair
    sampler, (z, c) = one_pass_sampler(G), inputs(pair[0].cfg, 11)
    whole = sampler(z, c)
    assert torch.allclose(draw(sampler, z, c, batch_size=4), whole, atol=1e-5)
    parts, gathered = torch.arange(11).split(4), {torch.int64: {}, torch.float32: {}}
    for rank in (1, 2):
        gathered[torch.int64][rank] = parts[rank]
        gathered[torch.float32][rank] = sampler(z[parts[rank]], c[parts[rank]])
    shared = draw(sampler, z, c, batch_size=4, processes=Played(0, 3, gathered))
    assert torch.allclose(shared, whole, atol=1e-5)


def test_all_samplers_draw_from_the_same_noise(pair):
    F, _ = pair
    samplers = pair_samplers(*pair)
    drawn = draw_all(samplers, n=7, seed=1)
    z, c = inputs(F.cfg, 7)
    assert list(drawn) == [s.name for s in samplers]
    for sampler in samplers:
        assert torch.allclose(drawn[sampler.name], sampler(z, c), atol=1e-5)


def test_cost_and_times_are_named_as_in_results_files(pair):
    F, G = pair
    cost = [m for sampler in pair_samplers(F, G) for m in sampler_cost(sampler)]
    by_name = {(m["row"], m["metric"]): m["value"] for m in cost}
    assert by_name["exact", "params"] == num_parameters(F)
    assert by_name["one-pass", "params"] == num_parameters(G)
    assert by_name["exact+denoise", "flops_per_image"] > by_name["exact", "flops_per_image"]
    times = sampler_times(pair_samplers(F, G), batches=(1, 2), repeats=2)
    assert [(m["row"], m["metric"], m["batch"]) for m in times] == [
        line
        for batch in (1, 2)
        for line in (
            ("exact", "ms_per_image", batch),
            ("exact+denoise", "ms_per_image", batch),
            ("one-pass", "ms_per_image", batch),
            ("one-pass", "speedup_vs_exact", batch),
            ("one-pass", "speedup_vs_exact+denoise", batch),
        )
    ]


def test_a_flow_without_labels_is_asked_for_none(pair):
    """Its rows for labels are as they were at the start; only their mean was trained."""
    flow = small_flow(label_dropout=1.0)
    assert not takes_labels(flow.cfg) and takes_labels(pair[0].cfg)
    assert grid_labels(flow.cfg, 3).tolist() == [-1, -1, -1]
    drawn = draw_all([exact_sampler(flow)], 4, 0)["exact"]
    z = noise_for(flow.cfg, 4, 0)
    assert torch.allclose(drawn, exact_inverse(flow, z, torch.full((4,), -1)), atol=1e-5)
    assert not torch.allclose(drawn, exact_inverse(flow, z, torch.arange(4) % 3))
