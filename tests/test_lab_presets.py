"""Presets: their parts, their twins, and the sizes published for them."""

import doctest
from dataclasses import replace

import pytest

from bitflow_edu.data import load_data
from bitflow_edu.io import models
from bitflow_edu.io.files import BitflowError
from bitflow_edu.lab import presets
from bitflow_edu.lab.preset_fields import as_tree, to_words
from bitflow_edu.lab.presets import (
    INFERRED,
    PAIRS,
    ObjectiveConfig,
    against_published,
    find_preset,
    inferred,
    published_aim,
)
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.scale.costs import on_meta
from bitflow_edu.tarflow import TARFlow

BASE = find_preset("mnist-mini")


@pytest.mark.parametrize("name", PAIRS)
def test_the_smoke_twin_has_the_same_kinds_of_parts(name):
    """Sizes and budgets differ, everything else does not; and it is small."""
    big, twin = (to_words(as_tree(find_preset(n))) for n in (name, f"{name}-smoke"))
    assert big.keys() == twin.keys()
    sizes = "name num_samples image_size num_classes num_blocks width num_layers head_dim steps "
    sizes += "batch_size lr ema log_every sample_every checkpoint_every compile num_microbatches"
    different = {field for field in big if big[field] != twin[field]}
    if find_preset(name).objective.decoder:
        sizes += " features feature_weights decoder"  # of random weights: nothing is downloaded
    assert {field.rpartition(".")[2] for field in different} <= set(sizes.split())
    assert "data.name" not in different
    p = find_preset(f"{name}-smoke")
    assert p.train_forward.steps == p.train_reverse.steps == 30
    assert models.num_parameters(on_meta(TARFlow, p.forward)) < 300_000
    assert p.forward.num_tokens <= 64


RECIPE = {
    "features": ("lpips-vgg-crop", "convnext-v2-base-crop"),
    "feature_weights": (0.4, 0.1),
    "adaptive_power": 1.0,
    "normalise": True,
    "decoder": "stabilityai/sd-vae-ft-ema",
}


def test_the_whole_recipe_and_the_plain_one():
    """Same data and same F; w, image end, adaptive weights and compiling belong to the recipe."""
    full, plain = find_preset("imagenet256-b2"), find_preset("imagenet256-b2-mse")
    assert full.objective == ObjectiveConfig(**RECIPE) and plain.objective == ObjectiveConfig()
    assert full.reverse.max_guidance == 3.0 and plain.reverse.max_guidance == 0.0
    assert (full.data, full.forward) == (plain.data, plain.forward)
    for train in ("train_forward", "train_reverse"):
        own = getattr(full, train)
        assert own.compile and replace(own, compile=False) == getattr(plain, train)
    assert full.train_reverse.steps * full.train_reverse.batch_size // 1_281_167 == 159
    assert published_aim("imagenet256-b2").endswith("FID 2.39, IS 303.0")
    assert "31.88" in published_aim("imagenet256-b2-mse") and not published_aim("mnist-mini")
    assert set(inferred("imagenet256-b2")) > set(inferred("imagenet256-b2-mse-smoke"))
    for name in inferred("imagenet256-b2"):
        part = full
        for field in name.split("."):
            part = getattr(part, field)


def test_latents_say_how_they_are_made():
    for name in ("imagenet256-b2", "imagenet256-xl2-smoke"):
        cfg = find_preset(name).data
        assert cfg.channels == 4
        with pytest.raises(BitflowError, match="AutoencoderKL"):
            load_data(cfg)
    with pytest.raises(BitflowError, match="4 channels"):
        replace(BASE.data, channels=4)


def test_published_sizes():
    """F-B/2 120M, F-XL/2 690M, G-B/2 133M (arXiv 2512.10953), within 3 %; from shapes alone."""
    found = {}
    for name in ("imagenet256-b2", "imagenet256-b2-mse", "imagenet256-xl2"):
        p = find_preset(name)
        F, G = on_meta(TARFlow, p.forward), on_meta(ReverseModel, p.reverse)
        params = {"F": models.num_parameters(F), "G": models.num_parameters(G)}
        for model, _, published, _, right in against_published(p, params):
            found[name, model] = published, right
        assert name in INFERRED
    assert found == {
        ("imagenet256-b2", "F"): (120e6, True),
        ("imagenet256-b2", "G"): (133e6, False),  # with w embedded in each block: 5 % more
        ("imagenet256-b2-mse", "F"): (120e6, True),
        ("imagenet256-b2-mse", "G"): (133e6, True),
        ("imagenet256-xl2", "F"): (690e6, True),
    }
    wider = against_published(find_preset("imagenet256-b2"), {"F": 124e6, "G": 133e6})
    assert not wider[0][-1] and wider[1][-1]


def test_the_example_of_find_preset_runs():
    examples = doctest.DocTestFinder().find(find_preset, globs=vars(presets).copy())
    failed, tried = doctest.DocTestRunner().run(examples[0])
    assert failed == 0 < tried


def test_the_nearest_name_is_offered():
    with pytest.raises(BitflowError, match="mnist-mini") as e:
        find_preset("mnist-mimi")
    assert "mnist-mimi" in str(e.value)


@pytest.mark.parametrize(
    "name",
    ["../../x", "a/b", "a\\b", "/etc", "..", ".x", "", " a", "a ", "<b>", "a\n", "x" * 101, "-x"],
)
def test_a_name_that_leads_elsewhere_is_refused_where_it_enters(name):
    with pytest.raises(BitflowError, match="cannot name a file"):
        replace(BASE, name=name)


@pytest.mark.parametrize("name", ["mnist-mini", "my run (2)", "größe_1.5", "7", "lr=1e-3, σ 0.1"])
def test_other_names_are_kept(name):
    assert replace(BASE, name=name).name == name


@pytest.mark.parametrize("n", [-1, 0, 1])
def test_a_distance_needs_two_samples(n):
    with pytest.raises(BitflowError, match=f"num_samples is {n}"):
        replace(BASE, num_samples=n)


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            {"features": ("digits", "stlpips-vgg"), "feature_weights": (3.0,)},
            r"stlpips-vgg.*\[3.0\]",
        ),
        ({"features": ("digits",)}, r"digits.*feature_weights \[\]"),
        ({"feature_weights": (0.4,)}, r"features \[\].*\[0.4\]"),
        ({"features": ("digits",), "feature_weights": (0.0,)}, r"\[0.0\].*leave a distance out"),
        ({"features": ("digits",) * 2, "feature_weights": (0.4, -0.1)}, r"\[0.4, -0.1\]"),
        ({"features": ("digits",), "feature_weights": (float("nan"),)}, "nan"),
        ({"adaptive_power": -0.5}, "adaptive_power -0.5"),
        ({"decoder": "vae", "decoded_images": 0}, "decoded_images 0"),
        ({"features": ("vgg",), "feature_weights": (1.0,)}, "'vgg'.*lpips-vgg-crop"),
    ],
)
def test_a_perceptual_end_that_makes_no_sense_is_refused(fields, words):
    with pytest.raises(BitflowError, match=words):
        ObjectiveConfig(**fields)


def test_a_perceptual_end_that_makes_sense_is_taken_as_it_is():
    names, weights = ("lpips-vgg-crop", "convnext-v2-base-crop"), (0.4, 0.1)
    objective = ObjectiveConfig(features=names, feature_weights=weights, adaptive_power=1.0)
    assert (objective.features, objective.feature_weights) == (names, weights)
    assert ObjectiveConfig(decoded_images=0).decoder == "", "no decoder, no images of it"


@pytest.mark.parametrize("name", PAIRS)
def test_both_models_of_a_pair_have_the_same_parts(name):
    """imagenet64 alone has TARFlow's published F, with the parts that it was published with."""
    preset = find_preset(name)
    same = [
        getattr(preset.forward.transformer, part) == getattr(preset.reverse.transformer, part)
        for part in ("norm", "mlp", "rotary", "qk_norm")
    ]
    assert all(same) if name != "imagenet64" else not any(same)
