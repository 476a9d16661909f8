"""Training F and G from a preset: through the same code for every preset, with what it says."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bitflow_edu.coupling import uniform_noise_loss
from bitflow_edu.data import Images, load_data
from bitflow_edu.distances import DISTANCES, adaptive, cropped, find_distance
from bitflow_edu.inverse_strategies import STRATEGIES, mse, reverse_loss
from bitflow_edu.io.checkpoints import read_metrics
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build, newest_checkpoint
from bitflow_edu.lab import recipes
from bitflow_edu.lab.presets import ObjectiveConfig, find_preset
from bitflow_edu.lab.recipes import image_distance, stage_one_loss, train_forward, train_reverse
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.scale import autoencoder
from bitflow_edu.scale.autoencoder import TINY_VAE, decode_latents, load_decoder, tiny_vae
from bitflow_edu.tarflow import TARFlow, forward_loss


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
        seen.clear()
        image_distance(coloured, pieces=2)(a, b)  # a piece of two decodes its share
        assert set(seen) == {(2, 3, 16, 16)}
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0


def seed(n):
    return torch.Generator().manual_seed(n)


def digits_crop(device):
    """The digit network, which looks at crops."""
    return cropped(DISTANCES["digits"](device), 24)


def pixels_crop(device):
    """Squared error of crops."""
    return cropped(mse, 24)


@pytest.fixture
def cropping(monkeypatch):
    """Two distances that crop, by the names of the published ones, whose weights are not here."""
    monkeypatch.setitem(DISTANCES, "lpips-vgg-crop", digits_crop)
    monkeypatch.setitem(DISTANCES, "convnext-v2-base-crop", pixels_crop)
    names = ("lpips-vgg-crop", "convnext-v2-base-crop")
    return ObjectiveConfig(features=names, feature_weights=(0.4, 0.1), adaptive_power=1.0)


def test_the_published_weights_arrive_at_the_loss(cropping):
    a, b, g = images(16, 1), images(16, 1).flip(0), seed(7)
    found = image_distance(cropping)(a, b, generator=g)
    expected = adaptive(mse)(a, b)
    for weight, name in ((0.4, "lpips-vgg-crop"), (0.1, "convnext-v2-base-crop")):
        d = find_distance(name)(a, b, generator=seed(7))
        expected = expected + weight * d / (d + 0.01)
    torch.testing.assert_close(found, expected)
    assert g.get_state().equal(seed(7).get_state()), "later draws do not notice"


def test_without_a_crop_the_generator_changes_nothing():
    a, b, g = images(16, 1), images(16, 1).flip(0), seed(0)
    for preset in ("mnist-mini", "imagenet64"):
        distance = image_distance(find_preset(preset).objective)
        assert distance(a, b, generator=g).equal(distance(a, b))
    assert g.get_state().equal(seed(0).get_state())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_generator_of_the_step_draws_the_crops(cropping, strategy):
    preset = find_preset("mnist-mini-smoke")
    flow = build(TARFlow, preset.forward, 0, "cpu")
    shape = replace(preset.reverse, token_states=strategy == "hidden-distillation")
    model, x, c = build(ReverseModel, shape, 0, "cpu"), images(16, 1), torch.arange(4)
    loss_fn = reverse_loss(flow, STRATEGIES[strategy], image_distance=image_distance(cropping))
    first, again, other = (loss_fn(model, x, c, seed(n))[1]["image"] for n in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_a_stopped_training_with_crops_goes_on_bit_for_bit(cropping, digits, tmp_path, monkeypatch):
    preset = replace(find_preset("mnist-mini-smoke"), objective=cropping)
    cfg = replace(preset.train_reverse, steps=5, batch_size=8, num_microbatches=2)
    preset = replace(preset, train_reverse=replace(cfg, log_every=1, checkpoint_every=4))
    flow = build(TARFlow, preset.forward, 0, "cpu")

    def weights(name, resume=False):
        torch.rand(3)  # the global state is another one
        train_reverse(preset, flow, digits[:32], tmp_path / name, resume=resume)
        return (newest_checkpoint(tmp_path / name) / "model.safetensors").read_bytes()

    calls = []

    def stops(device):
        distance = digits_crop(device)

        def stopping(a, b, generator=None):
            calls.append(generator)
            if len(calls) == 7:  # in the fourth step of two microbatches
                raise KeyboardInterrupt
            return distance(a, b, generator=generator)

        return stopping

    whole = weights("whole")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setitem(DISTANCES, "lpips-vgg-crop", stops)
        weights("parts")
    assert newest_checkpoint(tmp_path / "parts").name == "step-00000002"
    assert weights("parts", resume=True) == whole and None not in calls


def test_decoded_images_are_cropped_by_the_generator_of_the_step(cropping, tmp_path):
    pytest.importorskip("diffusers")
    folder = str(tiny_vae(tmp_path / "vae"))
    objective = replace(cropping, decoder=folder, decoded_images=3)
    a, b = torch.randn(4, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 8, 8)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(DISTANCES, "lpips-vgg-crop", pixels_crop)  # digits are grey
        found = image_distance(objective)(a, b, generator=seed(2))
    vae = load_decoder(folder, "cpu")
    u, v = (decode_latents(vae, x[:3]) for x in (a, b))
    d = cropped(mse, 24)(u, v, generator=seed(2))
    expected = adaptive(mse)(a, b)
    expected = expected + torch.cat([0.5 * d / (d + 0.01) * 4 / 3, torch.zeros(1)])
    torch.testing.assert_close(found, expected)
    found.mean().backward()
    assert a.grad.isfinite().all() and a.grad[:3].abs().sum() > 0


def test_f_is_compiled_beside_g(digits, tmp_path, monkeypatch):
    """Frozen, it takes half of a step; asked for by the option that compiles G."""
    compiled = []
    monkeypatch.setattr(recipes, "compile_layers", compiled.append)
    monkeypatch.setattr(recipes, "train", lambda *args: args[0])
    preset = find_preset("mnist-mini-smoke")
    flow = TARFlow(preset.forward)
    recipes.train_reverse(preset, flow, digits, tmp_path)
    assert compiled == []
    preset = replace(preset, train_reverse=replace(preset.train_reverse, compile=True))
    recipes.train_reverse(preset, flow, digits, tmp_path)
    assert compiled == [flow]


def test_the_smoke_twin_of_the_whole_recipe_trains(tmp_path):
    """w, decoder, crops, two networks, adaptive weights: nothing is downloaded."""
    pytest.importorskip("diffusers")
    preset = find_preset("imagenet256-b2-smoke")
    train = replace(preset.train_reverse, steps=3, batch_size=8, num_microbatches=2, log_every=1)
    preset = replace(preset, train_reverse=train)
    pixels = torch.randint(256, (16, 4, 8, 8), dtype=torch.uint8)
    data = Images(pixels, torch.arange(16) % 2, ("0", "1"))
    flow = build(TARFlow, preset.forward, 0, "cpu")
    model = train_reverse(preset, flow, data, tmp_path / "g")
    assert model.cfg.max_guidance == 3.0 and all(p.isfinite().all() for p in model.parameters())
    assert all(
        math.isfinite(line["image"]) for line in read_metrics(tmp_path / "g" / "metrics.jsonl")
    )


def test_two_distances_behind_a_decoder_share_one_decoding(cropping, tmp_path, monkeypatch):
    """The target and each sample pass the decoder once, whatever looks at them afterwards."""
    pytest.importorskip("diffusers")
    calls, decode = [], autoencoder.decode_latents
    monkeypatch.setattr(
        autoencoder, "decode_latents", lambda vae, x: (calls.append(len(x)), decode(vae, x))[1]
    )
    monkeypatch.setitem(DISTANCES, "lpips-vgg-crop", pixels_crop)  # digits are grey
    objective = replace(cropping, decoder=TINY_VAE, decoded_images=3)
    a, b = torch.randn(2, 4, 4, 8, 8).unbind()
    image_distance(objective)(a, b, generator=seed(0))
    assert calls == [3, 1, 1, 1]


def test_a_run_goes_on_with_its_images_and_its_f_alone(digits, tmp_path):
    """A name says nothing of what lies in a folder; the images and weights themselves do."""
    preset = find_preset("mnist-mini-smoke")
    F = train_forward(preset, digits, tmp_path / "f")
    train_reverse(preset, F, digits, tmp_path / "g")
    others = replace(digits, pixels=digits.pixels.flip(-1))
    with pytest.raises(BitflowError, match="data.images"):
        train_forward(preset, others, tmp_path / "f", resume=True)
    with pytest.raises(BitflowError, match="data.images"):
        train_reverse(preset, F, others, tmp_path / "g", resume=True)
    with torch.no_grad():
        next(F.parameters()).add_(1.0)
    with pytest.raises(BitflowError, match="forward.weights"):
        train_reverse(preset, F, digits, tmp_path / "g", resume=True)
    run = json.loads((tmp_path / "g" / "run.json").read_text())
    del run["data"], run["forward"]  # as an older version left it
    (tmp_path / "g" / "run.json").write_text(json.dumps(run))
    train_reverse(preset, F, digits, tmp_path / "g", resume=True)
