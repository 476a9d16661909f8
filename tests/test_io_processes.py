"""A process that is alone answers every question that the training loop asks of many."""

import inspect

import torch

from bitflow_edu.io.processes import (
    SINGLE_PROCESS,
    SingleProcess,
    distribute_like,
    full_tensor,
    to_local,
)
from bitflow_edu.scale.distributed import Distributed


def test_alone_everything_is_its_own():
    t = torch.arange(3.0)
    assert list(SINGLE_PROCESS.share(5)) == [0, 1, 2, 3, 4] and SINGLE_PROCESS.main
    assert SINGLE_PROCESS.on_rank_zero(lambda: 7) == SINGLE_PROCESS.broadcast(7) == 7
    assert SINGLE_PROCESS.all_reduce_mean([t.sum(), 1]) == [3.0, 1.0]
    assert SINGLE_PROCESS.all_gather(t) is t
    for same in (to_local(t), full_tensor(t), distribute_like(t, torch.zeros(3))):
        assert same is t


def test_many_have_the_methods_of_one():
    """The loop may call no method that one of the two lacks, or with other arguments."""
    for name, method in inspect.getmembers(SingleProcess, inspect.isfunction):
        many = getattr(Distributed, name)
        assert list(inspect.signature(many).parameters) == list(
            inspect.signature(method).parameters
        ), name
