"""The cache of latents: resumed, shared, refused for other settings, few images left out."""

import dataclasses
import errno
import json
import resource
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="latents need diffusers")
from latent_toys import CFG, contents, make_cache, shard

from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.locks import run_lock
from bitflow_edu.io.processes import SingleProcess
from bitflow_edu.io.shards import Latents, sha256_of
from bitflow_edu.scale import latents
from bitflow_edu.scale.autoencoder import load_vae, tiny_vae
from bitflow_edu.scale.image_sources import FolderSource, TarSource, center_crop, synthetic_tar
from bitflow_edu.scale.latents import CacheConfig, cache_latents, latents_report


@pytest.fixture(scope="module")
def cache(toys, vae, tmp_path_factory):
    return make_cache(toys, vae, tmp_path_factory.mktemp("cache") / "train")


class Two(SingleProcess):
    """One of two processes, played by threads, with what `Distributed` has of them."""

    size = 2

    def __init__(self, rank, meet, said):
        self.rank, self.main, self.meet, self.said = rank, rank == 0, meet, said

    def barrier(self):
        self.meet.wait(60)

    def on_rank_zero(self, fn):
        value = fn() if self.main else None
        self.barrier()
        return value

    def broadcast(self, value):
        if self.main:
            self.said["value"] = value
        self.barrier()
        return self.said["value"]


def on_two(call):
    """`call(processes)` by two processes at once; what each gave."""
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


def test_moments_are_the_encoders(toys, vae, cache):
    """What is stored is what diffusers says of the same square, mirror image included."""
    data = Latents(cache)
    raw = next(iter(FolderSource(str(toys / "pictures"), per_shard=8).open(cache).read(0)))
    pixels = center_crop(raw.data, 16)[None]
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


def test_a_folder_is_filled_by_one_command_at_a_time(source, vae, tmp_path):
    with run_lock(tmp_path), pytest.raises(BitflowError, match="in use"):
        cache_latents(source, tmp_path, vae, CFG)
    assert not list(tmp_path.iterdir())


def test_two_processes_write_what_one_does(source, vae, cache, tmp_path, monkeypatch):
    encode, calls = latents.encode_piece, []

    def counted(*args):
        calls.append(1)
        return encode(*args)

    monkeypatch.setattr(latents, "encode_piece", counted)
    found = on_two(lambda processes: cache_latents(source, tmp_path / "train", vae, CFG, processes))
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
    with pytest.raises(BitflowError, match="1 may be"):
        cache_latents(source, tmp_path / "strict", vae, one)
    with pytest.raises(BitflowError, match="1 may be"):
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
    with pytest.raises(BitflowError, match="1 may be"):
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
    found = on_two(lambda processes: cache_latents(source, tmp_path / "out", vae, one, processes))
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
        for done, i in enumerate(latents.prefetch(items(), slowly, pool, 5)):
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


def tars_of(tmp_path, pieces):
    """Shards of the numbered pictures, and their pattern."""
    for k, numbers in enumerate(pieces):
        (tmp_path / f"t-{k}.tar").write_bytes(synthetic_tar(numbers))
    return f"{tmp_path}/t-{{0..{len(pieces) - 1}}}.tar"


def test_labels_say_how_many_classes_a_tar_has(vae, tmp_path):
    index = cache_latents(TarSource(tars_of(tmp_path, [(0, 2), (1, 3)])), tmp_path / "o", vae, CFG)
    assert index["classes"] == ["0", "1"] and index["total"] == 4
    given = cache_latents(TarSource(f"{tmp_path}/t-0.tar", 5), tmp_path / "five", vae, CFG)
    assert given["classes"] == list("01234")


def test_a_cache_begun_with_the_old_default_goes_on(vae, tmp_path):
    """Earlier versions wrote 1000 classes into the settings where nobody gave a number."""
    out, pattern = tmp_path / "out", tars_of(tmp_path, [(0, 2), (1, 3)])
    first = cache_latents(TarSource(pattern), out, vae, CFG)
    settings = json.loads((out / "settings.json").read_text())
    settings["source"]["num_classes"] = 1000
    (out / "settings.json").write_text(json.dumps(settings))
    assert cache_latents(TarSource(pattern), out, vae, CFG)["shards"] == first["shards"]
    with pytest.raises(BitflowError, match="source.num_classes = 1000, not 5"):
        cache_latents(TarSource(pattern, 5), out, vae, CFG)


def test_what_was_left_out_is_in_the_index_and_the_report(vae, toys, tmp_path):
    pattern = tars_of(tmp_path, [(0, 1), (2, 3)])
    with tarfile.open(tmp_path / "t-1.tar", "a") as tar:
        for name in ("x.json", "y.txt", "._z.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    index = cache_latents(TarSource(pattern), tmp_path / "out", vae, CFG)
    assert index["left_out"] == {"samples without an image": 2, "hidden": 1}
    assert "2 samples without an image" in latents_report(index)
    again = cache_latents(TarSource(pattern), tmp_path / "out", vae, CFG)
    assert again == index, "counted once, also when it is all there already"
    shutil.copytree(toys / "pictures", tmp_path / "p")
    (next((tmp_path / "p").rglob("*.JPEG")).parent / "notes.txt").write_text("")
    index = cache_latents(FolderSource(str(tmp_path / "p")), tmp_path / "folder", vae, CFG)
    assert index["left_out"] == {"ending in .txt": 1} and ".txt" in latents_report(index)


def test_no_image_at_all_is_an_error(vae, tmp_path):
    (tmp_path / "t-0.tar").write_bytes(synthetic_tar([]))
    with pytest.raises(BitflowError, match="no image was encoded"):
        cache_latents(TarSource(f"{tmp_path}/t-0.tar"), tmp_path / "out", vae, CFG)
    assert not (tmp_path / "out" / "index.json").exists()
    for k in range(2):
        place = tmp_path / "p" / "train" / "a"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{k}.png").write_bytes(b"no image")
    with pytest.raises(BitflowError, match="no image was encoded: 2 cannot be decoded"):
        cache_latents(FolderSource(str(tmp_path / "p")), tmp_path / "none", vae, CFG)


def test_no_other_program_decodes_an_image(vae, toys, tmp_path):
    """EPS under another name is what Ghostscript would be started for."""
    shutil.copytree(toys / "pictures", tmp_path / "p")
    spoilt = next((tmp_path / "p").rglob("*.JPEG"))
    Image.new("RGB", (20, 20)).save(spoilt, "EPS")
    index = cache_latents(FolderSource(str(tmp_path / "p")), tmp_path / "out", vae, CFG)
    assert len(index["corrupt"]) == 1 and spoilt.name in index["corrupt"][0]


NOTES = [b"", b"[]", b"null", b'{"name": "00000.safetensors"}', b'{"corrupt": 5}']


@pytest.mark.parametrize("text", NOTES)
def test_a_shard_with_a_damaged_note_is_made_again(source, vae, cache, tmp_path, text):
    out = shutil.copytree(cache, tmp_path / "train")
    (out / "shards" / "00000.json").write_bytes(text)
    cache_latents(source, out, vae, CFG)
    assert contents(out) == contents(cache)


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"source": 5}'])
def test_damaged_settings_are_named(source, vae, cache, tmp_path, text):
    out = shutil.copytree(cache, tmp_path / "train")
    (out / "settings.json").write_text(text)
    with pytest.raises(BitflowError, match=r"settings\.json"):
        cache_latents(source, out, vae, CFG)


def test_a_shard_of_another_tar_is_made_again(toys, vae, tmp_path):
    """A pattern with * names more tars than at the first start, and one of them in between."""
    for name in ("t-0", "t-2"):
        (tmp_path / f"{name}.tar").write_bytes(synthetic_tar(range(int(name[-1]), 9), 20))
    source = TarSource(str(tmp_path / "t-*.tar"))
    cache_latents(source, tmp_path / "out", vae, CFG)
    (tmp_path / "t-1.tar").write_bytes(synthetic_tar(range(1, 9), 20))
    index = cache_latents(source, tmp_path / "out", vae, CFG)
    fresh = cache_latents(source, tmp_path / "fresh", vae, CFG)
    sums = [[s["sha256"] for s in one["shards"]] for one in (index, fresh)]
    assert sums[0] == sums[1] and len(set(sums[0])) == 3
