"""Alarms on planted failures, and silence elsewhere."""

import math

import pytest
import torch
import torch.nn.functional as nnf
from watched import group_of, healthy, seeded

from bitflow_edu.data import add_noise
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.models import build, load_model
from bitflow_edu.lab.sampling import draw, noise_for, one_pass_sampler, pair_samplers
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.scale.alarms import (
    alike,
    check_line,
    check_metrics,
    check_samples,
    reference,
    sample_reference_of,
    watch_labels,
)
from bitflow_edu.scale.failures import FAILURES
from bitflow_edu.tarflow import TARFlow

CHEQUERS = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1


TILES = torch.kron((torch.arange(4)[:, None] + torch.arange(4)) % 2 * 2.0 - 1, torch.ones(4, 4))


def names(x, reference):
    return [alarm.name for alarm in check_samples(x, reference.labels, reference)]


def spoil(x, place, value):
    """A copy of x with one image or pixel changed."""
    x = x.clone()
    x[place] = value
    return x


def one_class_collapsed(x):
    x = x.clone()
    x[7::10] = x[7]
    return x


def three_modes(x):
    return x[torch.arange(100) % 3] + 0.02 * torch.randn(x.shape, generator=seeded(0))


def with_failures(x):
    """Failure's name → 100 digits with the failure in them."""
    padded = nnf.pad(x, (1, 1, 1, 1), mode="replicate")
    return {
        "seams": x + 0.25 * TILES,
        "pattern": x + 0.1 * CHEQUERS,
        "texture": add_noise(x, 0.25, seeded(0)),
        "blur": nnf.avg_pool2d(padded, 3, 1),
        "collapse": three_modes(x),
        "class-collapse": one_class_collapsed(x),
        "condition": x[torch.randperm(100, generator=seeded(2))],
        "constant": spoil(x, 0, 0.2),
        "not-finite": spoil(x, (3, 0, 5, 5), math.nan),
        "saturation": 1.7 * x,
        "wash-out": 0.6 * x,
    }


def test_every_alarm_has_a_planted_failure(digits):
    assert set(with_failures(digits[:100].x)) == {*FAILURES, "not-finite"}


@pytest.mark.parametrize("name", [*FAILURES, "not-finite"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_failures_fire_their_own_alarm(name, seed, digits, normal):
    fired = names(with_failures(group_of(digits, normal, seed))[name], normal)
    assert name in fired and len(fired) <= 3  # its own, and what follows from it


def test_the_worst_collapse_and_ignored_labels(digits, normal):
    group = group_of(digits, normal)
    assert "collapse" in names(group[:1].expand_as(group), normal)
    repeated = group[:10].repeat_interleave(10, dim=0)  # pictures do not follow their labels
    assert {"condition", "collapse"} <= set(names(repeated, normal))


def test_real_digits_are_silent(digits, normal):
    for seed in range(40):
        assert names(group_of(digits, normal, seed), normal) == []


def test_the_shipped_pair_is_silent(train_digits, normal):
    F = load_model(asset("mnist-mini/forward"), TARFlow)
    G = load_model(asset("mnist-mini/reverse"), ReverseModel)
    noisy = sample_reference_of(train_digits, normal.labels, 4, F.cfg.noise_std)
    for sampler in pair_samplers(F, G):
        for seed in range(3 if sampler.name == "one-pass" else 1):
            x = draw(sampler, noise_for(F.cfg, 100, seed), normal.labels)
            assert names(x, noisy if sampler.name == "exact" else normal) == []


def test_an_untrained_model_is_not_silent(normal):
    G = load_model(asset("mnist-mini/reverse"), ReverseModel)
    young = build(ReverseModel, G.cfg, seed=0)
    x = draw(one_pass_sampler(young), noise_for(G.cfg, 100), normal.labels)
    assert "condition" in names(x, normal)


def test_messages_say_what_was_seen_and_what_to_try(digits, normal):
    (alarm,) = check_samples(1.7 * group_of(digits, normal), normal.labels, normal)
    assert alarm.value > alarm.limit > normal.bounds["saturation"].real
    assert f"{alarm.value:.3g}" in alarm.message and "guidance" in alarm.message


def test_mostly_nan_says_only_that(digits, normal):
    x = digits[:100].x
    x[:60] = math.inf
    (alarm,) = check_samples(x, normal.labels, normal)
    assert alarm.name == "not-finite" and alarm.value == 60


def test_huge_values_do_not_overflow(digits, normal):
    assert "saturation" in names(1e30 * digits[:100].x, normal)


def test_samples_must_fit_the_reference(digits, normal):
    with pytest.raises(BitflowError, match="make one for these samples"):
        check_samples(digits[:40].x, normal.labels[:40], normal)


def test_latents_labels_and_patches_may_be_missing():
    x, c = torch.randn(400, 4, 8, 8, generator=seeded(0)), torch.zeros(400, dtype=torch.long)
    blind = reference(x, c, -torch.ones(40, dtype=torch.long), patch_size=1).blind
    assert {"seams", "pattern", "class-collapse", "condition"} <= set(blind)
    latents = reference(x, c, watch_labels(c, 40), 2)
    assert "collapse" not in latents.blind and names(x[:40], latents) == []
    assert "pattern" in names(x[:40] + 2 * CHEQUERS[:8, :8], latents)


def test_many_classes_are_watched_through_a_few():
    c = torch.arange(64_000) % 1000
    labels = watch_labels(c)
    assert len(labels) == 96 and len(labels.unique()) == 12
    x, c = torch.randn(3000, 1, 4, 4, generator=seeded(0)), c[torch.isin(c, labels)].repeat(4)
    normal = reference(x, c[:3000], labels, 2)
    assert len(normal.known.class_means) == 12


def test_too_little_data_is_refused():
    with pytest.raises(BitflowError, match="no class has 8 images"):
        watch_labels(torch.arange(20))
    with pytest.raises(BitflowError, match="of class 3"):
        alike(torch.tensor([3, 3]), torch.tensor([1, 2, 3]), seeded(0))
    with pytest.raises(BitflowError, match="twice as many"):
        reference(torch.zeros(5, 1, 4, 4), torch.zeros(5).long(), torch.zeros(4).long())


def test_data_that_draw_themselves(train_digits, normal):
    class Drawn:
        labels, classes = train_digits.labels, train_digits.classes

        def draw(self, index, generator):
            return train_digits[index].x

    assert sample_reference_of(Drawn(), normal.labels, 4).bounds == normal.bounds


def test_metrics_alarms():
    lines = healthy()
    assert check_metrics(lines) == []
    accidents = {
        "loss-spike": {"loss": -1.0},
        "gradient-blow-up": {"grad_norm": 30.0},
        "not-finite": {"depth_2": math.nan},
    }
    for name, accident in accidents.items():
        assert [a.name for a in check_line(lines[-1] | accident, lines[:-1])] == [name]
    drifted = [{**line, "z_rms": 1.4} for line in lines]
    assert {a.name for a in check_metrics(drifted)} == {"z-rms"}
    early = {"step": 1, "loss": 99.0, "grad_norm": 1e9}
    assert check_line(early, lines[:5]) == []  # nothing to compare with yet
    assert check_metrics([{"step": i, "loss": 1.0, "grad_norm": 0.0} for i in range(60)]) == []
    lines[49]["loss"] = 3.0
    assert lines[49]["step"] == 1000 and "step 1000" in check_metrics(lines)[0].message


def test_a_rare_class_is_not_lost_in_the_choice_of_images():
    """Two thousand images of six thousand would hold too few of a class of sixty."""
    counts = (3000, 3000, 60)
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    x = torch.randn(len(labels), 1, 4, 4, generator=seeded(0)).clamp(-1, 1)

    class Data:
        def draw(self, index, generator=None):
            return x[index]

    Data.labels = labels
    wanted = watch_labels(labels)
    found = sample_reference_of(Data(), wanted)
    assert (found.labels == 2).sum() == 15
