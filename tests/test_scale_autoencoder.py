"""Autoencoders: units, moments, what is refused, and the image end behind a decoder."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="latents need diffusers")
from latent_toys import CFG, mse

from bitflow_edu.distances import adaptive
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.shards import Latents
from bitflow_edu.scale import autoencoder
from bitflow_edu.scale.autoencoder import (
    TINY_VAE,
    decode_all,
    decode_latents,
    decoded,
    latent_scale_shift,
    latent_shape,
    load_decoder,
    load_vae,
    posterior_moments,
    tiny_decoder,
    tiny_vae,
)
from bitflow_edu.scale.image_sources import as_jpeg, center_crop, synthetic_picture
from bitflow_edu.scale.latents import cache_latents


@pytest.mark.parametrize("which", ["vae", "small"])
def test_gradients_reach_the_latents_and_not_the_autoencoder(toys, which):
    vae = load_decoder(toys / which)
    a, b = torch.randn(5, 4, 8, 8, requires_grad=True), torch.randn(5, 4, 8, 8, requires_grad=True)
    grads = []
    for keep in (True, False):
        d = decoded(mse, vae, 2, keep)(a, b)
        assert d.shape == (5,) and (d[:2] > 0).all() and not d[2:].any()
        grads.append(torch.autograd.grad(d.mean(), (a, b), allow_unused=True))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-7)
    of_a, of_b = grads[0]
    assert of_a[:2].flatten(1).any(dim=1).all() and not of_a[2:].any() and of_b is None
    assert not any(p.requires_grad or p.grad is not None for p in vae.parameters())


def test_a_decoder_in_training_is_frozen(toys):
    vae = load_decoder(toys / "vae").requires_grad_(True).train()
    a = torch.randn(2, 4, 8, 8, requires_grad=True)
    decoded(mse, vae, 2)(a, torch.randn(2, 4, 8, 8)).mean().backward()
    assert a.grad.any() and not vae.training and all(p.grad is None for p in vae.parameters())


def test_the_sub_batch_is_unbiased(vae):
    a, b = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
    whole = mse(decode_latents(vae, a), decode_latents(vae, b))
    assert torch.allclose(decoded(mse, vae, 6)(a, b), whole, atol=1e-6)
    assert torch.allclose(decoded(mse, vae, 100)(a, b), whole, atol=1e-6)
    turns = torch.stack([decoded(mse, vae, 2)(a.roll(i, 0), b.roll(i, 0)).mean() for i in range(6)])
    assert torch.allclose(turns.mean(), whole.mean(), rtol=1e-5)
    assert torch.equal(decoded(adaptive(mse), vae, 2)(a, b), decoded(adaptive(mse), vae, 2)(a, b))
    with pytest.raises(BitflowError, match="sub-batch of 0"):
        decoded(mse, vae, 0)


def test_units_of_the_two_decoders(toys, vae):
    small, x = load_decoder(toys / "small"), torch.randn(3, 4, 8, 8)
    assert torch.equal(decode_latents(vae, x), vae.decode(x / vae.config.scaling_factor).sample)
    assert torch.equal(decode_latents(small, x), small.decode(x).sample)
    for one in (vae, small):
        images = decode_all(one, 10 * x, batch_size=2)
        assert images.shape == (3, 3, 16, 16) and images.abs().max() <= 1
        assert not images.requires_grad
        assert torch.allclose(images, decode_latents(one, 10 * x).clamp(-1, 1), atol=1e-5)


def test_a_shifted_autoencoder(toys, source, tmp_path):
    """Encoding subtracts the shift, decoding adds it."""
    shifted = load_vae(toys / "vae")
    shifted.register_to_config(shift_factor=0.25)
    cache_latents(source, tmp_path / "train", shifted, CFG)
    data = Latents(tmp_path / "train")
    stored = data.moments(torch.arange(30), torch.zeros(30, dtype=torch.int64)).float()
    x = data.draw(torch.arange(30), torch.Generator().manual_seed(0))
    back = x / shifted.config.scaling_factor + 0.25
    gap = (back - stored[:, 0]).abs().mean(dim=(1, 2, 3))
    assert 3 < (gap < 0.06).sum() < 27, "those that were not mirrored are back where they came from"
    assert torch.allclose(decode_latents(shifted, x), shifted.decode(back).sample, atol=1e-5)


def test_autoencoders_that_cannot_be_loaded(toys, tmp_path, monkeypatch):
    with pytest.raises(BitflowError, match="no autoencoder"):
        load_decoder(tmp_path)
    with pytest.raises(BitflowError, match="AutoencoderTiny: it decodes"):
        load_vae(toys / "small")
    shutil.copytree(toys / "vae", tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BitflowError, match="cut"):
        load_vae(tmp_path / "cut")
    config = json.loads((toys / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    with pytest.raises(BitflowError, match="UNet2DModel"):
        load_decoder(tmp_path)

    def missing(name):
        raise ImportError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(autoencoder.importlib, "import_module", missing)
    with pytest.raises(BitflowError, match="pip install diffusers"):
        load_vae(toys / "vae")


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_tiny_autoencoders_have_unit_latents(tmp_path, factor):
    vae = load_vae(tiny_vae(tmp_path / "vae", factor))
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    pixels = torch.stack(
        [center_crop(as_jpeg(synthetic_picture(i)), 8 * factor) for i in range(40, 60)]
    )
    x = posterior_moments(vae, pixels)[:, 0].float() * latent_scale_shift(vae)[0]
    assert latent_shape(vae, 8 * factor) == (4, 8, 8) == tuple(x.shape[1:]) and 0.7 < x.std() < 1.4
    assert (
        decode_latents(load_decoder(tiny_decoder(tmp_path / "small", factor)), x).shape
        == pixels.shape
    )


def test_the_toy_by_its_name_is_the_one_written_to_disk(toys):
    """`TINY_VAE` needs neither files nor the hub, and can encode, too."""
    named, written = load_vae(TINY_VAE), load_vae(toys / "vae")
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(decode_latents(named, x), decode_latents(written, x))
    assert not named.training and not any(p.requires_grad for p in named.parameters())


def test_images_may_be_decoded_together(vae):
    """One at a time or all at once: the same distances and gradients, up to rounding."""
    a, b = torch.randn(5, 4, 8, 8, requires_grad=True), torch.randn(5, 4, 8, 8)
    found = [decoded(mse, vae, 4, at_once=n)(a, b) for n in (1, 3, 4)]
    grads = [torch.autograd.grad(d.sum(), a)[0] for d in found]
    for d, grad in zip(found[1:], grads[1:]):
        assert torch.allclose(d, found[0], atol=1e-6) and torch.allclose(grad, grads[0], atol=1e-5)
    with pytest.raises(BitflowError, match="at_once is 0"):
        decoded(mse, vae, 4, at_once=0)


def test_decoded_images_stay_where_the_autoencoder_is():
    """An evaluation hands them on to a network there; no copy to the CPU in between."""

    class Vae(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1, device="meta"))
            self.config = SimpleNamespace(latent_channels=4, scaling_factor=1.0)

        def decode(self, x):
            return SimpleNamespace(sample=x[:, :3])

    assert decode_all(Vae(), torch.randn(3, 4, 8, 8), 2).device.type == "meta"
