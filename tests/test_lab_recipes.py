"""Training F and G from a preset: through the same code for every preset, with what it says."""

import json
from dataclasses import replace

import pytest
import torch

from bitflow_edu.coupling import uniform_noise_loss
from bitflow_edu.data import load_data
from bitflow_edu.distances import DISTANCES
from bitflow_edu.inverse_strategies import mse
from bitflow_edu.lab import recipes
from bitflow_edu.lab.presets import ObjectiveConfig, find_preset
from bitflow_edu.lab.recipes import image_distance, stage_one_loss, train_forward, train_reverse
from bitflow_edu.scale.autoencoder import tiny_vae
from bitflow_edu.tarflow import forward_loss


def images(side, channels, n=4):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_preset_with_clipping_and_modern_blocks_trains_as_a_pair(digits, tmp_path):
    preset, changed = find_preset("imagenet64-smoke"), {}
    for part in ("forward", "reverse"):
        changed[part] = replace(getattr(preset, part), channels=1, num_classes=10)
        train = getattr(preset, f"train_{part}")
        changed[f"train_{part}"] = replace(train, steps=2, batch_size=4, precision="fp32")
    preset = replace(preset, **changed)
    flow = train_forward(preset, digits[:8], tmp_path / "f")
    reverse = train_reverse(preset, flow, digits[:8], tmp_path / "g")
    assert all(t.isfinite().all() for t in reverse.parameters())


def test_a_run_leaves_pictures_its_preset_and_how_it_was_started(tmp_path):
    preset = find_preset("mnist-mini-smoke")
    preset = replace(preset, train_forward=replace(preset.train_forward, steps=4, sample_every=2))
    train_forward(preset, load_data(preset.data)[:100], tmp_path / "run")
    names = [p.name for p in sorted((tmp_path / "run" / "samples").iterdir())]
    assert names == ["step-00000002.png", "step-00000004.png"]
    (start,) = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert json.loads(start)["step"] == 0
    assert (tmp_path / "run" / "preset.yaml").exists()


def test_stage_one_has_the_noise_of_its_flow():
    assert stage_one_loss(find_preset("mnist-mini").forward) is forward_loss
    assert stage_one_loss(find_preset("mnist-tarflow").forward) is uniform_noise_loss
    assert stage_one_loss(find_preset("mnist-glow").forward) is uniform_noise_loss


def test_a_distance_of_ones_own_is_asked_for_by_its_name(monkeypatch):
    asked = []

    def mine(device):
        asked.append(device)
        return lambda a, b: (a - b).abs().flatten(1).mean(dim=1)

    monkeypatch.setitem(DISTANCES, "mine", mine)
    a, b = images(8, 3), images(8, 3).flip(0)
    objective = ObjectiveConfig(features=("mine",), feature_weights=(0.5,))
    expected = mse(a, b) + 0.5 * (a - b).abs().flatten(1).mean(dim=1)
    torch.testing.assert_close(image_distance(objective, "cpu")(a, b), expected)
    both = ObjectiveConfig(
        features=("mine", "mine"), feature_weights=(1.0, 1.0), adaptive_power=1.0
    )
    assert image_distance(both, "cpu")(a, b).isfinite().all() and asked == ["cpu"] * 3
    without = image_distance(ObjectiveConfig(), "cpu")
    assert without(a, b).equal(mse(a, b)) and len(asked) == 3, "none is named"


def test_the_objective_sees_decoded_images(tmp_path):
    """Where `objective.decoder` is set, perceptual distances compare decoded images."""
    pytest.importorskip("diffusers")
    a, b = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randn(3, 4, 8, 8)
    plain = ObjectiveConfig(features=("digits",), feature_weights=(1.0,), adaptive_power=1.0)
    coloured = replace(plain, decoder=str(tiny_vae(tmp_path / "vae")), decoded_images=3)
    seen = []

    def pixel(u, v):
        seen.append(u.shape)
        return mse(u, v)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(recipes, "find_distance", lambda name, device: pixel)
        image_distance(coloured)(a, b).mean().backward()
    assert set(seen) == {(3, 3, 16, 16)}
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0
