"""Shared by the tests of streamed evaluation: a source, a tiny network, played processes."""

import torch
from torch import nn

from bitflow_edu.io.processes import SingleProcess
from bitflow_edu.scale.streaming import StreamConfig

CFG = StreamConfig(n=203, batch_size=20, keep=60, subsets=5, subset_size=40, splits=2, parts=4)


class Played(SingleProcess):
    """One of several processes that do not wait for each other."""

    def __init__(self, rank, size):
        self.rank, self.size, self.main = rank, size, rank == 0

    def on_rank_zero(self, fn):
        return fn() if self.main else None


class Tiny(nn.Module):
    """Fixed random features, and logits behind them."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.to_features = nn.Parameter(torch.randn(256, 12, generator=g))
        self.to_logits = nn.Parameter(torch.randn(12, 5, generator=g))

    def forward(self, x):
        f = (x.flatten(1).to(self.to_features) @ self.to_features).tanh()
        return f, f @ self.to_logits


def samples(index):
    """Images by number, each from its own seed."""
    generators = [torch.Generator().manual_seed(int(i)) for i in index]
    return torch.stack([torch.rand(1, 16, 16, generator=g) for g in generators]) * 2 - 1


def source(index):
    """The same as a source: they were asked for no label."""
    return samples(index), None
