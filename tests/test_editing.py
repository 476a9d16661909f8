"""Masks, inpainting, class editing, influence, drift and strangeness."""

from functools import partial

import pytest
import torch

from bitflow_edu.data import patchify
from bitflow_edu.editing import (
    auc,
    check_mask,
    decode,
    drift,
    edit_class,
    encode,
    hide,
    influence,
    inpaint,
    interpolate,
    keep_known,
    lerp,
    paste,
    reconstruct,
    roc_curve,
    slerp,
    strangeness,
    token_mask,
)
from bitflow_edu.exact_inverse import exact_inverse
from bitflow_edu.guidance import guided_pass
from bitflow_edu.inverse_strategies import mse
from bitflow_edu.io.files import BitflowError
from bitflow_edu.reverse_model import one_pass
from conftest import small_flow, small_reverse


@pytest.fixture(scope="module")
def pair():
    flow = small_flow()
    return flow, small_reverse(flow)


def batch(n=4, side=6):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, side, side, generator=g) * 2 - 1, torch.tensor([0, 1, 2, -1])[:n]


def window():
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[1, 3] = False
    return mask


def test_any_hidden_pixel_hides_its_token():
    known = token_mask(window(), 2)
    assert known.shape == (1, 9) and (~known).nonzero().tolist() == [[0, 1]]
    each = token_mask(torch.stack([window(), torch.ones(6, 6, dtype=torch.bool)]), 3)
    assert each.tolist() == [[True, False, True, True], [True] * 4]


@pytest.mark.parametrize(
    "mask, seen",
    [
        (torch.ones(6, 6), "torch.float32"),
        (torch.ones(5, 6, dtype=torch.bool), r"\(5, 6\)"),
        (torch.ones(36, dtype=torch.bool), r"\(36,\)"),
        (torch.ones(2, 6, 6, dtype=torch.bool), r"\(2, 6, 6\)"),
        (torch.ones(4, 1, 6, 6, dtype=torch.bool), r"\(4, 1, 6, 6\)"),
    ],
)
def test_wrong_masks_are_refused(pair, mask, seen):
    x, c = batch()
    with pytest.raises(BitflowError, match=seen):
        check_mask(mask, x)
    with pytest.raises(BitflowError, match=seen):
        inpaint(*pair, x, mask, c)
    with pytest.raises(BitflowError, match=seen):
        paste(x, x, mask)
    with pytest.raises(BitflowError, match=seen):
        hide(x, mask)


def test_wrong_labels_images_and_options_are_refused(pair):
    flow, G = pair
    x, c = batch()
    with pytest.raises(BitflowError, match="label 3 is out of range"):
        edit_class(flow, G, x, c, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(BitflowError, match="label -2 is out of range"):
        encode(flow, x, c - 1)
    with pytest.raises(BitflowError, match="label 7 is out of range"):
        inpaint(flow, G, x, window(), c, to=torch.full_like(c, 7))
    with pytest.raises(BitflowError, match="one label for each image"):
        encode(flow, x, c[:2])
    with pytest.raises(BitflowError, match="resize"):
        encode(flow, x[..., :4], c)
    with pytest.raises(BitflowError, match="repeats is 0"):
        inpaint(flow, G, x, window(), c, repeats=0)
    with pytest.raises(BitflowError, match="steps -1"):
        inpaint(flow, G, x, window(), c, steps=-1)
    with pytest.raises(BitflowError, match="refining needs one pass"):
        inpaint(flow, G, x, window(), c, w=1.0, steps=2)
    with pytest.raises(BitflowError, match="not function with w = None"):
        inpaint(flow, lambda z, c: torch.zeros(4, 1, 6, 6), x, window(), c, steps=2)
    with pytest.raises(BitflowError, match="at least 2"):
        interpolate(flow, G, x, x, c, steps=1)
    with pytest.raises(BitflowError, match="needs a ReverseModel"):
        decode(lambda z, c: z, encode(flow, x, c), c, w=1.0)


def test_nothing_hidden_is_reconstruction(pair):
    flow, G = pair
    x, c = batch()
    everything = torch.ones(6, 6, dtype=torch.bool)
    whole = reconstruct(flow, G, x, c)
    assert torch.equal(inpaint(flow, G, x, everything, c), whole)
    assert torch.equal(whole, one_pass(G, flow(x, c).z, c))
    guided = guided_pass(G, flow(x, c).z, c, 1.5)
    torch.testing.assert_close(inpaint(flow, G, x, everything, c, w=1.5), guided)


def test_the_noise_of_known_tokens_is_kept_and_the_rest_is_new(pair):
    flow, _ = pair
    x, c = batch()
    seen, eps = [], torch.randn(4, 9, 4)

    def spy(z, c):
        seen.append(z)
        return torch.zeros(4, 1, 6, 6)

    inpaint(flow, spy, x, window(), c, eps=eps)
    known = token_mask(window(), 2)[0]
    assert torch.equal(seen[0][:, known], encode(flow, hide(x, window()), c)[:, known])
    assert torch.equal(seen[0][:, ~known], eps[:, ~known])


def test_hidden_pixels_have_no_influence(pair):
    x, c = batch()
    other = torch.where(window(), x, torch.rand(4, 1, 6, 6))
    for repeats in (1, 3):
        y, z = (inpaint(*pair, v, window(), c, repeats=repeats) for v in (x, other))
        assert torch.equal(y, z)


def test_refining_brings_the_known_pixels_closer_and_looks_at_no_hidden_one(pair):
    x, c = batch()
    other = torch.where(window(), x, torch.rand(4, 1, 6, 6))

    def error(y):
        return (y - paste(x, y, window())).square().sum()

    rough, fine = (inpaint(*pair, x, window(), c, steps=steps) for steps in (0, 20))
    assert error(fine) < 0.9 * error(rough) and not fine.requires_grad
    assert torch.equal(fine, inpaint(*pair, other, window(), c, steps=20))


def test_a_mask_for_each_image_and_paste(pair):
    x, c = batch(2)
    masks = torch.stack([window(), torch.ones(6, 6, dtype=torch.bool)])
    y = inpaint(*pair, x, masks, c)
    torch.testing.assert_close(y[1], reconstruct(*pair, x, c)[1])
    pasted = paste(x, y, masks)
    assert torch.equal(pasted[1], x[1]) and pasted[0, 0, 1, 3] == y[0, 0, 1, 3]
    assert torch.equal(pasted[0, 0][window()], x[0, 0][window()])
    assert (hide(x, masks, 0.5)[0, 0] == 0.5).sum() == 1


def test_repeats_encode_the_pasted_result(pair):
    flow, G = pair
    x, c = batch()
    eps = torch.randn(4, 9, 4)
    once = inpaint(flow, G, x, window(), c, eps=eps)
    z = encode(flow, paste(x, once, window()), c)
    again = decode(G, keep_known(z, eps, token_mask(window(), 2)), c)
    torch.testing.assert_close(inpaint(flow, G, x, window(), c, eps=eps, repeats=2), again)


def test_class_editing_decodes_with_the_other_label(pair):
    flow, G = pair
    x, c = batch()
    to = (c.clamp(min=0) + 1) % 3
    y = edit_class(flow, G, x, c, to)
    assert y.shape == x.shape
    assert torch.equal(y, one_pass(G, flow(x, c).z, to))
    assert not torch.equal(y, reconstruct(flow, G, x, c))
    back = reconstruct(flow, partial(exact_inverse, flow), x, c)
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)


def test_guidance_scale_goes_into_a_model_that_takes_one():
    flow = small_flow()
    G = small_reverse(flow, max_guidance=2.0)
    x, c = batch()
    z = encode(flow, x, c)
    assert torch.equal(decode(G, z, c, 1.0), one_pass(G, z, c, 1.0))
    assert torch.equal(decode(G, z, c), one_pass(G, z, c, 0.0))


def test_paths_end_where_they_should_and_the_arc_keeps_its_length(pair):
    a, b = torch.randn(5, 9, 40), torch.randn(5, 9, 40)
    for path in (lerp, slerp):
        torch.testing.assert_close(path(a, b, 0.0), a, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(path(a, b, 1.0), b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(path(a, a, 0.3), a, atol=1e-4, rtol=1e-4)
    length = [v.flatten(1).norm(dim=1) for v in (a, b, slerp(a, b, 0.5))]
    torch.testing.assert_close(length[2], (length[0] + length[1]) / 2)
    assert slerp(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 0.5).isfinite().all()
    assert slerp(a, -a, 0.5).isfinite().all()
    x, c = batch()
    walk = interpolate(*pair, x, x.flip(0), c, steps=3)
    torch.testing.assert_close(walk[0], reconstruct(*pair, x, c), atol=1e-4, rtol=1e-4)
    assert walk.shape == (3, *x.shape)


def test_influence_is_triangular_for_a_block_and_full_for_the_flow(pair):
    flow, G = pair
    x, c = batch(1)
    tokens = patchify(x, 2)
    one = influence(lambda v: flow.blocks[0](v, c)[0], tokens)
    other = influence(lambda v: flow.blocks[1](v, c)[0], tokens)
    assert one.triu(1).max() == 0 and one.tril()[one.tril() > 0].numel() == 45
    assert other.tril(-1).max() == 0
    both = influence(lambda v: flow.blocks[1](flow.blocks[0](v, c)[0], c)[0], tokens)
    assert both.min() > 0 and influence(lambda v: patchify(G(v, c).image, 2), tokens).min() > 0
    scaled = influence(lambda v: 3 * v, tokens)
    torch.testing.assert_close(scaled, 3 * 2.0 * torch.eye(9))  # ‖3·1₄‖ = 6


def test_drift_of_an_exact_inverse_is_rounding(pair):
    flow, G = pair
    x, c = batch()
    exact = drift(flow, partial(exact_inverse, flow), x, c, 3)
    assert len(exact) == 4 and exact[0] is x and mse(exact[-1], x).max() < 1e-8
    twice = reconstruct(flow, G, reconstruct(flow, G, x, c), c)
    assert torch.equal(drift(flow, G, x, c, 2)[2], twice)


def test_strangeness_and_areas(pair):
    x, c = batch()
    scores = strangeness(*pair, x, mse)
    assert list(scores) == ["bits/dim", "round trip", "features"]
    assert all(v.shape == (4,) and v.isfinite().all() for v in scores.values())
    torch.testing.assert_close(scores["round trip"] ** 2 / 36, scores["features"])
    low, high = torch.tensor([0.0, 1, 2]), torch.tensor([3.0, 4])
    assert auc(low, high) == 1 and auc(high, low) == 0 and auc(low, low) == 0.5
    a, b = torch.randn(50).round(), torch.randn(60).round() + 1
    alarms, hits = roc_curve(a, b)
    assert (alarms[0], hits[0], alarms[-1], hits[-1]) == (0, 0, 1, 1)
    assert abs(torch.trapezoid(hits, alarms).item() - auc(a, b)) < 1e-5


def test_a_roc_curve_counts_scores_at_each_limit():
    inside, outside = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([2.0, 4.0])
    alarms, hits = roc_curve(inside, outside)
    assert alarms.tolist() == [0, 0, 0.25, 0.75, 1] and hits.tolist() == [0, 0.5, 0.5, 1, 1]


def test_a_hole_does_not_hide_a_wrong_range(pair):
    """What stands in the hole is −1, so the images themselves have to be looked at."""
    x, mask = torch.rand(4, 1, 6, 6), window()
    with pytest.warns(UserWarning, match=r"\[0, 1\]"):
        inpaint(*pair, x, mask, torch.zeros(4, dtype=torch.long))


def test_a_fill_that_does_not_fit_is_named():
    with pytest.raises(BitflowError, match=r"fill of shape \(3, 1, 6, 6\) does not fit"):
        hide(torch.zeros(2, 1, 6, 6), window(), torch.zeros(3, 1, 6, 6))
