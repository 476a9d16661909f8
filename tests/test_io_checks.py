"""The checks themselves: what they say, what they give back, and when they look at values."""

import warnings

import pytest
import torch

from bitflow_edu.data import to_model_range
from bitflow_edu.io import checks
from bitflow_edu.io.files import BitflowError
from bitflow_edu.tarflow import TARFlow, forward_loss
from conftest import small_flow, small_reverse


@pytest.mark.parametrize(
    "t,said",
    [
        (torch.zeros(2, 1, 16), r"z of shape \(2, 1, 16\).*\(N, 4, D\); draw more"),
        (torch.zeros(4, 16), r"z of shape \(4, 16\)"),
        (torch.zeros(2, 4, 16, dtype=torch.int32), "torch.int32.*draw more"),
        ([0.5], "list"),
        (None, "NoneType"),
    ],
)
def test_a_tensor_is_named_with_what_was_seen_and_what_to_do(t, said):
    with pytest.raises(BitflowError, match=f"z.*{said}" if said[0] != "z" else said):
        checks.check_tensor(t, "z", ("N", 4, "D"), "draw more")


def test_what_fits_comes_back_itself():
    t = torch.zeros(2, 4, 16, dtype=torch.bfloat16)
    assert checks.check_tensor(t, "z", ("N", 4, "D")) is t
    labels = torch.tensor([0, 1])
    assert checks.check_labels(labels, 2) is labels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_become_int64(dtype):
    labels = checks.check_labels(torch.tensor([3, 0], dtype=dtype), 4, 2)
    assert labels.dtype == torch.int64 and labels.tolist() == [3, 0]


def test_labels_out_of_range_are_named():
    with pytest.raises(BitflowError, match="label 10 .*0 to 9; choose"):
        checks.check_labels(torch.tensor([3, 10]), 10)
    with pytest.raises(BitflowError, match="label -1"):
        checks.check_labels(torch.tensor([3, -1]), 10)
    assert checks.check_labels(torch.tensor([3, -1]), 10, lowest=-1).tolist() == [3, -1]
    with pytest.raises(BitflowError, match="label -2 .*-1 for no class"):
        checks.forward_labels(torch.tensor([-2, 3]), 10, 2)
    assert len(checks.check_labels(torch.empty(0, dtype=torch.int64), 10)) == 0


def test_uint8_labels_are_no_mask():
    flow = small_flow()
    c = torch.tensor([1, 0, 1], dtype=torch.uint8)
    x = torch.zeros(3, 1, 6, 6)
    assert torch.equal(flow(x, c).z, flow(x, c.long()).z)


def test_models_on_meta_are_never_asked_for_values():
    cfg = small_flow().cfg
    with torch.device("meta"):
        flow, x = TARFlow(cfg), torch.zeros(2, 1, 6, 6)
        c = torch.zeros(2, dtype=torch.int64)
        loss, _ = forward_loss(flow, x, c, None)
    assert loss.is_meta and not checks.readable(loss)
    reverse = small_reverse(small_flow()).to("meta")
    assert checks.check_inputs(reverse, torch.zeros(2, 9, 4, device="meta"), c).is_meta


def test_models_say_what_they_are():
    flow = small_flow()
    checks.check_model(flow, TARFlow)
    with pytest.raises(BitflowError, match="F is a ReverseModel, but a TARFlow"):
        checks.check_model(small_reverse(flow), TARFlow, "F")


def test_noise_has_the_type_of_the_weights_except_under_autocast():
    flow, c = small_flow(), torch.tensor([0, 1])
    z = torch.zeros(2, 9, 4, dtype=torch.bfloat16)
    with pytest.raises(BitflowError, match=r"bfloat16 on cpu.*float32 on cpu; use z\.to"):
        checks.check_inputs(flow, z, c)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(checks.check_inputs(flow, z, c), c)
    with pytest.raises(BitflowError, match="float64 on cpu"):
        checks.check_inputs(flow.bfloat16(), z.double(), c)
    for fits in (z, z.float()):  # states may be finer than weights
        assert torch.equal(checks.check_inputs(flow, fits, c), c)


def test_a_sum_that_overflows_is_no_nan():
    checks.check_finite(torch.full((9,), 3e38), "x")
    with pytest.raises(BitflowError, match="2 of 3 values of x"):
        checks.check_finite(torch.tensor([float("inf"), 1.0, -float("inf")]), "x")


@pytest.mark.parametrize(
    "x,low",
    [
        (torch.linspace(0, 1, 64).reshape(1, 1, 8, 8), "0 to 1"),
        (torch.arange(192.0).reshape(1, 3, 8, 8), "0 to 191"),
    ],
)
def test_images_that_are_never_dark_are_warned_of(x, low):
    with pytest.warns(UserWarning, match=low):
        checks.warn_of_range(x)


@pytest.mark.parametrize(
    "x",
    [
        torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8),
        3 * torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8),
        torch.rand(1, 4, 8, 8),
        torch.zeros(0, 1, 8, 8),
        torch.zeros(1, 1, 8, 8),
    ],
)
def test_images_samples_and_latents_are_not_warned_of(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.warn_of_range(x)


def test_pixels_may_be_wider_integers_within_8_bits():
    wide = torch.arange(256).reshape(1, 1, 16, 16)
    assert torch.equal(to_model_range(wide), to_model_range(wide.to(torch.uint8)))
    with pytest.raises(BitflowError, match="0 to 256, beyond 8 bits"):
        to_model_range(torch.arange(257))
