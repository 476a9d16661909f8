"""Shards: an epoch that keeps to few of them, draws, and damage that is named."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitflow_edu.data import load_data
from bitflow_edu.io.datasets import DataConfig, count_classes
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.shards import VERSION, Latents, block_order, sha256_of

SCALE, SHIFT = 0.5, 0.25
CFG = DataConfig("imagenet-latents", 8, 4, 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Thirty random latents of two classes in four shards."""
    out = tmp_path_factory.mktemp("latents") / "train"
    (out / "shards").mkdir(parents=True)
    g, notes = torch.Generator().manual_seed(0), []
    for k, count in enumerate((8, 8, 8, 6)):
        moments = torch.randn(count, 2, 2, 4, 8, 8, generator=g)
        moments[:, :, 1] = moments[:, :, 1].abs()
        labels = torch.arange(count) % 2
        path = out / "shards" / f"{k:05d}.safetensors"
        save_file({"moments": moments.half(), "labels": labels}, path)
        size, digest = path.stat().st_size, sha256_of(path)
        notes.append({"name": path.name, "count": count, "bytes": size, "sha256": digest})
    index = {"version": VERSION, "shards": notes, "classes": ["cat", "dog"], "shape": [4, 8, 8]}
    index["vae"] = {"scaling_factor": SCALE, "shift_factor": SHIFT}
    (out / "index.json").write_text(json.dumps(index))
    return out


def shard(out, k):
    return out / "shards" / f"{k:05d}.safetensors"


def test_epoch_order_is_a_local_permutation():
    counts, window = (7, 5, 0, 9, 6, 8, 7, 3), 2
    shard_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for epoch in range(3):
        order = block_order(counts, window, 0, epoch)
        assert sorted(order.tolist()) == list(range(45))
        seen = shard_of[order].tolist()
        last = {s: i for i, s in enumerate(seen)}
        open_at = [sum(seen.index(s) <= i <= last[s] for s in set(seen)) for i in range(len(seen))]
        assert max(open_at) <= window, "never more shards in work than the window"
        assert seen != sorted(seen) and len(set(seen[:8])) > 1, "and within it, mixed"
    assert torch.equal(block_order(counts, window, 0, 1), block_order(counts, window, 0, 1))
    assert not torch.equal(block_order(counts, window, 0, 1), block_order(counts, window, 0, 2))
    assert not torch.equal(block_order(counts, window, 0, 1), block_order(counts, window, 1, 1))


def test_draws_depend_on_the_generator_alone(cache):
    data, index = Latents(cache, window=1), torch.tensor([29, 0, 13, 0, 8])
    one, again = (data.draw(index, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, again) and one.shape == (5, 4, 8, 8) and one.dtype == torch.float32
    assert not torch.equal(one, data.draw(index, torch.Generator().manual_seed(4)))
    assert torch.equal(Latents(cache, window=16).draw(index, torch.Generator().manual_seed(3)), one)


def test_draws_have_the_stored_mean_and_spread(cache):
    """Over many draws: half are mirrored, and each follows its Gaussian, in the model's units."""
    data, n = Latents(cache), 4000
    x = data.draw(torch.full((n,), 5), torch.Generator().manual_seed(0))
    plain, mirror = (data.moments(torch.tensor([5]), torch.tensor([m]))[0].float() for m in (0, 1))
    mean = ((plain[0] + mirror[0]) / 2 - SHIFT) * SCALE
    var = SCALE**2 * ((plain[1] ** 2 + mirror[1] ** 2) / 2 + ((plain[0] - mirror[0]) / 2) ** 2)
    assert ((x.mean(0) - mean).abs() < 5 * (var / n).sqrt() + 1e-5).all()
    assert torch.allclose(x.var(0), var, rtol=0.2)


def test_damaged_latents_are_refused_and_named(cache, tmp_path):
    out = shutil.copytree(cache, tmp_path / "train")
    path = shard(out, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(BitflowError, match="00002.safetensors has"):
        Latents(out)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    Latents(out)
    with pytest.raises(BitflowError, match="00002.safetensors was changed"):
        Latents(out, verify=True)
    path.unlink()
    with pytest.raises(BitflowError, match="00002.safetensors has 0 bytes"):
        Latents(out)
    (out / "index.json").write_text("{")
    with pytest.raises(BitflowError, match="index.json.*cache-latents"):
        Latents(out)


def test_load_data_gives_latents_that_fit(cache):
    cfg, root = DataConfig("imagenet-latents", 8, 4, 2), cache.parent
    data = load_data(cfg, "train", root)
    assert isinstance(data, Latents) and len(data) == 30 and data.classes == ("cat", "dog")
    for changed, what in (({"image_size": 32}, "8x8x4"), ({"num_classes": 1}, "label 1")):
        with pytest.raises(BitflowError, match=what):
            load_data(dataclasses.replace(cfg, **changed), "train", root)
    for folder in (root, None):
        with pytest.raises(BitflowError, match="cache-latents"):
            load_data(cfg, "test", folder)


def test_versions_are_told_apart(cache, tmp_path):
    out = shutil.copytree(cache, tmp_path / "train")
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "version": 2}))
    with pytest.raises(BitflowError, match="version 2"):
        Latents(out)


WRONG = {
    "no object": [],
    "nothing": None,
    "shards": {"shards": {"00000.safetensors": 8}},
    "a shard": {"shards": [5]},
    "its keys": {"shards": [{"name": "00000.safetensors"}]},
    "its count": {"count": -8},
    "its size": {"bytes": "8"},
    "its checksum": {"sha256": None},
    "its name": {"name": 5},
    "its folder": {"name": "../../other.safetensors"},
    "classes": {"classes": "cat"},
    "a class": {"classes": [1, 2]},
    "shape": {"shape": [4, 8]},
    "a side": {"shape": [4, -8, 8]},
    "vae": {"vae": [0.5, 0.25]},
    "a factor": {"vae": {"scaling_factor": "0.5", "shift_factor": 0.0}},
    "an infinite factor": {"vae": {"scaling_factor": float("inf"), "shift_factor": 0.0}},
    "a large factor": {"vae": {"scaling_factor": 10**400, "shift_factor": 0.0}},
    "a large count": {"count": 10**30},
    "a version": {"version": [VERSION]},
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("read", [Latents, lambda out: count_classes(CFG, out.parent)])
def test_an_index_with_wrong_values_is_named(cache, tmp_path, what, read):
    out, change = shutil.copytree(cache, tmp_path / "train"), WRONG[what]
    index = json.loads((out / "index.json").read_text())
    if isinstance(change, dict) and set(change) <= set(index["shards"][0]):
        index["shards"][0] |= change
    else:
        index = index | change if isinstance(change, dict) else change
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(BitflowError, match="index.json|version") as e:
        read(out)
    assert str(out) in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("key", ["version", "shards", "classes", "shape", "vae"])
def test_an_index_without_a_key_is_named(cache, tmp_path, key):
    out = shutil.copytree(cache, tmp_path / "train")
    index = json.loads((out / "index.json").read_text())
    del index[key]
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(BitflowError, match=key):
        Latents(out)


def with_shard(cache, tmp_path, **changes):
    """A copy of the latents whose first shard holds other tensors, with a note that fits them."""
    out = shutil.copytree(cache, tmp_path / "train")
    path, index = shard(out, 0), json.loads((out / "index.json").read_text())
    tensors = load_file(path) | changes
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, path)
    index["shards"][0] |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (out / "index.json").write_text(json.dumps(index))
    return out


SHARDS = {
    "fewer labels": {"labels": torch.zeros(7, dtype=torch.int64)},
    "no labels": {"labels": None},
    "float labels": {"labels": torch.zeros(8)},
    "other moments": {"moments": torch.zeros(8, 2, 2, 4, 8, 4).half()},
    "float moments": {"moments": torch.zeros(8, 2, 2, 4, 8, 8)},
    "one more": {"more": torch.zeros(1)},
}


@pytest.mark.parametrize("what", SHARDS)
def test_a_shard_that_does_not_fit_its_index_is_named(cache, tmp_path, what):
    with pytest.raises(BitflowError, match="00000.safetensors holds"):
        Latents(with_shard(cache, tmp_path, **SHARDS[what]))


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_without_a_name_are_refused(cache, tmp_path, label):
    out = with_shard(cache, tmp_path, labels=torch.full((8,), label))
    with pytest.raises(BitflowError, match=f"labels from .*{label}"):
        load_data(dataclasses.replace(CFG, num_classes=5), "train", out.parent)


def test_no_shards_are_no_latents(cache, tmp_path):
    out = shutil.copytree(cache, tmp_path / "train")
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "shards": []}))
    with pytest.raises(BitflowError, match="holds no latents"):
        load_data(CFG, "train", out.parent)
    assert count_classes(CFG, out.parent) == 2
