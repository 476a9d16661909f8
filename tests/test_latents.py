"""Sources, the cache of latents, reading it, and the image end behind a decoder."""

import dataclasses
import errno
import io
import json
import resource
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("diffusers", reason="latents need diffusers")
import fsspec
import numpy as np
from PIL import Image

from bitflow_edu import latents
from bitflow_edu.data import BitflowError, DataConfig, load_data
from bitflow_edu.distances import adaptive
from bitflow_edu.latents import (
    CacheConfig,
    FolderSource,
    Latents,
    TarSource,
    as_jpeg,
    block_order,
    braces,
    cache_latents,
    decode,
    decode_all,
    decoded,
    find_source,
    latent_shape,
    load_decoder,
    load_vae,
    moments,
    read_tar,
    sha256_of,
    square,
    synthetic_images,
    synthetic_picture,
    synthetic_tar,
    tiny_decoder,
    tiny_vae,
    units,
)
from bitflow_edu.training import Alone

CFG = CacheConfig(image_size=16, batch_size=4, max_corrupt=2, workers=2)


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder of pictures and two autoencoders, as their files lie on disk."""
    folder = tmp_path_factory.mktemp("toys")
    synthetic_images(folder / "pictures", 30)
    tiny_vae(folder / "vae")
    tiny_decoder(folder / "small")
    return folder


@pytest.fixture(scope="session")
def vae(toys):
    return load_vae(toys / "vae")


@pytest.fixture
def source(toys):
    return FolderSource(str(toys / "pictures"), per_shard=8)


@pytest.fixture(scope="session")
def cache(toys, vae, tmp_path_factory):
    """The finished latents of the toy pictures; tests that change files work on a copy."""
    out = tmp_path_factory.mktemp("cache") / "train"
    cache_latents(FolderSource(str(toys / "pictures"), per_shard=8), out, vae, CFG)
    return out


def shard(out, k):
    return out / "shards" / f"{k:05d}.safetensors"


def contents(out):
    """Every file of a cache, as bytes."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


class Two(Alone):
    """One of two processes, played by threads; on_main and agree as `Ranks` does them."""

    size = 2

    def __init__(self, rank, meet, said):
        self.rank, self.main, self.meet, self.said = rank, rank == 0, meet, said

    def barrier(self):
        self.meet.wait(60)

    def on_main(self, fn):
        value = fn() if self.main else None
        self.barrier()
        return value

    def agree(self, value):
        if self.main:
            self.said["value"] = value
        self.barrier()
        return self.said["value"]


def on_two(call):
    """`call(ranks)` by two processes at once; what each gave."""
    meet, said, found = threading.Barrier(2), {}, {}

    def work(rank):
        try:
            found[rank] = call(Two(rank, meet, said))
        except Exception as e:
            found[rank] = e
            meet.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return found


# squares and sources


def stored(pixels, kind, mode="RGB"):
    """Pixels `(H, W, 3)` as the bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def test_square_is_adms():
    """Halved by boxes while twice too large, then bicubic, then the centre; any mode to RGB."""
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = (200, 100, 50)  # exactly the centred square
    for mode in ("RGB", "L", "CMYK", "P"):
        got = square(stored(wide, "TIFF", mode), 16)
        assert got.shape == (3, 16, 16) and got.dtype == torch.uint8
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None]
    assert torch.equal(square(stored(wide, "PNG"), 16), colour.expand(3, 16, 16))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    boxes = torch.from_numpy(noise).float().reshape(16, 2, 16, 2, 3).mean(dim=(1, 3))
    assert (square(stored(noise, "PNG"), 16).float() - boxes.permute(2, 0, 1)).abs().max() <= 1


def test_folder_is_listed_once_and_shuffled(toys, tmp_path, monkeypatch):
    source = FolderSource(str(toys / "pictures"), per_shard=8)
    pieces = source.open(tmp_path)
    first = [list(pieces.read(k)) for k in range(len(pieces.names))]
    assert [len(p) for p in first] == [8, 8, 8, 6] and pieces.classes == ("n01440764", "n01443537")
    assert all({r.label for r in piece} == {0, 1} for piece in first), "a shard mixes classes"
    assert all(r.name.startswith(pieces.classes[r.label]) for piece in first for r in piece)
    assert len({r.name for piece in first for r in piece}) == 30
    monkeypatch.setattr(latents, "list_folder", lambda *_: pytest.fail("listed again"))
    assert [r.name for r in source.open(tmp_path).read(0)] == [r.name for r in first[0]]


def test_empty_or_missing_folders_are_refused(tmp_path):
    with pytest.raises(BitflowError, match="has no train/"):
        FolderSource(str(tmp_path)).open(tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(BitflowError, match="holds no"):
        FolderSource(str(tmp_path)).open(tmp_path)


def test_train_numbers_the_classes_of_every_split(toys, tmp_path):
    shutil.copytree(toys / "pictures", tmp_path / "p")
    shutil.copytree(tmp_path / "p" / "train" / "n01443537", tmp_path / "p" / "val" / "n01443537")
    pieces = FolderSource(str(tmp_path / "p"), "val").open(tmp_path)
    assert len(pieces.classes) == 2 and {raw.label for raw in pieces.read(0)} == {1}


def test_a_file_that_is_gone_is_named(toys, tmp_path):
    shutil.copytree(toys / "pictures", tmp_path / "p")
    pieces = FolderSource(str(tmp_path / "p")).open(tmp_path)
    gone = next((tmp_path / "p").rglob("*.JPEG"))
    gone.unlink()
    with pytest.raises(BitflowError, match=gone.name):
        list(pieces.read(0))


def test_braces():
    assert braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert braces("plain.tar") == ["plain.tar"]


def test_what_a_source_is(tmp_path):
    assert isinstance(find_source(tmp_path), FolderSource)
    for where in ("s3://bucket/a.tar", "a-{0..3}.tar", "a-*.tar", tmp_path / "a.tar", "a.tar.gz"):
        assert isinstance(find_source(where), TarSource), where


def test_tars_from_disk_and_from_object_storage(tmp_path):
    for i in range(3):
        data = synthetic_tar(range(5 * i, 5 * i + 5))
        (tmp_path / f"t-{i:03d}.tar").write_bytes(data)
        with fsspec.open(f"memory://b/t-{i:03d}.tar", "wb") as f:
            f.write(data)
    names = ("t-{000..002}.tar", "t-*.tar")
    for pattern in [f"{where}/{name}" for where in (tmp_path, "memory://b") for name in names]:
        pieces = TarSource(pattern, 2).open()
        found = [raw for k in range(len(pieces.names)) for raw in pieces.read(k)]
        assert [r.label for r in found] == [i % 2 for i in range(15)]
        assert all(r.data == as_jpeg(synthetic_picture(i)) for i, r in enumerate(found))


def test_a_tar_cut_anywhere_is_refused_and_named(tmp_path):
    data, path = synthetic_tar(range(3)), tmp_path / "cut.tar"
    end = len(data.rstrip(b"\0"))
    for cut in [0, 1, 100, *range(512, end, 512), end - 3, end + 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(BitflowError, match=r"cut\.tar"):
            list(read_tar(str(path), 2))
    path.write_bytes(data)
    assert len(list(read_tar(str(path), 2))) == 3


def test_bad_tars_are_refused(tmp_path):
    (tmp_path / "label.tar").write_bytes(synthetic_tar(range(2)))
    with pytest.raises(BitflowError, match="000001.cls says '1'"):
        list(read_tar(str(tmp_path / "label.tar"), 1))
    with pytest.raises(BitflowError, match="none.tar"):
        list(read_tar(str(tmp_path / "none.tar"), 2))
    (tmp_path / "no.tar").write_bytes(b"this is no tar" * 1000)
    with pytest.raises(BitflowError, match="no.tar"):
        list(read_tar(str(tmp_path / "no.tar"), 2))
    with pytest.raises(BitflowError, match="no tar is named"):
        TarSource(f"{tmp_path}/x-*.tar").open()
    with pytest.raises(BitflowError, match="nothing://"):
        list(read_tar("nothing://bucket/a.tar", 2))


# the cache


def test_moments_are_the_encoders(toys, vae, cache):
    """What is stored is what diffusers says of the same square, mirror image included."""
    data = Latents(cache)
    raw = next(iter(FolderSource(str(toys / "pictures"), per_shard=8).open(cache).read(0)))
    pixels = square(raw.data, 16)[None]
    x = (pixels.float() + 0.5) / 128 - 1
    for mirrored, image in enumerate((x, x.flip(-1))):
        with torch.no_grad():
            want = vae.encode(image).latent_dist
        mean, std = data.moments(torch.tensor([0]), torch.tensor([mirrored]))[0].float()
        assert torch.allclose(mean, want.mean[0], atol=2e-3)
        assert torch.allclose(std, want.std[0], atol=1e-3, rtol=1e-2)
    assert data.labels[0] == raw.label


def test_resume_after_an_interruption_is_exact(source, vae, cache, tmp_path, monkeypatch):
    out, encode, calls = tmp_path / "train", latents.encode_piece, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(latents, "encode_piece", dies)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(source, out, vae, CFG)
    assert not (out / "index.json").exists() and len(list(out.rglob("*.safetensors"))) == 2
    shard(out, 1).write_bytes(b"half")  # and one of the two was damaged since
    cache_latents(source, out, vae, CFG)
    assert len(calls) == 6, "the interrupted, the damaged and the last one; shard 0 left alone"
    assert contents(out) == contents(cache)


def test_two_processes_write_what_one_does(source, vae, cache, tmp_path, monkeypatch):
    encode, calls = latents.encode_piece, []

    def counted(*args):
        calls.append(1)
        return encode(*args)

    monkeypatch.setattr(latents, "encode_piece", counted)
    found = on_two(lambda ranks: cache_latents(source, tmp_path / "train", vae, CFG, ranks))
    assert found[0] == found[1] and found[0]["total"] == 30
    assert contents(tmp_path / "train") == contents(cache) and len(calls) == 4, "no piece twice"


def test_corrupt_images_are_counted_named_and_limited(toys, vae, tmp_path):
    shutil.copytree(toys / "pictures", tmp_path / "p")
    bad = sorted((tmp_path / "p").rglob("*.JPEG"))[:2]
    bad[0].write_bytes(bad[0].read_bytes()[:300])
    bad[1].write_bytes(b"")
    source = FolderSource(str(tmp_path / "p"), per_shard=8)
    index = cache_latents(source, tmp_path / "ok", vae, CFG)
    assert index["total"] == 28 == len(Latents(tmp_path / "ok")) and len(index["corrupt"]) == 2
    assert all(any(b.name in name for name in index["corrupt"]) for b in bad)
    assert cache_latents(source, tmp_path / "ok", vae, CFG)["corrupt"] == index["corrupt"]
    one = dataclasses.replace(CFG, max_corrupt=1)
    with pytest.raises(BitflowError, match="max_corrupt = 1"):
        cache_latents(source, tmp_path / "strict", vae, one)
    with pytest.raises(BitflowError, match="max_corrupt = 1"):
        cache_latents(source, tmp_path / "ok", vae, one)  # also when the shards are there already


def test_corrupt_images_of_finished_shards_count_at_once(toys, vae, tmp_path):
    """A second start does not encode for hours before it finds that too much is corrupt."""
    shutil.copytree(toys / "pictures", tmp_path / "p")
    source, out = FolderSource(str(tmp_path / "p"), per_shard=8), tmp_path / "out"
    spoilt = [raw.name for raw in source.open(tmp_path).read(0)][:2]
    for name in spoilt:
        (tmp_path / "p" / "train" / name).write_bytes(b"no image")
    cache_latents(source, out, vae, CFG)
    shard(out, 3).unlink()
    with pytest.raises(BitflowError, match="max_corrupt = 1"):
        cache_latents(source, out, vae, dataclasses.replace(CFG, max_corrupt=1))
    assert not shard(out, 3).exists()


def test_corrupt_images_of_all_processes_count(toys, vae, tmp_path):
    """Each process sees one; together they are too many."""
    shutil.copytree(toys / "pictures", tmp_path / "p")
    source = FolderSource(str(tmp_path / "p"), per_shard=15)
    one = dataclasses.replace(CFG, max_corrupt=1)
    pieces = source.open(tmp_path)
    for k in range(2):
        (tmp_path / "p" / "train" / next(iter(pieces.read(k))).name).write_bytes(b"no image")
    found = on_two(lambda ranks: cache_latents(source, tmp_path / "out", vae, one, ranks))
    errors = [str(e) for e in found.values() if isinstance(e, BitflowError)]
    assert any("2 images cannot be decoded" in e for e in errors)
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_truncated_tar_leaves_finished_shards(vae, tmp_path):
    for i in range(2):
        (tmp_path / f"t-{i}.tar").write_bytes(synthetic_tar(range(4 * i, 4 * i + 4)))
    whole = (tmp_path / "t-1.tar").read_bytes()
    (tmp_path / "t-1.tar").write_bytes(whole[: whole.rindex(b"000007.jpg")])
    source, out = TarSource(f"{tmp_path}/t-{{0..1}}.tar", 2), tmp_path / "out"
    with pytest.raises(BitflowError, match=r"t-1\.tar is cut off"):
        cache_latents(source, out, vae, CFG)
    first = sha256_of(shard(out, 0))
    (tmp_path / "t-1.tar").write_bytes(whole)
    index = cache_latents(source, out, vae, CFG)
    assert index["total"] == 8 and index["shards"][0]["sha256"] == first
    assert Latents(out, verify=True).labels.tolist() == [0, 1] * 4


def test_images_stay_in_order_and_few_wait():
    """However the threads run, results come in order, and the source is not read far ahead."""
    taken = []

    def items():
        for i in range(40):
            taken.append(i)
            yield i

    def slowly(i):
        time.sleep(0.002 * (i % 3))
        return i

    with ThreadPoolExecutor(4) as pool:
        for done, i in enumerate(latents.ahead(items(), slowly, pool, 5)):
            assert i == done and len(taken) <= done + 6
    assert len(taken) == 40


def test_other_settings_are_refused(toys, source, vae, cache, tmp_path):
    out = shutil.copytree(cache, tmp_path / "train")
    before = contents(out)
    other = load_vae(tiny_vae(tmp_path / "other", seed=1))
    smaller_shards = dataclasses.replace(source, per_shard=4)
    larger = dataclasses.replace(CFG, image_size=32)
    bf16 = dataclasses.replace(CFG, precision="bf16")
    calls = {
        "vae.": (source, out, other, CFG),
        "image_size": (source, out, vae, larger),
        "precision": (source, out, vae, bf16),
        "source.per_shard": (smaller_shards, out, vae, CFG),
    }
    for name, args in calls.items():
        with pytest.raises(BitflowError, match=f"made with {name}"):
            cache_latents(*args)
    assert contents(out) == before
    shutil.copytree(toys / "vae", tmp_path / "moved")  # the same weights, the same autoencoder
    assert cache_latents(source, out, load_vae(tmp_path / "moved"), CFG)["total"] == 30


def test_weights_decide_not_names(source, toys, cache, tmp_path):
    """Another autoencoder with the same scaling factor is another."""
    out, other = shutil.copytree(cache, tmp_path / "train"), load_vae(toys / "vae")
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    with pytest.raises(BitflowError, match="vae.weights"):
        cache_latents(source, out, other, CFG)


def test_a_full_disk_is_a_clear_end(source, vae, cache, tmp_path):
    """The file-size limit of the process plays the disk that is full."""
    out, soft = tmp_path / "train", resource.getrlimit(resource.RLIMIT_FSIZE)
    (out / "shards").mkdir(parents=True)
    for name in ("settings.json", "listing.tsv", "shards/00000.safetensors", "shards/00000.json"):
        shutil.copy(cache / name, out / name)
    before = contents(out)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, soft[1]))
        with pytest.raises(BitflowError, match="cannot write to"):
            cache_latents(source, out, vae, CFG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    after = contents(out)
    assert {name: after[name] for name in before} == before and not (out / "index.json").exists()
    cache_latents(source, out, vae, CFG)
    assert contents(out) == contents(cache)


def test_an_output_that_cannot_be_written(source, vae, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(BitflowError, match="cannot write to"):
        cache_latents(source, tmp_path / "file" / "out", vae, CFG)

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(latents, "save_tensors", read_only)
    with pytest.raises(BitflowError, match="Read-only file system"):
        cache_latents(source, tmp_path / "out", vae, CFG)


def test_sizes_that_do_not_fit_are_refused(source, vae, tmp_path):
    with pytest.raises(BitflowError, match="multiple of 2"):
        cache_latents(source, tmp_path / "out", vae, dataclasses.replace(CFG, image_size=17))
    with pytest.raises(BitflowError, match="nothing can be encoded"):
        CacheConfig(precision="fp8")


# reading


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


def test_draws_have_the_stored_mean_and_spread(cache, vae):
    """Over many draws: half are mirrored, and each follows its Gaussian, in the model's units."""
    data = Latents(cache)
    g, n, scale = torch.Generator().manual_seed(0), 4000, units(vae)[0]
    x = data.draw(torch.full((n,), 5), g)
    plain, mirror = (data.moments(torch.tensor([5]), torch.tensor([m]))[0].float() for m in (0, 1))
    mean = (plain[0] + mirror[0]) / 2 * scale
    var = scale**2 * ((plain[1] ** 2 + mirror[1] ** 2) / 2 + ((plain[0] - mirror[0]) / 2) ** 2)
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
    with pytest.raises(BitflowError, match="index.json"):
        Latents(out)


def test_load_data_gives_latents_that_fit(cache):
    cfg, root = DataConfig("imagenet-latents", 8, 4, 2), cache.parent
    data = load_data(cfg, "train", root)
    assert isinstance(data, Latents) and len(data) == 30
    assert data.classes == ("n01440764", "n01443537")
    for changed, what in (({"image_size": 32}, "8x8x4"), ({"num_classes": 1}, "label 1")):
        with pytest.raises(BitflowError, match=what):
            load_data(dataclasses.replace(cfg, **changed), "train", root)
    with pytest.raises(BitflowError, match="cache-latents"):
        load_data(cfg, "test", root)


def test_versions_are_told_apart(cache, tmp_path):
    out = shutil.copytree(cache, tmp_path / "train")
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "version": 2}))
    with pytest.raises(BitflowError, match="version 2"):
        Latents(out)


# the image end


def mse(a, b):
    return (a - b).square().mean(dim=(1, 2, 3))


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
    whole = mse(decode(vae, a), decode(vae, b))
    assert torch.allclose(decoded(mse, vae, 6)(a, b), whole, atol=1e-6)
    assert torch.allclose(decoded(mse, vae, 100)(a, b), whole, atol=1e-6)
    turns = torch.stack([decoded(mse, vae, 2)(a.roll(i, 0), b.roll(i, 0)).mean() for i in range(6)])
    assert torch.allclose(turns.mean(), whole.mean(), rtol=1e-5)
    assert torch.equal(decoded(adaptive(mse), vae, 2)(a, b), decoded(adaptive(mse), vae, 2)(a, b))
    with pytest.raises(BitflowError, match="sub-batch of 0"):
        decoded(mse, vae, 0)


def test_units_of_the_two_decoders(toys, vae):
    small, x = load_decoder(toys / "small"), torch.randn(3, 4, 8, 8)
    assert torch.equal(decode(vae, x), vae.decode(x / vae.config.scaling_factor).sample)
    assert torch.equal(decode(small, x), small.decode(x).sample)
    for one in (vae, small):
        images = decode_all(one, 10 * x, batch_size=2)
        assert images.shape == (3, 3, 16, 16) and images.abs().max() <= 1
        assert not images.requires_grad
        assert torch.allclose(images, decode(one, 10 * x).clamp(-1, 1), atol=1e-5)


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
    assert torch.allclose(decode(shifted, x), shifted.decode(back).sample, atol=1e-5)


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

    monkeypatch.setattr(latents.importlib, "import_module", missing)
    with pytest.raises(BitflowError, match="pip install diffusers"):
        load_vae(toys / "vae")


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_tiny_autoencoders_have_unit_latents(tmp_path, factor):
    vae = load_vae(tiny_vae(tmp_path / "vae", factor))
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    pixels = torch.stack([square(as_jpeg(synthetic_picture(i)), 8 * factor) for i in range(40, 60)])
    x = moments(vae, pixels)[:, 0].float() * units(vae)[0]
    assert latent_shape(vae, 8 * factor) == (4, 8, 8) == tuple(x.shape[1:]) and 0.7 < x.std() < 1.4
    assert decode(load_decoder(tiny_decoder(tmp_path / "small", factor)), x).shape == pixels.shape


def test_the_objective_sees_decoded_images(tmp_path):
    """Where `objective.decoder` is set, perceptual distances compare decoded images."""
    from dataclasses import replace

    from bitflow_edu import pipeline
    from bitflow_edu.config import ObjectiveConfig

    a, b = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randn(3, 4, 8, 8)
    plain = ObjectiveConfig(feature_weight=1.0, adaptive_power=1.0)
    coloured = replace(plain, decoder=str(latents.tiny_vae(tmp_path / "vae")), decoded_images=3)
    seen = []

    def pixel(u, v):
        seen.append(u.shape)
        return mse(u, v)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(pipeline, "find_distance", lambda name, device: pixel)
        pipeline.image_distance(coloured)(a, b).mean().backward()
    assert set(seen) == {(3, 3, 16, 16)}
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0
