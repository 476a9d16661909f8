"""Fingerprints: what stored numbers were made from."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from latent_toys import make_cache, make_toys
from PIL import Image
from streams import Played, Tiny

from bitflow_edu.data import Images
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.models import save_model
from bitflow_edu.io.shards import Latents
from bitflow_edu.scale.autoencoder import Decoded, load_vae
from bitflow_edu.scale.feature_networks import mnist_cnn_network, own_network
from bitflow_edu.scale.fingerprints import (
    check_same_for_all,
    data_fingerprint,
    digest_of,
    model_fingerprint,
    run_fingerprint,
)
from bitflow_edu.scale.image_sources import FolderImages, StoredImages
from conftest import small_flow


def test_values_types_shapes_and_places_count():
    a = torch.arange(6)
    parts = [
        (a,),
        (a.float(),),
        (a.view(2, 3),),
        (a, a),
        (a.flip(0),),
        (a[:0],),
        (torch.tensor(1),),
    ]
    parts += [("a",), ("a", "b"), (["a", "b"],), (None,), ({"a": 1},)]
    assert len({digest_of(*p) for p in parts}) == len(parts)
    assert digest_of(a.view(2, 3).T) == digest_of(a.view(2, 3).T.contiguous())
    assert digest_of(a.bfloat16()) != digest_of(a.half())


def test_one_weight_or_one_field_makes_another_model():
    flow = small_flow()
    before = model_fingerprint(flow)
    assert before == model_fingerprint(small_flow()) != model_fingerprint(small_flow(seed=1))
    flow.cfg = replace(flow.cfg, noise_std=0.31)
    assert model_fingerprint(flow) != before
    other = small_flow()
    with torch.no_grad():
        list(other.parameters())[-1].view(-1)[-1] += 1e-6
    assert model_fingerprint(other) != before


def test_networks_know_their_weights():
    tiny = Tiny()
    first = own_network(tiny, "tiny").weights
    with torch.no_grad():
        tiny.to_features[0, 0] += 1e-6
    assert own_network(tiny, "tiny").weights != first == own_network(Tiny(), "tiny").weights
    assert mnist_cnn_network().weights == mnist_cnn_network().weights != ""


def test_images_in_memory(digits):
    part = digits[:50]
    one = data_fingerprint(part)
    pixels, labels = part.pixels.clone(), part.labels.clone()
    pixels[49, 0, 15, 15] ^= 1
    labels[0] += 1
    changed = [
        replace(part, pixels=pixels),
        replace(part, labels=labels),
        replace(part, classes=tuple("abcdefghij")),
        digits[:49],
        digits[1:51],
    ]
    assert len({one, *map(data_fingerprint, changed)}) == 6
    assert one == data_fingerprint(Images(part.pixels.clone(), part.labels.clone(), part.classes))


def test_files_and_stored_images(digits, tmp_path):
    for i in range(4):
        folder = tmp_path / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.pixels[i, 0].numpy()).save(folder / f"{i}.png")
    one = data_fingerprint(FolderImages(tmp_path, "train", 16))
    assert one == data_fingerprint(FolderImages(tmp_path, "train", 16))
    assert one != data_fingerprint(FolderImages(tmp_path, "train", 8))
    os.utime(tmp_path / "train" / "b" / "3.png", ns=(0, 5))
    touched = data_fingerprint(FolderImages(tmp_path, "train", 16))
    (tmp_path / "train" / "a" / "2.png").rename(tmp_path / "train" / "a" / "9.png")
    assert len({one, touched, data_fingerprint(FolderImages(tmp_path, "train", 16))}) == 3
    found = set()
    for k in (0, 1):
        np.savez(tmp_path / "s.npz", arr_0=np.full((3, 4, 4, 1), k, np.uint8))
        found.add(data_fingerprint(StoredImages(tmp_path / "s.npz")))
    assert len(found) == 2


class Other:
    """A data set of a kind of one's own."""

    labels, epoch_order = torch.arange(200), None

    def __init__(self, shift):
        self.shift, self.drawn = shift, 0

    def __len__(self):
        return 200

    def draw(self, index, generator=None):
        self.drawn += len(index)
        return index[:, None, None, None].float() + self.shift


def test_other_data_sets_are_known_by_some_of_their_images():
    one = Other(0)
    assert data_fingerprint(one) == data_fingerprint(Other(0)) != data_fingerprint(Other(1))
    assert one.drawn <= 64


def test_latents_are_known_by_checksums_and_by_what_decodes_them(tmp_path):
    pytest.importorskip("diffusers")
    vae = load_vae(make_toys(tmp_path) / "vae")
    latents = Latents(make_cache(tmp_path, vae, tmp_path / "latents"))
    one, shown = data_fingerprint(latents), data_fingerprint(Decoded(latents, vae))
    assert one == data_fingerprint(Latents(tmp_path / "latents")) != shown
    with torch.no_grad():
        next(vae.parameters()).add_(1e-3)
    assert data_fingerprint(Decoded(latents, vae)) != shown
    latents.index["shards"][-1]["sha256"] = "other"
    assert data_fingerprint(latents) != one


class Second(Played):
    """The second of two processes; the first one has `main`."""

    def __init__(self, main):
        super().__init__(1, 2)
        self.first = main

    def broadcast(self, value):
        return self.first


def test_processes_with_other_weights_or_images_are_refused():
    check_same_for_all("ab", "weights", Second("ab"))
    with pytest.raises(BitflowError, match="the same weights"):
        check_same_for_all("ab", "weights", Second("cd"))


def test_a_run_is_known_by_its_newest_weights(tmp_path):
    assert run_fingerprint(asset("mnist-mini/forward")) != run_fingerprint(
        asset("mnist-mini/reverse")
    )
    for step, seed in ((10, 0), (9, 1)):
        save_model(small_flow(seed=seed), tmp_path / "run" / "checkpoints" / f"step-{step}")
    save_model(small_flow(), tmp_path / "other")
    assert run_fingerprint(tmp_path / "run") == run_fingerprint(tmp_path / "other")
