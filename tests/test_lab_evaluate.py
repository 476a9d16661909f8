"""The evaluator: in memory, on disk, of a pair and of a flow alone."""

import copy
import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bitflow_edu.coupling import bits_per_dim
from bitflow_edu.data import Images, add_noise
from bitflow_edu.evaluation import (
    accuracy,
    as_stored,
    frechet_distance,
    in_batches,
    load_classifier,
)
from bitflow_edu.exact_inverse import exact_inverse
from bitflow_edu.excursions.glow import CouplingConfig, CouplingFlow
from bitflow_edu.guidance import Guidance
from bitflow_edu.inverse_strategies import check_pair
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build
from bitflow_edu.io.results import load_result
from bitflow_edu.lab import evaluate as lab_evaluate
from bitflow_edu.lab import sampling
from bitflow_edu.lab.evaluate import (
    Judge,
    are_digits,
    check_drawn,
    choose_scale,
    evaluate,
    evaluate_flow,
    fidelity,
    indexed_noise,
    judge_samplers,
    network_for,
    sampler_source,
    stream_config,
)
from bitflow_edu.lab.hub import load_pretrained
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.lab.recipes import stage_one_loss
from bitflow_edu.lab.sampling import (
    SAMPLERS,
    draw,
    draw_all,
    exact_sampler,
    guided_samplers,
    guided_too,
    noise_for,
    one_pass_sampler,
    pair_samplers,
    sharing,
)
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.scale.feature_networks import mnist_cnn_network
from bitflow_edu.scale.fid import evaluate_stream, reference_in_memory
from bitflow_edu.scale.streaming import StreamConfig, collect
from bitflow_edu.tarflow import TARFlow
from bitflow_edu.transformer import TransformerConfig
from conftest import small_flow, small_reverse

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.fixture(scope="module")
def pair():
    """The pair that comes with the course."""
    return load_pretrained("mnist-mini")


def numbers(measurements):
    return {(m["row"], m["metric"]): m["value"] for m in measurements}


def seen(x):
    """Features by the functions of lesson 06."""
    return in_batches(load_classifier().features, as_stored(x), 100)


# In memory


@pytest.fixture(scope="module")
def small_evaluation(pair, digits):
    """130 samples: batches that are no whole hundreds."""
    samplers = pair_samplers(*pair) + guided_samplers(pair[1], (0.5,))
    return evaluate(*pair, digits[200:600], digits[:200], 130, 3, timing=False, samplers=samplers)


def test_distances_and_accuracies_are_those_of_lesson_06_to_the_bit(pair, digits, small_evaluation):
    F, G = pair
    drawn = draw_all(pair_samplers(F, G) + guided_samplers(G, (0.5,)), 130, seed=3)
    found, test = numbers(small_evaluation.measurements), seen(digits[:200].x)
    labels = torch.arange(130) % 10
    assert list(drawn) == ["exact", "exact+denoise", "one-pass", "guided, w = 0.5"]
    for row, x in drawn.items():
        assert found[row, "fd[mnist-cnn]"] == frechet_distance(seen(x), test)
        assert found[row, "label_accuracy"] == accuracy(load_classifier(), x, labels)
        assert torch.equal(small_evaluation.samples[row], x[:10])
    assert list(small_evaluation.samples) == list(drawn)


def test_the_floor_is_a_random_choice_of_training_images(digits, small_evaluation):
    found, train = numbers(small_evaluation.measurements), digits[200:600]
    pick = torch.randperm(400, generator=torch.Generator().manual_seed(3))[:130]
    floor = frechet_distance(seen(train[pick].x), seen(digits[:200].x))
    assert found["real", "fd[mnist-cnn]"] == floor
    right = accuracy(load_classifier(), train[pick].x, train.labels[pick])
    assert found["real", "label_accuracy"] == right


def test_every_distance_says_how_many_and_what_it_is_compared_with(small_evaluation):
    distances = [m for m in small_evaluation.measurements if m["metric"] == "fd[mnist-cnn]"]
    assert len(distances) == 6  # with that of the chosen scale
    for m in distances:
        assert (m["n"], m["seed"], m["reference"]) == (130, 3, "200 test images")


def test_a_demo_measures_what_the_stored_one_measured(pair, digits, monkeypatch):
    """Every row and metric, in the same order. The times themselves are made up."""

    def once(fn, repeats):
        fn()
        return {"median_ms": 2.0, "low_ms": 1.0, "high_ms": 3.0, "repeats": repeats}

    monkeypatch.setattr(sampling, "timed", once)

    def name(m):
        return m["row"], m["metric"], m.get("batch")

    stored = json.loads((RESULTS / "demo-mnist-mini.json").read_text())["measurements"]
    expected = [name(m) for m in stored if m["row"] != "demo"]
    found = evaluate(*pair, digits, digits[:50], n=12).measurements
    names = list(map(name, found))
    assert [n for n in names if n in expected] == expected
    more = {metric for _, metric, _ in names} - {metric for _, metric, _ in expected}
    kinds = {"kid[mnist-cnn]", "precision[mnist-cnn]", "recall[mnist-cnn]"}
    others = {"inception_score[mnist-cnn]", "nfe", "fd_train[mnist-cnn]", "inverse_mse"}
    assert more == {*kinds, *others}
    cost = {
        n: m["value"] for n, m in zip(names, found) if m["metric"] in ("params", "serial_steps")
    }
    assert cost.items() <= {name(m): m["value"] for m in stored}.items()


def test_in_memory_and_on_disk_are_the_same_bits(pair, digits, tmp_path):
    """The same noise; the folder holds parts, is interrupted, and goes on."""
    G, network = pair[1], mnist_cnn_network()
    cfg = replace(stream_config(130, seed=3), batch_size=50)
    reference = reference_in_memory(digits[:200], network, cfg, "200 test images")
    source = sampler_source(one_pass_sampler(G), 3, None, noise_for(G.cfg, 130, 3), True)
    in_memory = evaluate_stream(source, reference, network, cfg)
    calls = []

    def breaks(index):
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return source(index)

    run = dict(reference=reference, network=network, cfg=cfg, folder=tmp_path / "one-pass")
    with pytest.raises(KeyboardInterrupt):
        evaluate_stream(breaks, **run)
    on_disk = evaluate_stream(breaks, **run, resume=True)
    assert on_disk.measurements == in_memory.measurements and len(calls) == 4
    assert torch.equal(on_disk.first, in_memory.first)


def test_other_images_than_digits_have_no_judge(digits):
    """Samples are drawn, and the rest is measured."""
    flow = small_flow(channels=3, side=4, patch=4, num_classes=10)
    pixels = digits.pixels[:40].expand(-1, 3, -1, -1).contiguous()
    colour = Images(pixels, digits.labels[:40], tuple("abcdefghij"))
    done = evaluate(flow, small_reverse(flow), colour, colour, n=12, timing=False)
    assert {m["metric"] for m in done.measurements} == {
        "bits_per_dim",
        "round_trip_max_error",
        "reconstruction_mse",
        "inverse_mse",
    }
    assert list(done.samples) == ["exact", "exact+denoise", "one-pass"]
    assert done.samples["exact"].shape == (10, 3, 16, 16)


def test_who_judges(digits):
    """The dataset decides, not the words for its classes."""
    letters = replace(digits, classes=tuple("abcdefghij"))
    assert digits.name == "mnist-mini" and digits[:3].name == "mnist-mini"
    assert network_for(letters, 1).name == "mnist-cnn"
    for name in ("fashion-mnist", "image-folder", ""):
        assert network_for(replace(digits, name=name), 1) is None
    assert network_for(digits, 4) is None
    assert are_digits("mnist") and not are_digits("cifar10")


def test_photographs_are_not_compared_where_the_network_is_not_installed(digits, monkeypatch):
    def missing():
        raise BitflowError("install it")

    monkeypatch.setattr("bitflow_edu.lab.evaluate.effnet_lite0_network", missing)
    assert network_for(digits, 3) is None


def test_too_few_samples_and_a_pair_that_does_not_fit_are_refused(pair, digits):
    with pytest.raises(BitflowError, match="1 finite samples"):
        evaluate(*pair, digits, digits, n=1, timing=False)
    with pytest.raises(BitflowError, match="guidance scales 0.5 are for G"):
        guided_samplers(None, (0.5,))
    other = small_reverse(small_flow())
    with pytest.raises(BitflowError):
        evaluate(pair[0], other, digits, digits, n=2, timing=False)


# Guidance on both sides


@pytest.fixture(scope="module")
def sweep(pair):
    return guided_too(pair_samplers(*pair), (0.25, 1.0), *pair)


def test_every_method_has_every_scale(pair, sweep):
    names = [sampler.name for sampler in sweep]
    assert names[:3] == ["exact", "exact+denoise", "one-pass"] and len(names) == 9
    assert {"exact, w = 1", "exact+denoise, w = 0.25", "guided, w = 1"} < set(names)
    assert [s.w for s in sweep if s.family == "one-pass"] == [0.0, 0.25, 1.0]
    flow = small_flow()
    guided = guided_too(
        [one_pass_sampler(G := small_reverse(flow, max_guidance=2.0))], (1.0,), flow, G
    )
    assert [(s.name, s.nfe) for s in guided] == [("one-pass", 1), ("one-pass, w = 1", 1)]
    coupling = build(CouplingFlow, CouplingConfig(kind="nice", image_size=16, width=8), 0)
    with pytest.raises(BitflowError, match="scales 0.5.*labels"):
        guided_too([exact_sampler(coupling)], (0.5,), coupling, None)


def test_the_inverse_is_computed_once_for_both_of_its_rows(pair, digits, sweep, monkeypatch):
    """The score step goes on from the images of the row without it: half the calls, the same bits,
    in the same order; another rule of guidance has no such row."""
    calls, data = [], (digits[200:300], digits[:100], 60, 3)
    samplers = [*sweep, SAMPLERS["exact+denoise, annealed"](*pair, 1.0)]

    def counting(model, z, c, guidance=None):
        calls.append(guidance)
        return exact_inverse(model, z, c, guidance)

    inverse = partial(evaluate, *pair, *data, timing=False, samplers=samplers)
    monkeypatch.setattr(lab_evaluate, "sharing", list)
    apart = inverse()
    monkeypatch.undo()
    monkeypatch.setattr(lab_evaluate, "fidelity", lambda *_: [])
    monkeypatch.setattr(sampling, "exact_inverse", counting)
    shared = inverse()
    assert calls == [None, Guidance(0.25), Guidance(1.0), Guidance(1.0, "annealed")]
    assert shared.measurements == apart.measurements[: len(shared.measurements)]
    assert list(shared.samples) == list(apart.samples) == [s.name for s in samplers]
    assert all(torch.equal(x, apart.samples[row]) for row, x in shared.samples.items())


def test_a_start_that_drew_other_noise_is_not_taken_over(pair):
    F, c = pair[0], torch.tensor([0, 1])
    start, then = sharing(pair_samplers(F, None))
    a, b = noise_for(F.cfg, 2, seed=1), noise_for(F.cfg, 2, seed=2)
    start(a, c)
    assert torch.equal(then(b, c), SAMPLERS["exact+denoise"](F, None, 0.0)(b, c))


def test_the_nearest_scale_is_chosen_and_of_equals_the_smallest():
    assert choose_scale({0.0: 3.0, 0.5: 2.0, 1.0: 2.5}) == 0.5
    assert choose_scale({1.0: 2.0, 0.25: 2.0, 0.0: 9.0}) == 0.25


def test_the_choice_stands_in_the_file_with_all_it_was_made_from(pair, digits, sweep):
    done = evaluate(*pair, digits[200:600], digits[:200], 60, 3, timing=False, samplers=sweep)
    found = {(m["row"], m["metric"]): m for m in done.measurements}
    for method in ("exact", "exact+denoise", "guided"):
        row = f"{method}, chosen w"
        choice = found[row, "chosen_w"]
        assert (choice["n"], choice["seed"]) == (60, 3)
        assert choice["chosen_by"] == "fd_train[mnist-cnn]"
        assert choice["reference"] == "400 training images"
        assert list(choice["values"]) == ["0", "0.25", "1"]
        assert choice["values"][f"{choice['value']:g}"] == min(choice["values"].values())
        for metric in ("fd[mnist-cnn]", "fd_train[mnist-cnn]", "label_accuracy", "kid[mnist-cnn]"):
            same = found[choice["same_as"], metric]
            assert found[row, metric] == {**same, "row": row, "same_as": choice["same_as"]}
        assert found[row, "fd_train[mnist-cnn]"]["value"] == min(choice["values"].values())
    assert found["real", "fd[mnist-cnn]"]["value"] > 0


def test_nothing_is_chosen_on_test_images(pair, digits, sweep):
    """Test images that are noise change what is reported, and no choice."""
    noise = torch.randint(0, 256, digits[:200].pixels.shape, dtype=torch.uint8)
    chosen, reported = [], []
    for test in (digits[:200], replace(digits[:200], pixels=noise)):
        one_pass_family = [s for s in sweep if s.family == "one-pass"]
        done = evaluate(
            *pair, digits[200:600], test, 60, timing=False, samplers=one_pass_family
        ).measurements
        chosen.append([m for m in done if m["metric"] in ("chosen_w", "fd_train[mnist-cnn]")])
        reported.append(numbers(done)["guided, chosen w", "fd[mnist-cnn]"])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 5
    assert reported[1] > 2 * reported[0]


def test_the_distance_to_training_images_is_that_of_lesson_06(pair, digits, small_evaluation):
    found, train = numbers(small_evaluation.measurements), digits[200:600]
    x = draw_all([one_pass_sampler(pair[1])], 130, seed=3)["one-pass"]
    assert found["one-pass", "fd_train[mnist-cnn]"] == frechet_distance(seen(x), seen(train.x))
    assert ("real", "fd_train[mnist-cnn]") not in found, "some of its images are its reference"


def test_the_inverse_error_is_against_clean_images(pair, digits):
    """The exact inverse gives back the noise, σ² of it; the others come nearer."""
    F, G = pair
    done = evaluate(F, G, digits[200:300], digits[:40], n=20, timing=False)
    found = {m["row"]: m for m in done.measurements if m["metric"] == "inverse_mse"}
    assert list(found) == ["exact", "exact+denoise", "one-pass"]
    assert found["exact"]["value"] == pytest.approx(F.cfg.noise_std**2, rel=0.05)
    part = digits[:40]
    noisy = add_noise(part.x, F.cfg.noise_std, torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = F(noisy, part.labels).z
    back = draw(one_pass_sampler(G), z, part.labels)
    assert found["one-pass"]["value"] == pytest.approx((back - part.x).square().mean().item())
    assert found["exact+denoise"]["value"] < found["exact"]["value"]
    assert found["one-pass"]["n"] == 40


# A flow alone


def test_a_coupling_flow_alone(digits):
    """Without labels, so that none are asked for."""
    flow = build(CouplingFlow, CouplingConfig(kind="nice", image_size=16, width=8), 0).eval()
    done = evaluate_flow(flow, digits[200:400], digits[:50], n=130, seed=2, timing=False)
    found, drawn = numbers(done.measurements), draw_all([exact_sampler(flow)], 130, 2)["exact"]
    distance = frechet_distance(seen(drawn), seen(digits[:50].x))
    assert found["exact", "fd[mnist-cnn]"] == distance
    assert not any(metric == "label_accuracy" for _, metric in found)
    assert found["exact", "broken_samples"] == 0 and found["exact", "serial_steps"] == 1
    stored = load_result("evaluate-mnist-glow", RESULTS)["measurements"]
    expected = [m["metric"] for m in stored if m["row"] == "exact" and m["unit"] not in ("ms", "s")]
    names = [m["metric"] for m in done.measurements if m["row"] == "exact"]
    assert [n for n in expected if n not in ("train_steps", "broken_samples")] == [
        n for n in names if n in expected and n != "broken_samples"
    ]


def test_labels_are_asked_for_where_the_likelihood_has_them(pair, digits):
    done = evaluate_flow(pair[0], digits, digits[:50], n=20, conditional=True, timing=False)
    found, drawn = numbers(done.measurements), draw_all([exact_sampler(pair[0])], 20, 0)["exact"]
    labels = torch.arange(20) % 10
    assert found["exact", "label_accuracy"] == accuracy(load_classifier(), drawn, labels)


def test_a_tarflow_alone_goes_through_the_same_steps(digits):
    """On logits, without labels: the preset of lesson 07's table, at the digits' size."""
    transformer = TransformerConfig(width=16, head_dim=8, num_layers=1)
    cfg = find_preset("mnist-tarflow").forward
    small = replace(cfg, image_size=16, transformer=transformer)
    flow = build(TARFlow, small, 0).train()
    x, c, generator = digits.x[:8], torch.full((8,), -1), torch.Generator().manual_seed(0)
    loss, _ = stage_one_loss(small)(flow, x, c, generator)
    done = evaluate_flow(flow.eval(), digits, digits[:50], n=10, timing=False)
    found = {m["metric"]: m["value"] for m in done.measurements if m["row"] == "exact"}
    assert torch.isfinite(loss) and found["bits_per_dim[8 draws]"] < found["bits_per_dim"]
    assert found["round_trip_max_error"] < 1e-3
    assert found["serial_steps"] == 4 * 15 and found["broken_samples"] == 0
    reverse = find_preset("mnist-mini").reverse
    with pytest.raises(BitflowError, match="logit"):
        check_pair(flow, build(ReverseModel, reverse, 0))


@pytest.fixture
def broken_inverse(monkeypatch):
    """Without clipping an inverse can overflow: every fifth sample does, or all do."""
    whole = sampling.invert_flow

    def break_some(which):
        def inverse(model, z, c, guidance=None):
            number = torch.arange(len(z))[:, None, None, None]
            return torch.where(which(number), torch.nan, whole(model, z, c))

        monkeypatch.setattr(sampling, "invert_flow", inverse)

    return break_some


def test_samples_that_overflow_are_counted(digits, broken_inverse):
    """The likelihood is measured all the same, and the share of such samples stands beside it.

    The others keep their labels, and the floor has as many images as they are."""
    cfg = replace(find_preset("mnist-mini-smoke").forward, noise_std=0.0)
    flow = build(TARFlow, cfg, 0).eval()
    drawn = draw_all([exact_sampler(flow)], 20, 0)["exact"]
    broken_inverse(lambda i: i % 5 == 0)
    done = evaluate_flow(flow, digits, digits[:50], n=20, conditional=True, timing=False)
    found = {(m["row"], m["metric"]): m for m in done.measurements}
    whole = torch.arange(20) % 5 != 0
    assert found["exact", "broken_samples"]["value"] == 1 - whole.float().mean().item()
    assert found["exact", "fd[mnist-cnn]"]["n"] == found["real", "fd[mnist-cnn]"]["n"] == 16
    right = accuracy(load_classifier(), drawn[whole], (torch.arange(20) % 10)[whole])
    assert found["exact", "label_accuracy"]["value"] == pytest.approx(right)
    assert found["exact", "bits_per_dim"]["value"] > 0
    assert done.samples["exact"].isfinite().all()
    check_drawn(done.measurements)
    broken_inverse(lambda i: i >= 0)
    done = evaluate_flow(flow, digits, digits[:50], n=20, timing=False)
    found = numbers(done.measurements)
    assert found["exact", "broken_samples"] == 1 and found["exact", "bits_per_dim"] > 0
    assert ("exact", "fd[mnist-cnn]") not in found and ("real", "fd[mnist-cnn]") in found
    with pytest.raises(BitflowError, match="samples of exact are broken"):
        check_drawn(done.measurements)


def test_samples_that_overflow_are_counted_where_nobody_judges(digits, broken_inverse):
    flow = small_flow(channels=3, side=4, patch=4, num_classes=10)
    pixels = digits.pixels[:40].expand(-1, 3, -1, -1).contiguous()
    colour = Images(pixels, digits.labels[:40], tuple("abcdefghij"))
    broken_inverse(lambda i: i % 4 == 0)
    found = numbers(evaluate_flow(flow, colour, colour, n=20, timing=False).measurements)
    assert found["exact", "broken_samples"] == 0.25
    broken_inverse(lambda i: i > 0)
    done = evaluate_flow(flow, colour, colour, n=20, timing=False)
    assert numbers(done.measurements)["exact", "broken_samples"] == pytest.approx(0.95)
    assert done.samples["exact"].isfinite().all()


def nan_weights(model):
    """A model whose training has diverged."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    return model


@pytest.mark.filterwarnings("ignore:.*broken", "ignore:.*left out")
def test_a_broken_model_ends_none_of_the_other_rows(pair, digits):
    """Whichever of the two it is; what is no number is not recorded."""
    F, G = pair
    data = digits[200:400], digits[:200]
    whole = numbers(evaluate(F, G, *data, n=40, timing=False).measurements)
    for models, broken in (((F, nan_weights(G)), {"one-pass"}), ((nan_weights(F), G), None)):
        done = evaluate(*models, *data, n=40, timing=False)
        found, broken = numbers(done.measurements), broken or {"exact", "exact+denoise"}
        assert {r for (r, m), v in found.items() if m == "broken_samples" and v == 1} == broken
        assert all(map(math.isfinite, found.values()))
        judged = {(r, m) for r, m in whole if m in ("fd[mnist-cnn]", "kid[mnist-cnn]")}
        for row, metric in judged:
            assert ((row, metric) in found) == (row not in broken)
            if row not in broken:
                assert found[row, metric] == whole[row, metric]
        with pytest.raises(BitflowError, match=re.escape(", ".join(sorted(broken)))):
            check_drawn(done.measurements)


# Samples by number, and a judge with a folder


@pytest.mark.parametrize("method, w", [*((name, 0.0) for name in SAMPLERS), ("guided", 0.5)])
def test_a_sample_depends_on_its_number_alone(method, w):
    flow = small_flow(modern=True)
    source = sampler_source(SAMPLERS[method](flow, small_reverse(flow), w), seed=3)
    together, labels = source(torch.arange(7))
    apart = torch.cat([source(torch.arange(4, 7))[0], source(torch.tensor([1]))[0]])
    assert together.shape == (7, 1, 6, 6) and labels is None
    assert torch.allclose(together[[4, 5, 6, 1]], apart, atol=1e-4)


def test_the_classes_are_asked_for_in_turn():
    flow = small_flow()
    _, labels = sampler_source(exact_sampler(flow), labelled=True)(torch.tensor([4, 2, 3]))
    assert labels.tolist() == [1, 2, 0]


def test_noise_by_number_is_normal_and_differs_with_the_seed():
    cfg = CouplingConfig(image_size=8)
    z = indexed_noise(cfg, torch.arange(300), 0)
    assert z.shape == (300, 64) and len(z.unique(dim=0)) == 300
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    assert not torch.equal(z, indexed_noise(cfg, torch.arange(300), 1))


def test_times_leave_out_the_noise(monkeypatch):
    """It comes from NumPy, number by number; a GPU would wait for it longer than for the model."""

    def refuse(*args):
        raise AssertionError("noise was drawn")

    monkeypatch.setattr(lab_evaluate, "indexed_noise", refuse)
    cfg, doubled = StreamConfig(n=4, batch_size=2, splits=1), []
    (line,) = lab_evaluate.stream_times(exact_sampler(small_flow()), doubled.append, cfg)
    assert line["metric"] == "ms_per_image" and line["batch"] == 2 and line["value"] > 0
    assert len(doubled) > 1 and doubled[0].shape[0] == 2  # what decodes is on the clock


def test_a_decoder_turns_latents_into_images():
    def decoder(x):
        return x.repeat_interleave(8, -1).repeat_interleave(8, -2)

    source = sampler_source(exact_sampler(small_flow()), decoder=decoder)
    assert source(torch.arange(2))[0].shape == (2, 1, 48, 48)


def test_samplers_are_judged_in_a_folder_and_the_work_goes_on(pair, digits, tmp_path):
    """Each has a folder of its own; what is finished is not drawn again."""
    F, G = pair
    cfg = StreamConfig(n=60, batch_size=20, seed=3, keep=30, subsets=3, splits=2)
    network = mnist_cnn_network()
    reference = reference_in_memory(digits[:200], network, cfg, "200 test images")
    judge = Judge(network, reference, cfg, tmp_path, about={"forward": "F"})
    samplers = [one_pass_sampler(G), *guided_samplers(G, (0.5,))]
    done = judge_samplers(judge, samplers, digits[200:240], labelled=True, timing=True)
    folders = sorted(p.name for p in tmp_path.iterdir())
    assert folders == ["guided-w0.5", "one-pass", "real"]
    rows = {m["row"]: [] for m in done.measurements}
    for m in done.measurements:
        rows[m["row"]].append(m["metric"])
    judged = ["fd[mnist-cnn]", "label_accuracy", "inception_score[mnist-cnn]", "kid[mnist-cnn]"]
    judged += ["precision[mnist-cnn]", "recall[mnist-cnn]"]
    assert rows == {
        "one-pass": [*judged, "nfe", "ms_per_image"],
        "guided, w = 0.5": [*judged, "nfe", "ms_per_image"],
        "real": judged,
    }
    settings = json.loads((tmp_path / "guided-w0.5" / "settings.json").read_text())
    assert settings["w"] == 0.5 and settings["forward"] == "F" and settings["row"] in rows
    assert list(done.samples) == list(rows) and len(done.samples["real"]) == 10
    of_train = reference_in_memory(digits[200:600], network, cfg, "400 training images")
    both = replace(judge, resume=True, train=of_train)  # the folder is of an earlier version
    both = numbers(judge_samplers(both, samplers, digits[200:240], labelled=True).measurements)
    assert both.items() > numbers(done.measurements).items()
    choice = both["guided, chosen w", "chosen_w"]
    assert choice in (0.0, 0.5) and ("one-pass", "fd_train[mnist-cnn]") in both
    assert ("real", "fd_train[mnist-cnn]") not in both
    source = sampler_source(samplers[0], 3, labelled=True)
    stats = collect(source, network, cfg)
    found = numbers(done.measurements)
    assert found["one-pass", "label_accuracy"] == pytest.approx(stats.right / 60)

    def never(z, c):
        pytest.fail("a finished row is not drawn again")

    resumed = [replace(sampler, sample=never) for sampler in samplers]
    again = judge_samplers(replace(judge, resume=True), resumed, digits[200:240], labelled=True)
    assert again.measurements == done.measurements
    with pytest.raises(BitflowError, match="forward = F, not other"):
        other = replace(judge, resume=True, about={"forward": "other"})
        judge_samplers(other, samplers)


def test_the_floor_of_a_stream_is_its_first_images(digits, tmp_path):
    """Read in order, and at most as many as there are."""
    cfg, network = StreamConfig(n=60, batch_size=20, subsets=2, splits=1), mnist_cnn_network()
    reference = reference_in_memory(digits[:200], network, cfg, "200 test images")
    done = judge_samplers(Judge(network, reference, cfg, tmp_path), [], digits[200:240])
    distance = frechet_distance(seen(digits[200:240].x), seen(digits[:200].x))
    assert math.isclose(done.measurements[0]["value"], distance, rel_tol=1e-5)
    assert torch.equal(done.samples["real"], digits[200:210].x)


def test_a_flow_without_labels_is_measured_without(digits):
    """Samples, likelihood and ways back alike."""
    small = TransformerConfig(width=16, head_dim=8, num_layers=1)
    cfg = replace(find_preset("mnist-mini").forward, transformer=small, label_dropout=1.0)
    flow, x = build(TARFlow, cfg, 0), digits[:6]
    for p in flow.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    found = {m["metric"]: m for m in fidelity(flow, None, x, 0)}
    assert found["bits_per_dim"]["protocol"].endswith("labels not given")
    without = bits_per_dim(flow, x, 0, conditional=False).mean().item()
    assert found["bits_per_dim"]["value"] == pytest.approx(without, rel=1e-6)
    assert without != pytest.approx(bits_per_dim(flow, x, 0).mean().item(), rel=1e-6)
    drawn, _ = sampler_source(exact_sampler(flow), 0)(torch.arange(3))
    z = indexed_noise(cfg, torch.arange(3), 0)
    assert torch.allclose(drawn, exact_inverse(flow, z, torch.full((3,), -1)), atol=1e-5)
