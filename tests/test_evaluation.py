"""Metrics against references, and the judge."""

import time

import numpy as np
import pytest
import scipy.linalg
import torch

from bitflow_edu import evaluation
from bitflow_edu.data import load_data
from bitflow_edu.evaluation import (
    accuracy,
    as_stored,
    fd,
    frechet_distance,
    load_classifier,
    matrix_sqrt,
    timed,
)
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.files import BitflowError


def scipy_fd(a, b):
    """The distance as it is usually computed: scipy's square root of the product of covariances."""
    a, b = a.double().numpy(), b.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    spread = np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + spread


@pytest.mark.parametrize("n,k", [(200, 5), (500, 20), (12, 20)])
def test_frechet_distance_is_scipys(n, k):
    torch.manual_seed(n)
    a = torch.randn(n, k) @ torch.randn(k, k)
    b = torch.randn(n + 7, k) @ torch.randn(k, k) + 0.3
    within = 1e-2 if n < k else 1e-6  # fewer vectors than features: rank-deficient
    assert frechet_distance(a, b) == pytest.approx(scipy_fd(a, b), rel=within)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_two_known_gaussians():
    a = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    b = 3 * a + 5
    variance = 4 / 3
    assert frechet_distance(a, b) == pytest.approx(25 + variance * (3 - 1) ** 2)


def test_matrix_square_root():
    m = torch.randn(6, 6, dtype=torch.float64)
    m = m @ m.T
    torch.testing.assert_close(matrix_sqrt(m) @ matrix_sqrt(m), m)


@pytest.mark.parametrize("features", [torch.zeros(1, 4), torch.full((10, 4), float("nan"))])
def test_features_without_a_covariance_are_refused(features):
    with pytest.raises(BitflowError):
        frechet_distance(features, torch.randn(10, 4))


@pytest.mark.parametrize("size,least", [(28, 0.99), (16, 0.98)])
def test_the_judge_reads_test_digits(size, least):
    test = load_data(DataConfig("mnist-mini", size), "test")
    assert accuracy(load_classifier(), as_stored(test.x), test.labels) >= least


def test_the_judge_notices_what_it_should(digits):
    """Noise, blur and a missing digit all cost distance, and more of them costs more."""
    judge, train = load_classifier(), load_data(DataConfig("mnist-mini", 16))[:2000]
    floor = fd(judge, train.x, digits.x)
    noise = torch.randn(train.x.shape, generator=torch.Generator().manual_seed(0))
    noisy = [fd(judge, train.x + s * noise, digits.x) for s in (0.3, 0.6)]
    no_sevens = fd(judge, train.x[train.labels != 7], digits.x)
    assert floor < noisy[0] < noisy[1] and floor < no_sevens


def test_timed_gives_median_and_quartiles(monkeypatch):
    """On a clock that the calls themselves move: 5 ms each to warm up, then 10, 20, … 70 ms."""
    clock, durations = [0.0], iter([5, 5, *range(10, 80, 10)])
    monkeypatch.setattr("bitflow_edu.evaluation.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)

    def call():
        clock[0] += next(durations) / 1000

    t = timed(call, repeats=7, warmup=2)
    assert (t["low_ms"], t["median_ms"], t["high_ms"]) == pytest.approx((20, 40, 60))
    assert t["repeats"] == 7 and next(durations, None) is None


def test_timed_measures_time():
    t = timed(lambda: time.sleep(0.01), repeats=10, warmup=1)
    assert 10 <= t["low_ms"] <= t["median_ms"] <= t["high_ms"] and t["repeats"] == 10


def test_quartiles_of_two_times_lie_between_them(monkeypatch):
    monkeypatch.setattr(evaluation, "call_times", lambda fn, repeats: [1.0, 8.0])
    found = timed(print, repeats=2, warmup=0)
    assert (found["low_ms"], found["median_ms"], found["high_ms"]) == (1.0, 4.5, 8.0)
