"""Shared pieces of the tests: small models with random, not only initial, weights."""

import os

os.environ.setdefault("MPLBACKEND", "agg")
import pytest
import torch
from commands import GLOW, SMOKE, run
from streams import Tiny

from bitflow_edu.data import load_data
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.models import build
from bitflow_edu.reverse_model import ReverseConfig, ReverseModel
from bitflow_edu.scale.alarms import sample_reference_of, watch_labels
from bitflow_edu.scale.autoencoder import load_vae
from bitflow_edu.scale.feature_networks import own_network
from bitflow_edu.tarflow import TARFlow, TARFlowConfig
from bitflow_edu.transformer import MODERN, TransformerConfig


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run what takes minutes, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow alone")


def pytest_collection_modifyitems(config, items):
    """Slow tests wait for --slow."""
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def shake(model, seed=0, size=0.2):
    """Random weights everywhere: zero-initialised projections would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(size * noise / max(p.shape[-1], 1) ** 0.5)
    return model.eval()


def small_transformer(modern=False, layers=1):
    """A few features a token; rotary positions in two dimensions need head_dim a multiple of 4."""
    return TransformerConfig(width=16, num_layers=layers, head_dim=8, **(MODERN if modern else {}))


def small_flow(
    side=3,
    patch=2,
    channels=1,
    blocks=3,
    modern=False,
    seed=0,
    dtype=torch.float32,
    num_classes=3,
    **more,
):
    """A shaken TARFlow over side² tokens; `more`: of its config."""
    cfg = TARFlowConfig(
        image_size=side * patch,
        channels=channels,
        patch_size=patch,
        num_classes=num_classes,
        num_blocks=blocks,
        transformer=small_transformer(modern),
        **more,
    )
    return shake(build(TARFlow, cfg, seed).to(dtype), seed)


def small_reverse(flow, modern=True, seed=1, **kw):
    """A shaken G that fits the flow."""
    f = flow.cfg
    shape = (f.image_size, f.channels, f.patch_size, f.num_classes, f.num_blocks)
    cfg = ReverseConfig(*shape, transformer=small_transformer(modern), **kw)
    return shake(build(ReverseModel, cfg, seed), seed)


@pytest.fixture(scope="session")
def digits():
    """The embedded test images at the preset's size."""
    return load_data(DataConfig("mnist-mini", 16), "test")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """F and G of the smoke preset, trained by the commands."""
    folder = tmp_path_factory.mktemp("runs")
    run(f"train forward {SMOKE} --steps 10 --out {folder}/f")
    run(f"train reverse {SMOKE} --steps 10 --forward {folder}/f --out {folder}/g")
    return folder


@pytest.fixture(scope="session")
def glow(tmp_path_factory):
    """A coupling flow, trained for its likelihood and gone on with."""
    folder = tmp_path_factory.mktemp("glow") / "glow"
    run(f"train forward {GLOW} --steps 4 --out {folder}")
    run(f"train forward {GLOW} --steps 4 --out {folder} --resume")
    return folder


@pytest.fixture(scope="module")
def tiny():
    """A network of fixed random features."""
    return own_network(Tiny(), "tiny")


@pytest.fixture(scope="module")
def train_digits():
    """The embedded training images."""
    return load_data(DataConfig(), "train")


@pytest.fixture(scope="module")
def normal(train_digits):
    """What samples of digits are compared with while a training is watched."""
    return sample_reference_of(train_digits, watch_labels(train_digits.labels), patch_size=4)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder of toy pictures and autoencoders."""
    from latent_toys import make_toys  # needs diffusers

    return make_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def vae(toys):
    """The toy autoencoder."""
    return load_vae(toys / "vae")


@pytest.fixture
def source(toys):
    """The toy pictures."""
    from latent_toys import pictures_of

    return pictures_of(toys)
