"""What only a GPU shows: training in bf16, compiled; captured decoding; Jacobi; evaluation; resume.

Each body runs on the CPU, too, as far as it can, so that a mistake in a test is found without a
GPU: `make test-gpu` runs this file on one."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from streams import CFG as STREAM
from streams import Tiny

from bitflow_edu import training
from bitflow_edu.data import Images
from bitflow_edu.exact_inverse import exact_inverse, exact_trajectory, invert_block
from bitflow_edu.excursions.compiled import capture_inverse, capture_pass, compile_blocks
from bitflow_edu.excursions.jacobi import jacobi_trajectory
from bitflow_edu.guidance import Guidance, guided_run
from bitflow_edu.inverse_strategies import STRATEGIES, reverse_loss
from bitflow_edu.io import loading
from bitflow_edu.io.checkpoints import read_metrics
from bitflow_edu.io.models import build, newest_checkpoint
from bitflow_edu.lab.bench_speed import compiled_copy
from bitflow_edu.lab.evaluate import sampler_source
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.lab.recipes import train_reverse
from bitflow_edu.lab.sampling import exact_sampler, one_pass_sampler
from bitflow_edu.reverse_model import one_pass, sample_noise
from bitflow_edu.scale.feature_networks import own_network
from bitflow_edu.scale.fid import evaluate_stream, make_reference
from bitflow_edu.tarflow import TARFlow, forward_loss
from bitflow_edu.training import TrainConfig, train
from conftest import small_flow, small_reverse

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
on_each = pytest.mark.parametrize("device", DEVICES)
CFG = TrainConfig(
    steps=4, batch_size=8, num_microbatches=2, log_every=1, sample_every=100, checkpoint_every=4
)


def digits_of(n=32, side=6, channels=1):
    """Random pixels: nothing here looks at what they show."""
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, side, side)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % 3, ("0", "1", "2"))


def can_compile(device):
    """Whether torch.compile has its compiler: Triton on a GPU, g++ on a CPU."""
    return device == "cuda" or shutil.which("g++") is not None


def trained(device, folder, of="F", cfg=CFG, resume=False):
    """F, or a G that takes w beside a frozen F, after a few steps on that device."""
    flow = small_flow(modern=True).to(device)
    if of == "F":
        return train(flow, forward_loss, digits_of(), cfg, folder, resume=resume)
    G = small_reverse(flow, max_guidance=3.0).to(device)
    loss = reverse_loss(flow, STRATEGIES["hidden-alignment"], run=guided_run())
    return train(G, loss, digits_of(), cfg, folder, resume=resume)


def losses(folder):
    """The logged losses of a run."""
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


@on_each
@pytest.mark.parametrize("of", ["F", "G"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_in_bf16(device, of, compiled, tmp_path):
    """Finite, on its device, and near float32; compiled as well as not."""
    if compiled and not can_compile(device):
        pytest.skip("torch.compile needs a compiler")
    if compiled and device == "cpu" and of == "G":
        pytest.skip("a minute on a CPU, and the same code as for F")
    half = replace(CFG, precision="bf16", compile=compiled)
    model = trained(device, tmp_path / "half", of, half)
    assert all(p.isfinite().all() and p.device.type == device for p in model.parameters())
    trained(device, tmp_path / "full", of, replace(CFG, precision="fp32"))
    found, wanted = losses(tmp_path / "half"), losses(tmp_path / "full")
    assert len(found) == CFG.steps and found == pytest.approx(wanted, rel=0.05, abs=0.05)


@on_each
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("of", ["F", "G"])
def test_a_step_waits_for_nothing(device, of, resident, tmp_path, monkeypatch):
    """CUDA itself raises where a step reads its device; only logging and saving may. Images that
    lie on the device, and those that a thread reads ahead into pinned memory."""
    if not resident:
        if device == "cpu":
            pytest.skip("on a CPU all images are where they are needed")
        monkeypatch.setattr(loading, "RESIDENT", 0)
    passed = []

    def mode(name):
        passed.append(name)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(name)

    def calls(fn, before, after):
        def through(*args, **kwargs):
            mode(before)
            try:
                return fn(*args, **kwargs)
            finally:
                mode(after)

        return through

    for name in ("log_step", "save_checkpoint"):
        monkeypatch.setattr(training, name, calls(getattr(training, name), "default", "error"))
    step = calls(training.forward_backward, "error", "error")
    monkeypatch.setattr(training, "forward_backward", step)
    try:
        trained(device, tmp_path / "run", of, replace(CFG, log_every=4, checkpoint_every=8))
    finally:
        mode("default")
    assert passed.count("default") == 3 and passed.count("error") == 2 * 4 + 2
    assert len(losses(tmp_path / "run")) == 1


@on_each
@pytest.mark.parametrize("of", ["F", "G"])
def test_a_resumed_training_is_the_whole_one(device, of, tmp_path):
    """Two steps, a checkpoint, two more: the same weights as four steps at once."""
    whole = trained(device, tmp_path / "whole", of)
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    shutil.rmtree(newest_checkpoint(parts))
    assert newest_checkpoint(parts).name == "step-00000002"
    again = trained(device, parts, of, resume=True)
    for p, q in zip(whole.parameters(), again.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert losses(parts) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@on_each
@pytest.mark.parametrize("guidance", [None, Guidance(1.0)])
def test_the_exact_inverse_inverts(device, guidance):
    """And by fixed-point iteration gives the same."""
    flow = small_flow(modern=True).to(device)
    z, c = sample_noise(flow.cfg, 3).to(device), torch.tensor([1, 2, 0], device=device)
    states = exact_trajectory(flow, z, c, guidance=guidance)
    solved, how = jacobi_trajectory(flow, z, c, tolerance=1e-5, guidance=guidance)
    torch.testing.assert_close(solved[0], states[0], rtol=1e-3, atol=1e-3)
    assert len(how) == flow.cfg.num_blocks and not any(one.fell_back for one in how)
    if guidance is None:
        x = exact_inverse(flow, z, c)
        torch.testing.assert_close(flow(x, c).z, z, rtol=1e-3, atol=1e-3)


def captured(flow, c, guidance, invert):
    """Captured decoding on a GPU; on a CPU, without graphs, the same steps as they are."""
    if c.device.type == "cuda":
        return capture_inverse(flow, len(c), guidance, invert=invert)
    return lambda noise, labels: exact_trajectory(flow, noise, labels, invert, guidance)[0]


def skip_slow_compiler(device, compiled):
    """A CPU's compiler takes seconds for each case; test_compiled.py has these on a CPU."""
    if compiled and device == "cpu":
        pytest.skip("compiled on a GPU only")


FORMS = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]  # of weights, and how near


@on_each
@pytest.mark.parametrize("dtype, near", FORMS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("guidance", [None, Guidance(1.0)])
def test_captured_decoding_is_eager_decoding(device, guidance, compiled, dtype, near):
    """Replayed for other noise and other labels than it was captured with, twice."""
    skip_slow_compiler(device, compiled)
    flow, c = small_flow(modern=True).to(device, dtype), torch.tensor([1, 2, 0], device=device)
    replay = captured(flow, c, guidance, compile_blocks(flow) if compiled else invert_block)
    for seed, labels in enumerate((c, c.flip(0))):
        z = sample_noise(flow.cfg, 3, seed=seed).to(device)
        wanted = exact_trajectory(flow, z, labels, guidance=guidance)[0]
        assert wanted.dtype == torch.float32  # states, whatever the weights are in
        torch.testing.assert_close(replay(z, labels), wanted, rtol=10 * near, atol=near)


@on_each
@pytest.mark.parametrize("dtype, near", FORMS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("w", [None, 1.5])
def test_a_captured_pass_is_one_pass(device, w, compiled, dtype, near):
    """Replayed for other noise and other labels than it was captured with, twice."""
    skip_slow_compiler(device, compiled)
    flow, c = small_flow(modern=True), torch.tensor([1, 2, 0], device=device)
    G = small_reverse(flow, max_guidance=3.0 if w else 0.0).to(device, dtype)
    program, on_gpu = compiled_copy(G) if compiled else G, device == "cuda"
    replay = capture_pass(program, 3, w) if on_gpu else lambda z, c: one_pass(program, z, c, w)
    for seed, labels in enumerate((c, c.flip(0))):
        z = sample_noise(G.cfg, 3, seed=seed).to(device)
        wanted = one_pass(G, z, labels, w)
        torch.testing.assert_close(replay(z, labels), wanted, rtol=10 * near, atol=near)


@on_each
def test_one_pass_in_bf16_is_near_float32(device):
    flow = small_flow(modern=True)
    G = small_reverse(flow, max_guidance=3.0).to(device)
    z, c = sample_noise(G.cfg, 4).to(device), torch.arange(4, device=device) % 3
    with torch.no_grad():
        wanted = one_pass(G, z, c, 1.0)
        with torch.autocast(device, torch.bfloat16):
            found = one_pass(G, z, c, 1.0)
    assert found.device.type == device
    assert (found.float() - wanted).abs().max() < 0.1 * wanted.abs().max().clamp(min=1)


@on_each
@pytest.mark.parametrize("method", ["one-pass", "exact"])
def test_an_evaluation_streams_from_the_device(device, method, tmp_path):
    """Samples, features and sums on the device; the reference from the CPU's images."""
    flow = small_flow(side=4, patch=4).to(device)
    G = small_reverse(flow).to(device)
    sampler = one_pass_sampler(G) if method == "one-pass" else exact_sampler(flow)
    network = own_network(Tiny().to(device), "tiny")
    data = digits_of(64, 16)
    reference = make_reference(data, network, tmp_path / "reference.npz", STREAM)
    cfg = replace(STREAM, n=40, batch_size=16)
    done = evaluate_stream(sampler_source(sampler), reference, network, cfg, method)
    found = {m["metric"]: m["value"] for m in done.measurements}
    assert found and all(math.isfinite(v) for v in found.values()), json.dumps(found)


@on_each
def test_the_whole_recipe_in_small(device, tmp_path):
    """w, a decoder, crops, two networks, adaptive weights, bf16: the twin of imagenet256-b2."""
    pytest.importorskip("diffusers")
    preset = find_preset("imagenet256-b2-smoke")
    train_cfg = replace(preset.train_reverse, steps=2, batch_size=8, num_microbatches=2)
    preset = replace(preset, train_reverse=replace(train_cfg, compile=device == "cuda"))
    flow = build(TARFlow, preset.forward, 0, device)
    data = digits_of(16, 8, 4)
    data = replace(data, labels=data.labels % 2)
    model = train_reverse(preset, flow, data, tmp_path / "g", device)
    assert all(p.isfinite().all() and p.device.type == device for p in model.parameters())
