"""Evaluation from a stream: metrics, resuming, statistics files, agreement with torchmetrics."""

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
from PIL import Image
from streams import CFG, Tiny, samples, source
from torch import nn

from bitflow_edu.evaluation import as_stored, frechet_distance, kid, moments, precision_recall
from bitflow_edu.io import files
from bitflow_edu.io.files import BitflowError, names_in
from bitflow_edu.io.results import measurement
from bitflow_edu.scale.feature_networks import own_network
from bitflow_edu.scale.fid import (
    Reference,
    check_enough,
    evaluate_stream,
    figures,
    gaussian_distance,
    import_reference,
    kid_over_subsets,
    make_reference,
    read_reference,
    reference_in_memory,
    reference_path,
    shared_territory,
)
from bitflow_edu.scale.image_sources import FolderImages, StoredImages
from bitflow_edu.scale.streaming import Moments, collect, dataset_source, kept_mask


@pytest.fixture(scope="module")
def reference(tiny, digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    return make_reference(digits[:500], tiny, path, CFG)


def values(found):
    return {m["metric"]: m["value"] for m in found}


def streamed(features, piece):
    """The sums over features that are looked at piece by piece."""
    return reduce(Moments.__add__, map(Moments.of, features.split(piece)))


def test_distance_from_statistics_is_that_from_features():
    a, b = torch.randn(50, 6), 1 + torch.randn(70, 6)
    both = [Reference(*streamed(f, 9).gaussian()) for f in (a, b)]
    assert math.isclose(gaussian_distance(*both), frechet_distance(a, b), rel_tol=1e-9)


# The whole evaluation


def test_metrics_are_named_after_the_network_and_say_what_they_are(tiny, reference, tmp_path):
    def more():
        return [measurement("one-pass", "nfe", 1)]

    done = evaluate_stream(source, reference, tiny, CFG, folder=tmp_path / "run", more=more)
    by_name = {m["metric"]: m for m in done.measurements}
    fd, _, kernel, precision, recall, _ = done.measurements
    named = [f"{kind}[tiny]" for kind in "fd inception_score kid precision recall".split()]
    assert list(by_name) == [*named, "nfe"]
    assert fd["n"] == 203 and fd["reference"] == "digits.npz" and fd["row"] == "one-pass"
    assert kernel["kept"] == 60 and kernel["subset_size"] == 40
    features = tiny.features(as_stored(samples(range(203)))).detach()
    expected = gaussian_distance(Reference(*moments(features)), reference)
    assert math.isclose(fd["value"], expected, rel_tol=1e-6)
    shares = precision_recall(reference.features, features[kept_mask(203, 60)])
    assert (precision["value"], recall["value"]) == pytest.approx(shares, abs=0.04)
    assert torch.equal(done.first, samples(range(10)))


def test_distance_in_memory_on_disk_and_from_features_are_the_same_bits(tiny, digits, tmp_path):
    cfg = replace(CFG, keep=CFG.n, per_pass=10)
    real = reference_in_memory(digits[:150], tiny, cfg, "150 digits")
    made = make_reference(digits[:150], tiny, tmp_path / "digits.npz", cfg)
    assert torch.equal(real.sigma, made.sigma) and torch.equal(real.features, made.features)
    in_memory = evaluate_stream(source, real, tiny, cfg)
    on_disk = evaluate_stream(source, made, tiny, cfg, folder=tmp_path / "run")
    assert values(in_memory.measurements) == values(on_disk.measurements)
    assert torch.equal(in_memory.first, on_disk.first)

    def features(x):
        return torch.cat([tiny.features(part).detach() for part in as_stored(x).split(10)])

    drawn = torch.cat([features(samples(batch)) for batch in torch.arange(203).split(20)])
    expected = frechet_distance(drawn, features(digits[:150].x))
    assert in_memory.measurements[0]["value"] == expected
    assert in_memory.measurements[0]["reference"] == "150 digits"


@pytest.mark.parametrize("right, asked", [(2, 3), (600, 1000), (0, 5), (5, 5)])
def test_label_accuracy_is_the_mean_over_images_that_were_asked_for_a_label(
    tiny, reference, right, asked
):
    stats = collect(source, tiny, CFG)
    found = figures(replace(stats, right=right, asked=asked), reference, tiny, CFG, "exact")
    accuracy = {m["metric"]: m for m in found}["label_accuracy"]
    shown = torch.arange(asked) < right
    assert accuracy["value"] == shown.float().mean().item() and accuracy["n"] == asked


def test_broken_samples_stand_beside_the_distance_of_the_others(tiny, reference):
    def breaks(index):
        x = samples(index)
        x[index % 5 == 0] = math.nan
        return x, index % 5

    by_name = {m["metric"]: m for m in evaluate_stream(breaks, reference, tiny, CFG).measurements}
    share = 1 - (torch.arange(203) % 5 != 0).float().mean().item()
    assert by_name["broken_samples"]["value"] == share and by_name["broken_samples"]["n"] == 203
    assert by_name["fd[tiny]"]["n"] == by_name["label_accuracy"]["n"] == 162
    expected = samples(torch.arange(203)[torch.arange(203) % 5 != 0])
    features = tiny.features(as_stored(expected)).detach()
    distance = gaussian_distance(Reference(*moments(features)), reference)
    assert math.isclose(by_name["fd[tiny]"]["value"], distance, rel_tol=1e-6)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_finite_samples_are_refused(n):
    with pytest.raises(BitflowError, match=f"{n} finite samples"):
        check_enough(n)


def clouds(*sizes):
    g = torch.Generator().manual_seed(1)
    return [i / 20 + torch.rand(n, 12, generator=g) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("size", [50, 1000])
def test_what_rows_share_changes_no_bit(size):
    """KID, precision and recall are those of lesson 06, for the first row and for the next."""
    real, *rows = clouds(120, 90, 90, 130, 90)
    known = Reference(*moments(real), real)
    for fake in rows:
        generator, values = torch.Generator().manual_seed(5), []
        for _ in range(7):
            n = min(size, len(real), len(fake))
            a, b = (f[torch.randperm(len(f), generator=generator)[:n]] for f in (real, fake))
            values.append(kid(a, b))
        values = torch.tensor(values, dtype=torch.float64)
        expected = values.mean().item(), values.std(correction=0).item()
        assert kid_over_subsets(known, fake, 7, size, seed=5) == expected
        for k in (1, 3):
            assert shared_territory(known, fake, k) == precision_recall(real, fake, k)
    real, fake = clouds(1300, 1100)
    known = Reference(*moments(real), real)
    assert shared_territory(known, fake, 3) == precision_recall(real, fake, 3)


def test_kernel_distances_are_the_formula_to_the_bit():
    a, b = clouds(40, 30)

    def kernel(a, b):
        return (a.double() @ b.double().T / 12 + 1) ** 3

    def within(m):
        return (m.sum() - m.trace()) / (len(m) * (len(m) - 1))

    own = within(kernel(a, a)) + within(kernel(b, b))
    assert kid(a, b) == (own - 2 * kernel(a, b).mean()).item()


def test_few_finite_samples_are_enough_for_every_metric(tiny, digits):
    def two(index):
        x = samples(index)
        x[index > 1] = math.nan
        return x, None

    real = reference_in_memory(digits[:50], tiny, CFG, "50 digits")
    found = values(evaluate_stream(two, real, tiny, replace(CFG, keep=203)).measurements)
    assert all(math.isfinite(v) for v in found.values()) and "recall[tiny]" in found


def test_the_end_leaves_statistics_in_the_common_form(tiny, reference, tmp_path):
    def never(index):
        pytest.fail("a finished evaluation draws nothing")

    run = dict(cfg=CFG, folder=tmp_path / "run")
    first = evaluate_stream(source, reference, tiny, **run)
    left = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert left == ["first.npz", "measurements.json", "settings.json", "statistics.npz"]
    statistics = read_reference(tmp_path / "run" / "statistics.npz")
    distance = gaussian_distance(statistics, reference)
    assert math.isclose(distance, first.measurements[0]["value"], rel_tol=1e-9)
    again = evaluate_stream(never, reference, tiny, **run, resume=True)
    assert again.measurements == first.measurements and torch.equal(again.first, first.first)
    (tmp_path / "run" / "first.npz").unlink()  # as earlier versions left it
    assert evaluate_stream(never, reference, tiny, **run, resume=True).first is None


def test_settings_say_all_that_the_figures_depend_on(tiny, reference, tmp_path):
    evaluate_stream(source, reference, tiny, CFG, folder=tmp_path / "run", about={"w": 0.0})
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    numbers = "n batch_size seed keep subsets subset_size splits neighbours parts".split()
    content = ["network_weights", "reference_content"]
    assert list(settings) == ["row", "features", "reference", *numbers, *content, "w"]


@pytest.mark.parametrize("broken_after", [0, 3, 7, 10])
def test_resumed_is_unbroken_to_the_bit(tiny, reference, tmp_path, broken_after):
    calls = []

    def breaks(index):
        calls.append(index)
        if len(calls) > broken_after:
            raise KeyboardInterrupt
        return source(index)

    def counts(index):
        calls.append(index)
        return source(index)

    def run(images, name, **kw):
        folder = tmp_path / name
        return evaluate_stream(images, reference, tiny, CFG, folder=folder, **kw)

    with pytest.raises(KeyboardInterrupt):
        run(breaks, "broken")
    drawn = len(calls) - 1
    resumed, unbroken = run(counts, "broken", resume=True), run(source, "unbroken")
    assert resumed.measurements == unbroken.measurements
    assert torch.equal(resumed.first, unbroken.first)
    # parts of three batches: whole ones are not drawn again
    assert len(calls) - 1 - drawn == 11 - drawn // 3 * 3


def test_a_state_of_other_settings_is_refused(tiny, reference, tmp_path):
    def run(cfg=CFG, **kw):
        folder = tmp_path / "run"
        return evaluate_stream(source, reference, tiny, cfg, folder=folder, **kw)

    run(about={"w": 0.0})
    with pytest.raises(BitflowError, match="go on with it with --resume"):
        run(about={"w": 0.0})
    with pytest.raises(BitflowError, match="w = 0.0, not 1.5"):
        run(about={"w": 1.5}, resume=True)
    with pytest.raises(BitflowError, match="batch_size = 20, not 30"):
        run(replace(CFG, batch_size=30), about={"w": 0.0}, resume=True)
    (tmp_path / "run" / "settings.json").write_text("{")
    with pytest.raises(BitflowError, match="settings.json"):
        run(resume=True)


def test_a_folder_of_something_else_is_refused(tiny, reference, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BitflowError, match="holds notes.txt but no settings.json"):
        evaluate_stream(source, reference, tiny, CFG, folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("finite", [0, 1])
@pytest.mark.filterwarnings("ignore:one-pass. 20")
def test_of_broken_samples_alone_their_share_is_the_figure(tiny, reference, tmp_path, finite):
    """In memory, on disk, and when it goes on: nothing is raised that would end other rows."""

    def breaks(index):
        x = samples(index)
        x[index >= finite] = math.nan
        return x, index % 5

    def more():
        return [measurement("one-pass", "nfe", 1)]

    run = dict(reference=reference, network=tiny, cfg=CFG, more=more)
    on_disk = evaluate_stream(breaks, **run, folder=tmp_path / "a")
    again = evaluate_stream(breaks, **run, folder=tmp_path / "a", resume=True)
    broken, nfe = evaluate_stream(breaks, **run).measurements
    assert on_disk.measurements == again.measurements == [broken, nfe]
    assert broken["metric"] == "broken_samples" and broken["n"] == 203
    assert broken["value"] == pytest.approx(1 - finite / 203) and nfe["metric"] == "nfe"


def test_broken_samples_are_said(tiny, reference):
    def breaks(index):
        x = samples(index)
        x[index % 5 == 0] = math.inf
        return x, None

    with pytest.warns(UserWarning, match="exact: 41 of 203 samples are broken"):
        evaluate_stream(breaks, reference, tiny, CFG, "exact")


def test_features_that_are_not_finite_are_refused(tiny, tmp_path):
    bad = own_network(nn.Flatten(), "bad")
    bad = replace(bad, look=lambda x: (x.flatten(1) / 0, None))
    other = Reference(torch.zeros(256), torch.eye(256))
    with pytest.raises(BitflowError, match="not finite"):
        evaluate_stream(source, other, bad, CFG, folder=tmp_path / "b")


def test_a_reference_of_another_width_is_refused_at_the_first_batch(tiny, tmp_path):
    calls, wide = [], Reference(torch.zeros(2048), torch.eye(2048))

    def counts(index):
        calls.append(index)
        return source(index)

    with pytest.raises(BitflowError, match="tiny gives 12 features, the reference has 2048"):
        evaluate_stream(counts, wide, tiny, CFG, folder=tmp_path)
    assert len(calls) == 1


def test_no_space_is_a_clear_end(tiny, reference, tmp_path, monkeypatch):
    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.np, "savez", full)
    with pytest.raises(BitflowError, match="No space left"):
        evaluate_stream(source, reference, tiny, CFG, folder=tmp_path / "run")
    monkeypatch.undo()
    done = evaluate_stream(source, reference, tiny, CFG, folder=tmp_path / "run", resume=True)
    assert done.measurements


TWO = """
import json, sys
from pathlib import Path
from bitflow_edu.data import load_data
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.scale.distributed import end, find_processes, together
from bitflow_edu.scale.feature_networks import own_network
from bitflow_edu.scale.fid import evaluate_stream, make_reference
from streams import CFG, Tiny, source
processes, here, tiny = find_processes(), Path(sys.argv[1]), own_network(Tiny(), "tiny")
digits = load_data(DataConfig("mnist-mini", 16), "test")[:500]
reference = make_reference(digits, tiny, here / "digits.npz", CFG, processes)
run = dict(folder=here / "run", processes=processes)
found, first = evaluate_stream(source, reference, tiny, CFG, **run)
assert (first is None) == (processes.rank != 0)
(here / f"found-{processes.rank}-of-{processes.size}.json").write_text(json.dumps(found))
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
    alone = evaluate_stream(source, reference, tiny, CFG, folder=tmp_path / "alone")
    assert found[0] == found[1] == alone.measurements


# Statistics files


def test_reference_is_made_once_and_named_after_what_it_is(tiny, digits, tmp_path):
    path = reference_path(tmp_path, "mnist-mini", "test", 16, tiny)
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


def flipped(digits):
    """As many images, another pixel in one of them."""
    pixels = digits.pixels.clone()
    pixels[5, 0, 8, 8] ^= 1
    return replace(digits, pixels=pixels)


def other_labels(digits):
    return replace(digits, labels=digits.labels.flip(0))


@pytest.mark.parametrize("change", [flipped, other_labels])
def test_a_reference_of_other_images_is_not_taken_for_these(tiny, digits, tmp_path, change):
    path, part = tmp_path / "digits.npz", digits[:100]
    made = make_reference(part, tiny, path, CFG)
    with pytest.raises(BitflowError, match="digits.npz was made with real_images = "):
        make_reference(change(part), tiny, path, CFG)
    other = own_network(Tiny(), "tiny")
    with torch.no_grad():
        other = replace(other, weights="other weights of the same name")
    with pytest.raises(BitflowError, match="network_weights = .*, not other weights"):
        make_reference(part, other, path, CFG)
    assert torch.equal(make_reference(part, tiny, path, CFG).mu, made.mu)


def test_a_reference_that_notes_no_images_is_made_again(tiny, digits, tmp_path):
    """As earlier versions wrote it. A file that notes nothing is somebody's, and left alone."""
    path, part = tmp_path / "digits.npz", digits[:100]
    made = make_reference(part, tiny, path, CFG)
    arrays = {name: np.load(path)[name] for name in ("mu", "sigma", "features")}
    arrays["mu"] = arrays["mu"] + 1
    about = {"network": "tiny", "n": 100, "keep": CFG.keep}
    np.savez(path, **arrays, about=json.dumps(about))
    assert torch.equal(make_reference(part, tiny, path, CFG).mu, made.mu)
    np.savez(path, **arrays)
    with pytest.raises(BitflowError, match="delete it to make it anew"):
        make_reference(part, tiny, path, CFG)
    assert np.array_equal(np.load(path)["mu"], arrays["mu"])
    np.savez(path, **arrays, about="{")
    with pytest.raises(BitflowError, match="digits.npz is damaged"):
        make_reference(part, tiny, path, CFG)


def test_rows_against_another_reference_of_the_same_name_are_not_taken_over(
    tiny, reference, tmp_path
):
    run = dict(network=tiny, cfg=CFG, folder=tmp_path / "run")
    evaluate_stream(source, reference, **run)
    for other in (
        replace(reference, mu=reference.mu + 1e-9),
        replace(reference, features=reference.features[:-1]),
        replace(reference, features=None),
    ):
        with pytest.raises(BitflowError, match="reference_content = "):
            evaluate_stream(source, other, **run, resume=True)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    del settings["reference_content"], settings["network_weights"]
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(BitflowError, match="made by an earlier version.*name another folder"):
        evaluate_stream(source, reference, **run, resume=True)


DAMAGE = {
    "settings.json": ["[]", "null", "3", "{"],
    "measurements.json": ["[", "null", "[1]", "[]", '[{"row": "one-pass"}]', '{"row": 3}'],
    "first.npz": ["cut"],
}


@pytest.mark.parametrize("name, text", [(n, text) for n, texts in DAMAGE.items() for text in texts])
def test_a_damaged_evaluation_is_named(tiny, reference, tmp_path, name, text):
    run = dict(reference=reference, network=tiny, cfg=CFG, folder=tmp_path / "run")
    evaluate_stream(source, **run)
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(BitflowError, match=name):
        evaluate_stream(source, **run, resume=True)


def test_first_images_of_another_kind_are_named(tiny, reference, tmp_path):
    run = dict(reference=reference, network=tiny, cfg=CFG, folder=tmp_path / "run")
    evaluate_stream(source, **run)
    for first in (np.zeros(3, np.float32), np.zeros((2, 1, 4, 4), int)):
        np.savez(tmp_path / "run" / "first.npz", first=first)
        with pytest.raises(BitflowError, match="first.npz is damaged"):
            evaluate_stream(source, **run, resume=True)


def test_an_interrupted_reference_goes_on(tiny, digits, tmp_path):
    part, seen = digits[:300], []

    class Breaks:
        labels, epoch_order = part.labels, None

        def __len__(self):
            return 300

        def draw(self, indices, generator=None):
            seen.append(indices)
            if len(seen) == 10:
                raise KeyboardInterrupt
            return part[indices].x

    with pytest.raises(KeyboardInterrupt):
        make_reference(Breaks(), tiny, tmp_path / "a.npz", CFG)
    resumed = make_reference(Breaks(), tiny, tmp_path / "a.npz", CFG)
    unbroken = make_reference(part, tiny, tmp_path / "b.npz", CFG)
    # some are drawn for the fingerprint, each time
    assert len(seen) == 10 + 8 and torch.equal(resumed.sigma, unbroken.sigma)


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
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "are not a mean and a covariance"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, "are not a mean and a covariance"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "not a covariance"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "not a covariance"),
        ({**PLAIN, "features": np.zeros((4, 3), np.float32)}, "cannot be compared"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "damaged"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "mu holds <U1"),
        ({**PLAIN, "features": np.array([["a", "b"]])}, "features holds <U1"),
        ({**PLAIN, "mu": np.zeros(2, complex)}, "mu holds complex128"),
    ],
)
def test_bad_statistics_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BitflowError, match=message):
        read_reference(tmp_path / "bad.npz")


def test_a_file_cut_off_and_no_file(tmp_path):
    np.savez(tmp_path / "whole.npz", mu=np.zeros(30), sigma=np.eye(30))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:2000])
    with pytest.raises(BitflowError, match="not an intact .npz"):
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
    assert torch.equal(dataset_source(pictures)(index)[0], drawn)
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"x")
    with pytest.raises(BitflowError, match="1.png is not a readable image"):
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
    found = evaluate_stream(source, bare, tiny, CFG, folder=tmp_path / "run").measurements
    assert [m["metric"] for m in found] == ["fd[tiny]", "inception_score[tiny]"]


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
    found = values(evaluate_stream(source, real, tiny, CFG).measurements)
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
    known = Reference(*moments(real), real)
    ours = kid_over_subsets(known, fake, 7, 50, seed=5)
    assert ours == pytest.approx((mean.item(), std.item()), rel=1e-4)
    assert kid_over_subsets(known, fake, 1, 90)[0] != kid(real, fake)  # 90 of the 120, not all


@pytest.mark.filterwarnings("ignore:Metric")
def test_inception_score_agrees_with_torchmetrics(tiny, reference, tmp_path, monkeypatch):
    image = pytest.importorskip("torchmetrics.image.inception")
    theirs = image.InceptionScore(FeaturesOnly(1), splits=2)
    theirs.update(samples(range(203)))
    # its splits are random, ours are runs of neighbours
    monkeypatch.setattr(torch, "randperm", lambda n, **kw: torch.arange(n))
    expected = theirs.compute()[0].item()
    monkeypatch.undo()
    found = values(evaluate_stream(source, reference, tiny, CFG).measurements)
    assert found["inception_score[tiny]"] == pytest.approx(expected, rel=1e-5)


def test_a_missing_reference_says_where_imagenets_is(tiny, tmp_path):
    with pytest.raises(BitflowError, match=r"none\.npz.*VIRTUAL_imagenet256_labeled\.npz"):
        import_reference(tmp_path / "none.npz", tiny, tmp_path)


def test_features_of_a_reference_may_be_of_any_float_type(tmp_path):
    """NumPy's own is float64, and distances between features take one type."""
    features = np.random.default_rng(0).standard_normal((20, 4))
    mu, sigma = features.mean(axis=0), np.cov(features, rowvar=False)
    np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma, features=features)
    assert read_reference(tmp_path / "r.npz").features.dtype == torch.float32
