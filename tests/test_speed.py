"""Timing, and what is counted of a call: operations and bytes; the limits of a machine."""

import time

import pytest
import torch

from bitflow_edu import speed
from bitflow_edu.evaluation import timed
from bitflow_edu.speed import Machine, count_flops


class FakeGpu:
    """Takes work at once; its own clock moves by what was ordered. An event notes that clock."""

    def __init__(self):
        self.clock, self.waited = 0.0, []

    def event(self, enable_timing):
        """An event of this device."""

        class Event:
            def record(mark):
                mark.at = self.clock

            def elapsed_time(mark, other):
                assert self.waited, "read before the device was done"
                return other.at - mark.at

        return Event()


def test_on_a_gpu_its_own_clock_is_read_and_waited_for_once(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.waited.append(gpu.clock))
    work = iter([1000.0] * 2 + [3.0, 5.0, 4.0, 6.0, 7.0])

    def call():
        """Orders work that takes no time on this side."""
        gpu.clock += next(work)

    t = timed(call, repeats=5, warmup=2)
    assert t == {"median_ms": 5.0, "low_ms": 3.5, "high_ms": 6.5, "repeats": 5}
    assert gpu.waited == [2025.0]


def test_on_a_processor_the_wall_clock_is_read_without_the_first_calls():
    calls = []

    def call():
        """Slow at first."""
        time.sleep(0.1 if len(calls) < 2 else 0.01)
        calls.append(1)

    t = timed(call, repeats=5, warmup=2)
    assert 10 <= t["median_ms"] < 90 and len(calls) == 7


def test_traffic_of_a_linear_layer_and_of_a_convolution_is_operands_and_results():
    layer, conv = torch.nn.Linear(6, 4), torch.nn.Conv2d(3, 5, 3, padding=1)
    assert speed.bytes_moved(lambda: layer(torch.zeros(7, 6))) == 4 * (6 * 4 + 4 + 7 * 6 + 7 * 4)
    weights, operands = 5 * 3 * 9 + 5, 2 * 3 * 64 + 2 * 5 * 64
    assert speed.bytes_moved(lambda: conv(torch.zeros(2, 3, 8, 8))) == 4 * (weights + operands)
    alone = speed.bytes_moved(lambda: layer(torch.zeros(7, 6)))
    assert speed.bytes_moved(lambda: layer(torch.zeros(7, 6)).exp() + 1) == alone


def test_operations_of_a_linear_layer_are_counted_on_shapes_alone():
    with torch.device("meta"):
        layer, x = torch.nn.Linear(6, 4, bias=False), torch.empty(7, 6)
    assert count_flops(lambda: layer(x)) == 2 * 7 * 6 * 4
    q = torch.empty(1, 2, 5, 8, device="meta")
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attention(q, q, q)) == 2 * (2 * 2 * 5 * 5 * 8)


def test_below_the_ridge_memory_decides_and_above_it_arithmetic():
    machine = Machine(peak=1e12, bandwidth=1e11)
    assert machine.ridge == 10
    assert machine.least_s(1e12, 0) == 1 and machine.least_s(0, 1e11) == 1
    assert machine.least_s(9e11, 1e11) == 1 and machine.least_s(2e12, 1e11) == 2


def test_limits_are_the_faster_calls(monkeypatch):
    side, size = 1536, 2**28
    monkeypatch.setattr(speed, "large_products", lambda *shape: ["slow", "fast"])
    low_ms = {"slow": 8.0, "fast": 4.0}  # of a product; a copy takes 2 ms

    def timed(call, repeats, warmup):
        return {"low_ms": low_ms[call] if isinstance(call, str) else 2.0}

    monkeypatch.setattr(speed, "timed", timed)
    machine = speed.measure_machine()
    assert machine.peak == pytest.approx(2 * side**3 / 4e-3)
    assert machine.bandwidth == pytest.approx(2 * size / 2e-3)


def test_bandwidth_is_that_of_reading_where_reading_is_faster(monkeypatch):
    def timed(call, repeats, warmup):
        return {"low_ms": 1.0 if getattr(call, "func", None) is torch.mv else 3.0}

    monkeypatch.setattr(speed, "timed", timed)
    monkeypatch.setattr(speed, "large_products", lambda *shape: ["product"])
    assert speed.measure_machine().bandwidth == pytest.approx(2**28 / 1e-3)


def test_products_multiply():
    for call in speed.large_products(16, "cpu", torch.float32):
        assert call().shape == (16, 16)
