"""The pictures that all lessons share: what is drawn is what was given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from bitflow_edu.data import image_grid, to_model_range
from bitflow_edu.imagenet import Plan
from bitflow_edu.lab import plotting
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.scale.costs import bill


@pytest.fixture(autouse=True)
def close_all():
    yield
    plt.close("all")


def test_a_grid_shows_the_exact_pixels_and_white_between_them(digits):
    grid = image_grid(digits.x[:8], columns=5, gap=2)
    first, seventh = (digits.pixels[i, 0].numpy()[..., None] for i in (0, 6))
    assert grid.dtype == np.uint8 and grid.shape == (2 * 18 - 2, 5 * 18 - 2, 3)
    assert (grid[:16, :16] == first).all() and (grid[18:34, 18:34] == seventh).all()
    assert (grid[16:18] == 255).all() and (grid[18:, 3 * 18 :] == 255).all()
    red = to_model_range(torch.tensor([255, 0, 0])[None, :, None, None].expand(1, 3, 2, 2))
    assert (image_grid(red, 1) == [255, 0, 0]).all()  # colours keep their order
    ax = plotting.show_images(digits.x[:8], columns=5)
    assert np.array_equal(ax.images[0].get_array(), image_grid(digits.x[:8], 5))


def test_stretching_uses_the_whole_range():
    stretched = plotting.stretch(torch.tensor([[[-3.0, 1.0], [5.0, 1.0]]]))
    assert stretched.shape == (2, 2)
    torch.testing.assert_close(stretched, torch.tensor([[0.0, 0.5], [1.0, 0.5]]))
    assert plotting.stretch(torch.zeros(3, 2, 2)).equal(torch.zeros(2, 2, 3))


def test_a_matrix_shows_which_entries_are_exactly_zero():
    image = plotting.plot_matrix(torch.tensor([[1.0, 0.0], [1e-9, 2.0]]))
    assert image.get_array().mask.tolist() == [[False, True], [False, False]]


def test_bars_keep_the_order_of_the_table():
    rows = {"a": ([2.0, 4.0], 3.0, 30.0), "b": ([1.0], 1.0, None)}
    pairs = {"b": {"value": -2.0, "low": -3.0, "high": 1.0, "seeds": 2, "versus": "a"}}
    ours, paired, theirs = plotting.plot_rows(rows, pairs, "title", "metric").axes
    assert [bar.get_width() for bar in ours.patches] == [3.0, 1.0]
    assert [bar.get_width() for bar in theirs.patches] == [30.0]
    assert [line.get_xdata().tolist() for line in ours.lines] == [[2.0, 4.0], [1.0]]
    interval, dot, _ = paired.lines
    assert interval.get_xdata().tolist() == [-3.0, 1.0]
    assert dot.get_markerfacecolor() == "white", "the interval holds 0"
    assert len(plotting.plot_rows(rows, {}, "title", "metric").axes) == 2


def test_the_bill_shows_every_stage_of_every_preset():
    smoke = find_preset("imagenet256-b2-smoke")
    ax = plotting.plot_bill({"smoke": smoke})
    drawn = np.concatenate([line.get_xdata() for line in ax.get_lines()])
    assert sorted(drawn) == pytest.approx(sorted(s.dollars(Plan()) for s in bill(smoke)))
