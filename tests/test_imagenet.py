"""What a lost machine costs, and the assumptions of a bill."""

from dataclasses import replace

import pytest

from bitflow_edu.imagenet import GPUS, Around, Plan, lost_share


def test_the_best_interval_is_youngs():
    best = (2 * 0.01 * 200) ** 0.5
    loses = [lost_share(best * f, 0.01, 0.5, 200) for f in (0.5, 0.9, 1.0, 1.1, 2.0)]
    assert min(loses) == loses[2] == pytest.approx((2 * 0.01 / 200) ** 0.5 + 0.5 / 200)


def test_a_plan_is_complete_and_can_be_changed():
    """Every assumption is a field with a default; the GPUs are found by name."""
    assert Plan().gpu is GPUS["H100"] and all(name == gpu.name for name, gpu in GPUS.items())
    assert replace(Plan(), gpu=GPUS["A100"]).around == Around() == Plan().around
    assert 0 < Plan().mfu < 1 and 0 < Plan().scaling <= 1
