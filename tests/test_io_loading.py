"""Batches that were read ahead are those that the dataset gives, to the bit."""

import threading
from dataclasses import replace

import pytest
import torch

from bitflow_edu import training
from bitflow_edu.data import Images, load_data, to_model_range
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.loading import ReadAhead, fed, taken_ahead
from bitflow_edu.io.models import newest_checkpoint
from bitflow_edu.io.processes import SingleProcess
from bitflow_edu.io.shards import Latents
from bitflow_edu.tarflow import TARFlow, TARFlowConfig, forward_loss
from bitflow_edu.training import TrainConfig, new_state, train, training_batch
from bitflow_edu.transformer import TransformerConfig
from conftest import small_flow
from test_io_shards import cache  # noqa: F401

CPU = torch.device("cpu")
CFG = TrainConfig(steps=9, batch_size=8, num_microbatches=4, precision="fp32", log_every=1)


class Some(SingleProcess):
    """One of two processes: every second microbatch."""

    rank, size = 1, 2


def as_before(data, cfg, step, microbatch):
    """A batch as it was drawn before anything was read ahead: this is what must not change."""
    size = cfg.batch_size // cfg.num_microbatches
    per_epoch = max(len(data) // cfg.batch_size, 1)
    epoch, i = divmod(step, per_epoch)
    seed = cfg.seed * 7919 + epoch
    order = data.epoch_order and data.epoch_order(cfg.seed, epoch)
    if order is None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    index = order[i * cfg.batch_size :][microbatch * size : (microbatch + 1) * size]
    g = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step + microbatch * 2_147_483_647)
    c = torch.where(torch.rand(size, generator=g) < cfg.label_dropout, -1, data.labels[index])
    if isinstance(data, Images):
        return to_model_range(data.pixels[index]), c, torch.rand(3, generator=g)
    mirrored = torch.randint(2, (size,), generator=g)
    mean, std = data.moments(index, mirrored).float().unbind(1)
    vae, noise = data.index["vae"], torch.randn(mean.shape, generator=g)
    x = (mean + std * noise - vae["shift_factor"]) * vae["scaling_factor"]
    return x, c, torch.rand(3, generator=g)


def kinds(folder):
    return {"images": load_data(DataConfig("mnist-mini", 6))[:30], "latents": Latents(folder)}


@pytest.mark.parametrize("kind", ["images", "latents"])
@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("processes", [SingleProcess(), Some()])
def test_the_same_batches_and_the_same_noise(cache, kind, first, processes):  # noqa: F811
    """Over several epochs, from the start or resumed, alone or as one of two."""
    data = kinds(cache)[kind]
    state = new_state(small_flow(), CFG, processes=processes)
    state.step = first
    with fed(data, CPU, training.upcoming(data, state, CFG)) as near:
        for step in range(first, first + 8):
            for k in processes.share(CFG.num_microbatches):
                x, c, g = training_batch(near, CFG, step, "cpu", k)
                expected = as_before(data, CFG, step, k)
                found = x, c, torch.rand(3, generator=g)
                assert all(torch.equal(a, b) for a, b in zip(expected, found)), (step, k)
        assert isinstance(near, ReadAhead) == (kind == "latents")
    assert not any(t.name.startswith("read-ahead") for t in threading.enumerate())


def test_images_too_large_for_the_device_are_read_ahead(monkeypatch):
    """Of another device than the CPU; pixels of wider integers become 8-bit ones there."""
    meta, pixels = torch.device("meta"), torch.full((5, 1, 2, 2), 255)
    images = Images(pixels, torch.arange(5), tuple("abcde"))
    with fed(images, meta, ()) as near:
        assert near.pixels.device == meta and near.pixels.dtype == torch.uint8
        assert near.draw(torch.tensor([1, 1])).device == meta
    monkeypatch.setattr("bitflow_edu.io.loading.RESIDENT", 19)
    index = torch.tensor([3, 0])
    with fed(images, meta, [lambda: index]) as near:
        assert isinstance(near, ReadAhead) and len(near) == 5 and near.labels.device == meta
        assert near.draw(index, None).shape == (2, 1, 2, 2)


def test_others_than_foreseen_are_refused_and_errors_arrive(cache):  # noqa: F811
    data, index = Latents(cache), torch.tensor([2, 1])

    def damaged():
        raise BitflowError("shard 7 is damaged")

    with fed(data, CPU, [lambda: index, damaged]) as near:
        with pytest.raises(BitflowError, match=r"image \[0\].*\[2\] was read"):
            near.draw(torch.tensor([0, 1]), torch.Generator())
        with pytest.raises(BitflowError, match="shard 7"):
            near.draw(index, torch.Generator())


class Plain:
    """A dataset of one's own: no more than what `Dataset` asks for."""

    def __init__(self, data):
        self.data, self.labels, self.epoch_order = data, data.labels, data.epoch_order

    def __len__(self):
        return len(self.data)

    def draw(self, indices, generator=None):
        return self.data.draw(indices, generator)


def test_a_run_on_latents_resumes_bit_for_bit(cache, tmp_path):  # noqa: F811
    """Whole, in two parts, and by `draw` alone: the same weights."""
    data, cfg = Latents(cache), replace(CFG, checkpoint_every=8)
    shape = TransformerConfig(width=8, num_layers=1, head_dim=8)
    flow = TARFlowConfig(image_size=8, channels=4, num_classes=2, num_blocks=2, transformer=shape)

    def fresh():
        torch.manual_seed(0)
        return TARFlow(flow)

    def stops(model, *batch):
        calls.append(1)
        if len(calls) == 6 * CFG.num_microbatches:
            raise KeyboardInterrupt
        return forward_loss(model, *batch)

    calls, run = [], tmp_path / "parts"
    whole = train(fresh(), forward_loss, data, cfg, tmp_path / "whole")
    plain = train(fresh(), forward_loss, Plain(data), cfg, tmp_path / "plain")
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), stops, data, cfg, run)
    assert newest_checkpoint(run).name == "step-00000004"
    parts = train(fresh(), forward_loss, data, cfg, run, resume=True)
    for other in (plain, parts):
        assert all(map(torch.equal, whole.parameters(), other.parameters()))


def test_a_slow_source_is_asked_early_and_its_errors_come_in_their_place():
    taken, four = [], threading.Event()

    def source():
        for i in range(6):
            taken.append(i)
            if i == 4:
                four.set()
            if i == 5:
                raise BitflowError("the archive ends")
            yield i

    items = taken_ahead(source(), depth=4)
    assert next(items) == 0 and four.wait(10)  # taken while nobody asked for it
    assert [next(items) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(BitflowError, match="the archive ends"):
        next(items)
    assert list(taken_ahead(range(100), depth=3)) == list(range(100))
    early = taken_ahead(iter(range(10**9)), depth=3)
    assert next(early) == 0
    early.close()  # whoever has had enough waits for nothing


def test_a_dataset_of_ones_own_may_have_pixels():
    """It is asked for `draw` and `labels`, not to go to a device."""

    class Own:
        pixels = torch.zeros(3, 1, 2, 2)

    own = Own()
    with fed(own, CPU, []) as data:
        assert data is own
