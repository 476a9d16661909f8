"""Compiled, packed and captured decoding against the plain one."""

import shutil
from functools import partial

import pytest
import torch

from bitflow_edu.data import unpatchify
from bitflow_edu.exact_inverse import exact_trajectory, invert_block, score_denoise
from bitflow_edu.excursions import compiled
from bitflow_edu.excursions.compiled import (
    PackedLinear,
    capture_inverse,
    capture_pass,
    capture_score_step,
    compile_blocks,
    pack,
)
from bitflow_edu.guidance import Guidance
from bitflow_edu.io.files import BitflowError
from bitflow_edu.reverse_model import one_pass, sample_noise
from conftest import small_flow, small_reverse


def compiled_against_plain(modern, guidance):
    """x^0 of compiled decoding against plain decoding, for an F with or without modern parts."""
    flow, c = small_flow(modern=modern), torch.tensor([1, 2, 0])
    z = sample_noise(flow.cfg, 3)
    found = exact_trajectory(flow, z, c, compile_blocks(flow), guidance)[0]
    wanted = exact_trajectory(flow, z, c, guidance=guidance)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("guidance", [None, Guidance(1.0, "annealed", temperature=1.5)])
def test_a_step_of_fixed_shapes_is_the_step(modern, guidance, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    compiled_against_plain(modern, guidance)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_decoding_is_decoding():
    compiled_against_plain(False, Guidance(1.0))


@pytest.mark.parametrize("rows", [3, 64])
def test_packed_weights_give_the_same_and_leave_the_model_alone(rows):
    flow, c = small_flow(), torch.arange(rows) % 3
    z, before = sample_noise(flow.cfg, rows), {k: v.clone() for k, v in flow.state_dict().items()}
    packed = pack(flow, rows)
    found, wanted = exact_trajectory(packed, z, c)[0], exact_trajectory(flow, z, c)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert any(isinstance(m, PackedLinear) for m in packed.modules()) == (rows >= 32)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    assert all(p.requires_grad for p in flow.parameters())


def test_what_cannot_be_packed_or_captured():
    with pytest.raises(BitflowError, match="float64 on cpu"):
        pack(small_flow(dtype=torch.float64), 1)
    with pytest.raises(BitflowError, match="this one is on cpu"):
        capture_inverse(small_flow(), 1)
    with pytest.raises(BitflowError, match="this one is on cpu"):
        capture_pass(small_reverse(small_flow()), 1)


def recorded_without_a_gpu(call):
    """As `record`: the same memory each time, filled by the same operations."""
    out = call()
    first = out if isinstance(out, torch.Tensor) else out[0]

    def again():
        new = call()
        first.copy_(new if isinstance(new, torch.Tensor) else new[0])

    return out, again


@pytest.mark.parametrize("of", ["F", "F, guided", "F, compiled", "score step", "G", "G with w"])
def test_what_is_recorded_is_replayed_for_other_noise(of, monkeypatch):
    """On a CPU the recording is pretended; its buffers, copies and checks are the real ones."""
    monkeypatch.setattr(compiled, "check_on_gpu", lambda like: None)
    monkeypatch.setattr(compiled, "record", recorded_without_a_gpu)
    flow, c = small_flow(), torch.tensor([1, 2, -1])
    draw = partial(sample_noise, flow.cfg, 3)
    if of == "score step":
        replay, wanted = capture_score_step(flow, 3), partial(score_denoise, flow)
        draw = lambda seed: unpatchify(sample_noise(flow.cfg, 3, seed), 2, 1)  # noqa: E731
    elif of.startswith("F"):
        guidance = Guidance(1.0) if "guided" in of else None
        invert = compile_blocks(flow) if "compiled" in of else invert_block
        replay = capture_inverse(flow, 3, guidance, invert=invert)
        wanted = lambda z, c: exact_trajectory(flow, z, c, guidance=guidance)[0]  # noqa: E731
    else:
        w = 1.5 if "w" in of else None
        G = small_reverse(flow, max_guidance=3.0 if w else 0.0)
        replay, wanted = capture_pass(G, 3, w), lambda z, c: one_pass(G, z, c, w)
    for seed, labels in enumerate((c, c.flip(0))):
        z = draw(seed)
        torch.testing.assert_close(replay(z, labels), wanted(z, labels), rtol=1e-5, atol=1e-6)
    with pytest.raises(BitflowError):
        replay(z[:2], c[:2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("guidance", [None, Guidance(1.0)])
def test_captured_decoding_is_decoding(guidance):
    flow = small_flow().cuda()
    replay, c = capture_inverse(flow, 3, guidance), torch.tensor([1, 2, 0], device="cuda")
    for seed in range(2):
        z = sample_noise(flow.cfg, 3, seed, device="cuda")
        wanted = exact_trajectory(flow, z, c, guidance=guidance)[0]
        torch.testing.assert_close(replay(z, c), wanted, rtol=1e-4, atol=1e-5)
