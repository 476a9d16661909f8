"""The native inverse and one pass against the same in PyTorch."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitflow_edu.exact_inverse import exact_trajectory
from bitflow_edu.excursions.compiled import pack
from bitflow_edu.excursions.native import NativeInverse, NativePass, build_library
from bitflow_edu.guidance import GUIDANCE, Guidance
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.models import build, load_model
from bitflow_edu.lab import bench
from bitflow_edu.reverse_model import ReverseConfig, ReverseModel, one_pass, sample_noise
from bitflow_edu.tarflow import TARFlow, TARFlowConfig
from bitflow_edu.transformer import MODERN, TransformerConfig, find_compiler
from conftest import shake

SMALL = dict(image_size=6, patch_size=2, num_classes=3, num_blocks=2)


def small_flow(width=32, head_dim=16, num_layers=2, transformer=None, **more):
    """A shaken flow of two blocks, both orders of reading."""
    shape = TransformerConfig(width, num_layers, head_dim, **(transformer or {}))
    return shake(build(TARFlow, TARFlowConfig(**{**SMALL, **more}, transformer=shape), 0))


GUIDANCES = [None, *(Guidance(1.2, kind) for kind in GUIDANCE), Guidance(0.7, temperature=1.8)]
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")


def assert_same(flow, N, guidance=None, *flags):
    """All states, for N images, some of them without a label."""
    z, c = sample_noise(flow.cfg, N), torch.arange(N) % (flow.cfg.num_classes + 1) - 1
    found = NativeInverse(flow, *flags)(z, c, guidance)
    wanted = exact_trajectory(flow, z, c, guidance=guidance)
    assert len(found) == len(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("width,head_dim,num_layers", [(32, 16, 2), (96, 48, 2), (64, 64, 3)])
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_it_is_token_by_token_decoding(width, head_dim, num_layers, guidance):
    assert_same(small_flow(width, head_dim, num_layers), 5, guidance)


@needs_compiler
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_modern_blocks_too(guidance):
    assert_same(small_flow(width=48, transformer=MODERN), 5, guidance)


@needs_compiler
@pytest.mark.parametrize(
    "more",
    [
        dict(clip=0.05),  # that bites
        dict(block_layers=(1, 3)),  # deep and shallow
        dict(image_size=18),  # more tokens than a vector and than a panel has columns
        dict(channels=3, patch_size=3),  # tokens of an odd size
    ],
)
def test_it_knows_all_flows(more):
    assert_same(small_flow(**more), 3)


@needs_compiler
@settings(deadline=None, max_examples=15)
@given(N=st.integers(1, 40), threads=st.integers(1, 5), rows=st.integers(1, 9))
def test_groups_and_threads_change_nothing(N, threads, rows):
    flow, before = small_flow(), torch.get_num_threads()
    z, c, guided = sample_noise(flow.cfg, N), torch.arange(N) % 3, Guidance(1.0)
    one = NativeInverse(flow)
    try:
        torch.set_num_threads(1)
        wanted = [one(z[i : i + 1], c[i : i + 1], guided)[0] for i in range(N)]
        torch.set_num_threads(threads)
        one.rows = rows
        torch.testing.assert_close(one(z, c, guided)[0], torch.cat(wanted), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is of x86-64")
def test_narrow_vectors_say_the_same():
    flow = small_flow(width=64, head_dim=32, transformer=MODERN)
    assert_same(flow, 7, Guidance(1.0), "-mno-avx512f")


@needs_compiler
def test_trained_digits_come_back(digits):
    """F⁻¹(F(x)) on real digits."""
    flow = load_model(asset("mnist-mini/forward"), TARFlow)
    part = digits[:100]
    x, c = part.x, part.labels
    with torch.no_grad():
        states = flow(x, c).states
    back = NativeInverse(flow)(states[-1], c)
    assert max((a - b).abs().max() for a, b in zip(back, states)) < 1e-3


G_SHAPES = [{}, dict(max_guidance=2.0), dict(denoise=False), dict(image_size=18, channels=3)]


@needs_compiler
@pytest.mark.parametrize(
    "shape",
    [
        dict(width=32, head_dim=16),
        dict(width=96, head_dim=48),
        dict(width=80, head_dim=16, num_layers=3),
        dict(width=128, head_dim=64, **MODERN),
    ],
)
@pytest.mark.parametrize("more", G_SHAPES)
def test_one_pass_is_one_pass(shape, more):
    transformer = TransformerConfig(**{"num_layers": 2, **shape})
    cfg = ReverseConfig(**{**SMALL, **more}, transformer=transformer)
    G = shake(build(ReverseModel, cfg, 0))
    z, c = sample_noise(cfg, 5), torch.tensor([0, 2, -1, 1, 0])
    w = 1.5 if cfg.max_guidance else None
    torch.testing.assert_close(NativePass(G)(z, c, w), one_pass(G, z, c, w), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_weights_are_copied():
    flow = small_flow()
    z, c = sample_noise(flow.cfg, 2), torch.tensor([0, 1])
    inverse = NativeInverse(flow)
    before = inverse(z, c)[0]
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(1)
    assert torch.equal(inverse(z, c)[0], before)
    assert not torch.equal(NativeInverse(flow)(z, c)[0], before)
    flow.double()
    assert torch.equal(inverse(z, c)[0], before)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(BitflowError, match="head_dim is 8"):
        NativeInverse(small_flow(width=16, head_dim=8))
    with pytest.raises(BitflowError, match="as tokens"):
        NativePass(build(ReverseModel, ReverseConfig(token_states=True), 0))
    with pytest.raises(BitflowError, match="scale_token"):
        NativePass(build(ReverseModel, ReverseConfig(max_guidance=3.0, scale_token=True), 0))
    with pytest.raises(BitflowError, match="float64"):
        NativeInverse(small_flow().double())
    with pytest.raises(BitflowError, match="packed"):
        NativeInverse(pack(small_flow(), 64))


@needs_compiler
def test_noise_of_another_shape_is_refused():
    flow = small_flow()
    wrong = {
        r"\(2, 3, 4\)": torch.randn(2, 3, 4),
        r"\(2,\).*\(3,\)": torch.randn(3, 9, 4),
        "float64": torch.randn(2, 9, 4).double(),
    }
    for seen, z in wrong.items():
        with pytest.raises(BitflowError, match=seen):
            NativeInverse(flow)(z, torch.tensor([0, 1]))


@needs_compiler
@pytest.mark.parametrize("c", [[[0], [1]], [True, False], [0.0, 1.0]])
def test_labels_of_another_kind_are_refused(c):
    flow = small_flow()
    with pytest.raises(BitflowError, match="labels"):
        NativeInverse(flow)(sample_noise(flow.cfg, 2), torch.tensor(c))


@needs_compiler
def test_another_default_type_changes_nothing():
    flow = small_flow()
    z, c, inverse = sample_noise(flow.cfg, 2), torch.tensor([0, 1]), NativeInverse(flow)
    before = inverse(z, c)[0]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(inverse(z, c)[0], before)
    finally:
        torch.set_default_dtype(torch.float32)


SHORT_OF_MEMORY = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from test_native import *
flow = small_flow(image_size=64, width=64, num_layers=4)
inverse, z, c = NativeInverse(flow), sample_noise(flow.cfg, 8), torch.zeros(8, dtype=torch.int64)
torch.set_num_threads(1)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2 ** 24  # the keys and values alone take 40 megabytes
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    inverse(z, c)
except BitflowError as e:
    print(e)
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_no_memory_is_a_clear_error():
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "memory ran out" in done.stdout, done.stderr


def test_no_compiler_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BitflowError, match="install g"):
        build_library("-DNOBODY")


@needs_compiler
def test_a_failing_compiler_is_quoted():
    with pytest.raises(BitflowError, match="no-such-flag"):
        build_library("--no-such-flag")


def test_import_builds_nothing():
    """A course that runs without a compiler must import without one."""
    without = "import shutil; shutil.which = lambda *a: None"
    program = f"{without}; import bitflow_edu.excursions.native, bitflow_edu.lab.bench"
    subprocess.run([sys.executable, "-c", program], check=True)


@needs_compiler
def test_the_benches_know_it():
    """Rows that need a compiler are left out without one, and models that cannot go native."""
    flow = small_flow()
    cfg = ReverseConfig(**SMALL, transformer=flow.cfg.transformer)
    G = shake(build(ReverseModel, cfg, 0))
    z, c = sample_noise(flow.cfg, 2), torch.tensor([0, 2])
    calls = bench.inverse_calls(flow, z, c, 0.0, 1e-4, 2, compiled=True)
    calls |= bench.one_pass_calls(G, z, c) | bench.compiled_one_pass_calls(G, z, c)
    torch.testing.assert_close(calls["native"](), calls["exact"](), rtol=1e-4, atol=1e-4)
    native, plain = calls["one-pass, native"](), calls["one-pass"]()
    torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-4)
    assert "native" not in bench.decoding_calls(flow, z, c)
    narrow = small_flow(width=16, head_dim=8)
    assert "native" not in bench.compiled_decoding_calls(narrow, z, c)


@needs_compiler
def test_both_training_losses_can_be_compiled():
    shape = TransformerConfig(32, 1, 16)
    cfg = TARFlowConfig(image_size=4, patch_size=2, num_blocks=1, transformer=shape)
    measured = bench.bench_training(cfg, batch=2, repeats=2, compiled=True)
    found = {(m["row"], m["metric"]): m["value"] for m in measured}
    assert found["plain", "training_speedup_vs_plain"] == 1 and found["exact", "ms_per_step"] > 0
