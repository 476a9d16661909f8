"""Digits and metrics to watch, for the tests of alarms and of the watcher."""

import math

import torch

from bitflow_edu.scale.alarms import alike


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def group_of(digits, normal, seed=0):
    """Digits with the reference's labels."""
    return digits[alike(normal.labels, digits.labels, seeded(seed))].x


def healthy(n=60):
    g, lines = seeded(0), []
    for i in range(1, n + 1):
        loss = -1.5 + 0.02 * torch.randn((), generator=g).item()
        norm = math.exp(0.2 * torch.randn((), generator=g).item())
        line = {"step": 20 * i, "loss": loss, "grad_norm": norm, "z_rms": 1.0, "seconds": 2.0 * i}
        lines.append(line)
    return lines
