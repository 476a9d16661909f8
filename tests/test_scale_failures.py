"""The numbers in which failures show, and the limit between real and planted."""

import math

import pytest
import torch

from bitflow_edu.scale.failures import Bound, seams


def test_a_limit_lies_half_way_but_four_spreads_off():
    assert Bound(1.0, 0.01, 0.0).limit == 0.5
    assert Bound(0.0, 0.2, 1.0).limit == pytest.approx(0.8)
    assert Bound(0.0, 0.3, 1.0).limit is None and not Bound(0.0, 0.3, 1.0).crossed(9)
    assert Bound(math.nan, math.nan, math.nan).limit is None


def test_seams_see_a_step_at_the_border():
    x = (
        torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        + torch.arange(8)[:, None] // 4 * 5.0
    )
    assert seams(x, 4) > 1 and math.isnan(seams(x, 8))
    assert abs(seams(torch.zeros(2, 1, 8, 8), 4)) == 0
