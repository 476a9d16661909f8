"""Streaming: sums that add up, parts, choices, and the same bits from any number of processes."""

import math
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch
from streams import CFG, Played, samples, source

from bitflow_edu.evaluation import as_stored, inception_score, moments
from bitflow_edu.io.files import BitflowError, save_arrays
from bitflow_edu.scale.streaming import (
    SHOWN,
    FeatureStats,
    LabelSums,
    Moments,
    StreamConfig,
    batches_in_parts,
    collect,
    dataset_source,
    kept_mask,
    read_stats,
    save_stats,
)


def same(a, b):
    def arrays(t):
        return t.moments.total, t.moments.outer, t.kept, t.labels.p, t.labels.plogp, t.first

    def counts(t):
        return t.moments.n, t.right, t.asked, t.broken

    return counts(a) == counts(b) and all(map(torch.equal, arrays(a), arrays(b)))


def streamed(features, piece):
    """The sums over features that are looked at piece by piece."""
    return reduce(Moments.__add__, map(Moments.of, features.split(piece)))


# Sums


@pytest.mark.parametrize("n, piece", [(2, 1), (101, 7), (400, 400)])
def test_streamed_moments_are_those_of_the_whole(n, piece):
    f = 3 + torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    for ours, whole in zip(streamed(f, piece).gaussian(), moments(f)):
        assert (ours - whole).abs().max() < 1e-9


def test_one_vector_has_no_covariance():
    with pytest.raises(BitflowError, match="1 feature vectors are too few"):
        Moments.of(torch.ones(1, 3)).gaussian()


def test_streamed_inception_score_is_that_of_the_whole_and_splits_are_averaged():
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).double()
    split = torch.arange(60) * 3 // 60
    parts = [LabelSums.of(part, s, 3) for part, s in zip(logits.split(7), split.split(7))]
    sums = reduce(LabelSums.__add__, parts)
    each = [inception_score(part.softmax(dim=1)) for part in logits.split(20)]
    assert sums.score() == pytest.approx((np.mean(each), np.std(each)), rel=1e-9)


# Configuration, parts, choices


IMPOSSIBLE = dict(n=1, batch_size=0, seed=-1, keep=3, subsets=0, subset_size=1, splits=0, parts=0)


@pytest.mark.parametrize("field, value", IMPOSSIBLE.items())
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(BitflowError, match=f"{field} is {value}"):
        replace(CFG, **{field: value})


def test_more_splits_than_samples_are_refused():
    with pytest.raises(BitflowError, match="draw more, or set splits to 1"):
        StreamConfig(n=9)


@pytest.mark.parametrize(
    "n, batch_size, parts", [(50_000, 128, 64), (203, 20, 4), (7, 3, 64), (10, 50, 3), (64, 1, 64)]
)
def test_every_number_is_in_exactly_one_batch(n, batch_size, parts):
    found = batches_in_parts(StreamConfig(n=n, batch_size=batch_size, parts=parts, splits=1))
    assert [i for part in found for batch in part for i in batch] == list(range(n))
    assert len(found) <= parts and all(len(batch) <= batch_size for part in found for batch in part)


def test_the_choice_is_bounded_and_fixed_by_the_seed():
    assert kept_mask(100, 30).sum() == 30 and kept_mask(20, 30).all()
    assert torch.equal(kept_mask(100, 30, 1), kept_mask(100, 30, 1))
    assert not torch.equal(kept_mask(100, 30, 1), kept_mask(100, 30, 2))


# Collecting


def asked(index):
    """The samples; the label asked for is the number modulo 5."""
    return samples(index), index % 5


def test_three_processes_give_the_bits_of_one(tiny, tmp_path):
    one = collect(source, tiny, CFG, tmp_path / "one")
    for rank in (2, 1, 0):
        three = collect(source, tiny, CFG, tmp_path / "three", Played(rank, 3))
    assert one.moments.n == 203 and len(one.kept) == 60 and same(one, three)
    assert one.labels.count.tolist() == [102, 101]


def test_more_processes_than_parts(tiny, tmp_path):
    for rank in reversed(range(7)):
        many = collect(source, tiny, CFG, tmp_path / "many", Played(rank, 7))
    assert same(many, collect(source, tiny, CFG, tmp_path / "one"))


def test_the_batch_size_changes_no_sample(tiny, tmp_path):
    a = collect(source, tiny, replace(CFG, batch_size=20, parts=64), tmp_path / "20")
    b = collect(source, tiny, replace(CFG, batch_size=33, parts=64), tmp_path / "33")
    assert a.moments.n == b.moments.n == 203
    assert torch.allclose(a.kept, b.kept, atol=1e-6)
    assert torch.allclose(a.moments.outer, b.moments.outer, rtol=1e-6)


def test_kept_features_are_those_of_the_chosen_images(tiny, tmp_path):
    stats = collect(source, tiny, CFG, tmp_path)
    expected = tiny.features(
        as_stored(samples(kept_mask(CFG.n, CFG.keep).nonzero()[:, 0]))
    ).detach()
    assert torch.allclose(stats.kept, expected, atol=1e-6)


DAMAGE = {
    "n": np.array(3.5),
    "total": np.zeros(11),
    "outer": np.zeros((12, 11)),
    "kept": np.zeros((60, 11), np.float32),
    "counts": np.zeros(2, int),
    "count": np.zeros((2, 2)),
    "plogp": np.zeros(3),
    "p": np.zeros(5),
    "first": np.zeros((10, 16), np.float32),
}
CHANGED = [*DAMAGE.items(), ("total", np.full(12, np.nan)), ("outer", np.array("a"))]


@pytest.mark.parametrize("name, array", CHANGED)
def test_a_damaged_part_is_named(tiny, tmp_path, name, array):
    """Of another type or shape, cut off, or without an array."""
    collect(asked, tiny, CFG, tmp_path)
    path = tmp_path / "part-0000.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, name: array})
    with pytest.raises(BitflowError, match="part-0000.npz is damaged"):
        collect(asked, tiny, CFG, tmp_path)
    np.savez(path, **{key: a for key, a in arrays.items() if key != "outer"})
    with pytest.raises(BitflowError, match="part-0000.npz"):
        collect(asked, tiny, CFG, tmp_path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BitflowError, match="part-0000.npz"):
        collect(asked, tiny, CFG, tmp_path)


def test_more_samples_than_anybody_draws_are_refused():
    with pytest.raises(BitflowError, match="n is 1000000000000"):
        StreamConfig(n=10**12)


def test_a_missing_part_is_named(tiny, tmp_path):
    with pytest.raises(BitflowError, match="part-0001.npz is missing"):
        collect(source, tiny, CFG, tmp_path, Played(0, 2))


def test_sums_survive_their_file(tiny, tmp_path):
    stats = collect(asked, tiny, CFG, tmp_path / "parts")
    save_stats(stats, tmp_path / "stats.npz")
    assert same(stats, read_stats(tmp_path / "stats.npz")) and not list(tmp_path.glob("*.part"))
    bare = FeatureStats(stats.moments, None, stats.kept)
    save_stats(bare, tmp_path / "bare.npz")
    back = read_stats(tmp_path / "bare.npz")
    assert back.labels is None and back.first is None and back.asked == 0


def test_parts_of_earlier_versions_are_read(tiny, tmp_path):
    """They hold no counts and no first images."""
    stats = collect(source, tiny, CFG)
    old = {**vars(stats.moments), "kept": stats.kept, **vars(stats.labels)}
    save_arrays(old, tmp_path / "part.npz")
    back = read_stats(tmp_path / "part.npz")
    assert same(replace(stats, first=stats.kept), replace(back, first=stats.kept))
    assert back.first is None


def test_a_source_that_gives_too_few_images_is_refused(tiny, tmp_path):
    with pytest.raises(BitflowError, match="asked for 20 images .0 to 19. and got 19"):
        collect(lambda index: source(index[1:]), tiny, CFG, tmp_path)


def test_in_memory_and_on_disk_are_the_same_bits(tiny, tmp_path):
    assert same(collect(asked, tiny, CFG), collect(asked, tiny, CFG, tmp_path))


def test_processes_without_a_folder_are_refused(tiny):
    with pytest.raises(BitflowError, match="2 processes need a folder"):
        collect(source, tiny, CFG, None, Played(0, 2))


def test_labels_that_are_shown_are_counted(tiny):
    logits = tiny.logits(as_stored(samples(range(CFG.n))))
    shown = (logits.argmax(dim=1) == torch.arange(CFG.n) % 5).sum()
    stats = collect(asked, tiny, CFG)
    assert (stats.right, stats.asked, stats.broken) == (shown, CFG.n, 0)
    assert collect(source, tiny, CFG).asked == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_images_are_counted_and_left_out(tiny, value):
    """One pixel is enough. The rest is what it would be without them."""

    def breaks(index):
        x, c = asked(index)
        x[index % 7 == 0, :, 3, 4] = value
        return x, c

    cfg = replace(CFG, keep=CFG.n)
    stats, number = collect(breaks, tiny, cfg), torch.arange(CFG.n)
    whole = number % 7 != 0
    features, logits = tiny.look(as_stored(samples(number[whole])))
    assert stats.broken == 29 and stats.moments.n == stats.asked == len(stats.kept) == 174
    assert torch.allclose(stats.kept, features.detach(), atol=1e-6)
    assert stats.right == (logits.argmax(dim=1) == number[whole] % 5).sum()
    assert stats.labels.count.sum() == 174 and stats.first.isfinite().all()


def test_a_split_without_a_finite_image_has_no_score(tiny):
    def half(index):
        x = samples(index)
        x[index < 102] = math.nan
        return x, None

    second, spread = collect(half, tiny, CFG).labels.score()
    assert 1 < second < 5 and spread == 0


def test_the_first_images_are_kept_for_a_picture(tiny, tmp_path):
    assert torch.equal(collect(source, tiny, CFG, tmp_path).first, samples(range(SHOWN)))
    few = replace(CFG, n=4)
    assert torch.equal(collect(source, tiny, few).first, samples(range(4)))


def test_where_all_features_are_kept_mean_and_covariance_are_theirs(tiny):
    stats = collect(source, tiny, replace(CFG, keep=CFG.n))
    for ours, expected in zip(stats.gaussian(), moments(stats.kept)):
        assert torch.equal(ours, expected)
    for ours, expected in zip(stats.moments.gaussian(), moments(stats.kept)):
        assert (ours - expected).abs().max() < 1e-9
    few = collect(source, tiny, CFG)
    for ours, expected in zip(few.gaussian(), few.moments.gaussian()):
        assert torch.equal(ours, expected)


def test_a_network_may_look_at_fewer_images_than_are_drawn(tiny):
    seen = []

    def look(x):
        seen.append(len(x))
        return tiny.look(x)

    stats = collect(source, replace(tiny, look=look), replace(CFG, batch_size=100, per_pass=40))
    assert seen == [40, 40, 20, 40, 40, 20, 3] and stats.moments.n == CFG.n


def test_a_dataset_is_a_source(digits):
    number = torch.tensor([3, 0])
    x, labels = dataset_source(digits, labelled=True)(number)
    assert torch.equal(x, digits[[3, 0]].x) and torch.equal(labels, digits.labels[[3, 0]])
    chosen = torch.tensor([7, 8, 9, 5])
    x, labels = dataset_source(digits, chosen)(number)
    assert torch.equal(x, digits[[5, 7]].x) and labels is None


@pytest.mark.parametrize("size", [1, 4, 20])
def test_the_first_images_are_kept_whatever_the_batch(tiny, size):
    cfg = replace(CFG, batch_size=size)
    assert torch.equal(collect(source, tiny, cfg).first, samples(torch.arange(SHOWN)))
