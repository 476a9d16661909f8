"""Round trips in floating point."""

import math

import pytest
import torch

from bitflow_edu.bijections import Identity
from bitflow_edu.excursions.rounding import check_invertible
from bitflow_edu.io.files import BitflowError


def test_check_invertible_names_what_is_lost():
    class Rounds(Identity):
        def forward(self, x):
            return x.round(), x.new_zeros(len(x))

    class Overflows(Identity):
        def forward(self, x):
            return x * math.inf, x.new_zeros(len(x))

    with pytest.raises(BitflowError, match="Rounds does not come back"):
        check_invertible(Rounds(), torch.tensor([[0.3]]))
    with pytest.raises(BitflowError, match="not finite"):
        check_invertible(Overflows(), torch.tensor([[0.3]]))
