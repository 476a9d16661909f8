"""Every table in small, on the smoke twin of the preset that it is made for."""

from dataclasses import replace

import pytest
import torch

from bitflow_edu import distances
from bitflow_edu.data import Images
from bitflow_edu.lab import ablations
from bitflow_edu.lab.ablations import (
    REAL,
    jobs_of,
    main_metric,
    measure_training,
    table_measurements,
)
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.lab.tables import TABLES, rows_for
from bitflow_edu.scale.feature_networks import FeatureNetwork

PACKAGES = {"stlpips": "stlpips_pytorch", "digits": "torch"}  # distance → what brings its weights


def in_small(name):
    """The smoke twin, two steps of four images for each model, a dozen samples."""
    p = find_preset(f"{name}-smoke")
    F, G = (replace(t, steps=2, batch_size=4) for t in (p.train_forward, p.train_reverse))
    return replace(p, train_forward=F, train_reverse=G, num_samples=12)


def random_images(cfg):
    """Of the preset's shape, as many as a small table needs."""
    pixels = torch.randint(256, (64, cfg.channels, cfg.image_size, cfg.image_size))
    classes = tuple(map(str, range(cfg.num_classes)))
    return Images(pixels.byte(), torch.arange(64) % cfg.num_classes, classes, name=cfg.name)


def with_small_networks(monkeypatch):
    """In place of all networks for photographs, which are large, or downloaded."""
    for name in distances.DISTANCES.keys() - {"digits"}:
        monkeypatch.setitem(distances.DISTANCES, name, distances.untrained_crop)
    pixels = FeatureNetwork("effnet-lite0", lambda x: (x.flatten(1)[:, ::200], None))
    monkeypatch.setattr(ablations, "network_for", lambda test, channels: pixels)


@pytest.mark.parametrize(
    "table, name",
    [
        *((table, "mnist-mini") for table in TABLES),
        *((table, "mnist") for table in TABLES),
        *((table, "cifar10") for table in TABLES),
        *((table, "cifar10-mini") for table in TABLES),
    ],
)
def test_every_table_runs_on_its_own_preset(table, name, tmp_path, monkeypatch):
    preset = in_small(name)
    small = name == "cifar10" or (
        name == "cifar10-mini" and table not in ("denoising", "distances")
    )
    if small:
        with_small_networks(monkeypatch)
    for row in rows_for(table, preset) if not small else ():
        for distance in row.preset(preset).objective.features:
            pytest.importorskip(PACKAGES[distance.split("-")[0]])
    if name == "cifar10-mini" and not small:
        pytest.importorskip("efficientnet_lite_pytorch")
    images = random_images(preset.data)
    monkeypatch.setattr(ablations, "images_of", lambda cfg, split: images)
    monkeypatch.setattr(ablations, "fingerprint_of", lambda cfg, split: split)
    ablations.real_images.cache_clear()
    figures = {}
    for training, ways in jobs_of(table, preset, range(1)).items():
        figures[training.key] = measure_training(training, sorted(ways), tmp_path, "cpu")
    found = table_measurements(table, preset, range(1), figures)
    ablations.real_images.cache_clear()
    metric = main_metric(found)
    measured = {m["row"] for m in found if m["metric"] == metric and not m.get("sweep")}
    assert measured == {REAL, *(row.name for row in rows_for(table, preset))}
