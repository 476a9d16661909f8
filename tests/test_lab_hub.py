"""Models for others: saving and loading, from a folder and from the Hub, and failures."""

import doctest
import json
import os
import re
import socket
from errno import ENOSPC
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from bitflow_edu import __version__
from bitflow_edu.excursions.glow import CouplingConfig, CouplingFlow
from bitflow_edu.io import models
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.models import build, load_model, save_model
from bitflow_edu.lab import hub
from bitflow_edu.lab.hub import Pair, from_pretrained, save_pretrained
from bitflow_edu.lab.sampling import grid_labels, noise_for
from bitflow_edu.reverse_model import ReverseModel, one_pass, sample_noise
from bitflow_edu.tarflow import TARFlow
from conftest import shake, small_flow, small_reverse


@pytest.fixture(scope="module")
def pair():
    flow = small_flow()
    return Pair(flow, small_reverse(flow))


def refuse_network(monkeypatch):
    """Let any attempt to reach another machine raise."""

    def refuse(*args, **kw):
        raise OSError("a test reached for the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def no_network(monkeypatch):
    """No other machine can be reached."""
    refuse_network(monkeypatch)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    if list(a) != list(b):
        return False
    return all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def contents(folder):
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_float32_comes_back_bit_for_bit_without_a_network(pair, tmp_path, no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "snapshot_download", None)
    folder = save_pretrained(pair, tmp_path / "new" / "pair")
    again = from_pretrained(str(folder), Pair)
    assert same(again.forward, pair.forward) and same(again.reverse, pair.reverse)
    assert again.forward.cfg == pair.forward.cfg and again.reverse.cfg == pair.reverse.cfg
    assert not again.forward.training and not again.reverse.training
    z, c = noise_for(pair.reverse.cfg, 3), grid_labels(pair.reverse.cfg, 3)
    assert torch.equal(one_pass(again.reverse, z, c), one_pass(pair.reverse, z, c))


def test_bfloat16_is_stored_and_float32_restored(pair, tmp_path):
    folder = save_pretrained(pair.reverse, tmp_path / "g", torch.bfloat16)
    stored = models.load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    again = from_pretrained(folder, ReverseModel)
    for a, b in zip(again.state_dict().values(), pair.reverse.state_dict().values()):
        assert a.dtype == torch.float32 and torch.equal(a, b.bfloat16().float())
    with pytest.raises(BitflowError, match="float16"):
        save_pretrained(pair, tmp_path / "half", torch.float16)


def test_one_format_with_load_model(pair, tmp_path):
    folder = save_pretrained(pair, tmp_path / "pair")
    assert same(load_model(folder / "forward", TARFlow), pair.forward)
    assert same(load_model(folder / "reverse", ReverseModel), pair.reverse)
    save_model(pair.forward, tmp_path / "old" / "forward")
    save_model(pair.reverse, tmp_path / "old" / "reverse")
    again = from_pretrained(tmp_path / "old", Pair)
    assert same(again.forward, pair.forward) and same(again.reverse, pair.reverse)
    assert same(from_pretrained(tmp_path / "old", TARFlow), pair.forward)
    assert same(from_pretrained(tmp_path / "old" / "reverse", ReverseModel), pair.reverse)


def test_runs_are_loaded_from_their_newest_checkpoint(pair, tmp_path):
    for step, model in ((1, small_flow(seed=9)), (2, pair.forward)):
        save_model(model, tmp_path / "run" / "forward" / "checkpoints" / f"step-{step:08d}")
    save_model(pair.reverse, tmp_path / "run" / "reverse" / "checkpoints" / "step-00000001")
    assert same(from_pretrained(tmp_path / "run", Pair).forward, pair.forward)


def test_a_coupling_flow_alone(tmp_path):
    flow = shake(build(CouplingFlow, CouplingConfig("nice", 4, levels=1, steps=2, width=8), 0))
    assert same(from_pretrained(save_pretrained(flow, tmp_path / "nice"), CouplingFlow), flow)


def test_a_pair_must_fit(pair):
    with pytest.raises(BitflowError, match="num_blocks is 2 but F's is 3"):
        Pair(pair.forward, small_reverse(small_flow(blocks=2)))


@pytest.mark.parametrize(
    "kind, seen",
    [
        (TARFlow, "holds a ReverseModel"),
        (Pair, "single model"),
        (torch.nn.Linear, "nothing to load"),
    ],
)
def test_the_wrong_class_is_refused(pair, tmp_path, kind, seen):
    with pytest.raises(BitflowError, match=seen):
        from_pretrained(save_pretrained(pair.reverse, tmp_path / "g"), kind)


def test_missing_folders_and_parts_are_named(pair, tmp_path, no_network):
    with pytest.raises(BitflowError, match="does not exist"):
        from_pretrained(tmp_path / "none", Pair)
    with pytest.raises(BitflowError, match="does not exist"):
        from_pretrained("./runs/none", Pair)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BitflowError, match="forward does not exist"):
        from_pretrained(tmp_path / "empty", Pair)
    save_pretrained(pair.forward, tmp_path / "half" / "forward")
    with pytest.raises(BitflowError, match="reverse does not exist"):
        from_pretrained(tmp_path / "half", Pair)
    with pytest.raises(BitflowError, match="has no revision main"):
        from_pretrained(tmp_path / "half", Pair, revision="main")


def test_a_damaged_file_is_refused(pair, tmp_path):
    folder = save_pretrained(pair, tmp_path / "pair")
    weights = folder / "reverse" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BitflowError, match="not an intact safetensors"):
        from_pretrained(folder, Pair)
    weights.unlink()
    with pytest.raises(BitflowError, match="is missing"):
        from_pretrained(folder, Pair)
    (folder / "forward" / "config.json").write_text('{"kind": "TARFlow"')
    with pytest.raises(BitflowError, match="damaged"):
        from_pretrained(folder, Pair)


def test_the_config_of_another_version_names_that_version(pair, tmp_path):
    path = save_pretrained(pair.forward, tmp_path / "f") / "config.json"
    config = json.loads(path.read_text())
    assert config["bitflow_edu"] == __version__
    config |= {"config": {**config["config"], "horizon": 3}, "bitflow_edu": "9.1.0"}
    path.write_text(json.dumps(config))
    note = rf"bitflow_edu 9\.1\.0 wrote it and this is {re.escape(__version__)}"
    with pytest.raises(BitflowError, match=f"unknown field 'horizon'.*{note}"):
        from_pretrained(tmp_path / "f", TARFlow)


def test_nothing_is_overwritten_silently(pair, tmp_path):
    folder = save_pretrained(pair, tmp_path / "m")
    before = contents(folder)
    with pytest.raises(BitflowError, match="overwrite=True"):
        save_pretrained(pair.reverse, folder)
    assert contents(folder) == before
    save_pretrained(pair.reverse, folder, overwrite=True)
    assert sorted(contents(folder)) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["m"]
    assert same(from_pretrained(folder, ReverseModel), pair.reverse)


def test_only_a_saved_model_is_ever_replaced(pair, tmp_path):
    work = save_pretrained(pair, tmp_path / "work")
    (work / "forward" / "training_state.safetensors").write_text("days of work")
    with pytest.raises(BitflowError, match="training_state"):
        save_pretrained(pair, work, overwrite=True)
    assert (work / "forward" / "training_state.safetensors").read_text() == "days of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(BitflowError, match="is a file"):
        save_pretrained(pair, tmp_path / "file", overwrite=True)
    with pytest.raises(BitflowError, match="Linear cannot be saved"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path / "linear")


def fails_at(monkeypatch, where, name, nth, error):
    """Let the nth call of a function raise."""
    real, calls = getattr(where, name), []

    def call(*args, **kw):
        calls.append(args)
        if len(calls) == nth:
            raise error
        return real(*args, **kw)

    monkeypatch.setattr(where, name, call)


FULL = OSError(ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "where, name, nth, error",
    [
        (models, "save_file", 2, FULL),
        (models, "save_file", 2, models.SafetensorError("I/O error: no space")),
        (models, "save_file", 2, KeyboardInterrupt()),
        (hub, "stamp", 2, FULL),
        (hub.os, "rename", 2, FULL),
        (hub, "fsync_path", 4, FULL),
    ],
)
def test_after_a_failure_everything_is_as_before(
    pair, tmp_path, monkeypatch, where, name, nth, error
):
    folder = save_pretrained(pair, tmp_path / "m")
    before = contents(tmp_path)
    fails_at(monkeypatch, where, name, nth, error)
    raised, said = BitflowError, r"cannot save to .*m \(.*[Nn]o space.*nothing was changed"
    if isinstance(error, KeyboardInterrupt):
        raised, said = KeyboardInterrupt, None
    with pytest.raises(raised, match=said):
        save_pretrained(Pair(small_flow(seed=5), pair.reverse), folder, overwrite=True)
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["m"]


def test_a_first_save_that_fails_leaves_nothing(pair, tmp_path, monkeypatch):
    fails_at(monkeypatch, models, "save_file", 2, FULL)
    with pytest.raises(BitflowError, match="No space left"):
        save_pretrained(pair, tmp_path / "m")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BitflowError, match="cannot save to"):
        save_pretrained(pair, tmp_path / "file" / "below")


@pytest.mark.parametrize("offline", [False, True])
def test_a_repository_that_cannot_be_reached(no_network, tmp_path, monkeypatch, offline):
    fetch = partial(hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    said = "cannot load nobody/nothing, which is not a folder here, from the Hub"
    with pytest.raises(BitflowError, match=rf"{said} \(LocalEntryNotFoundError"):
        from_pretrained("nobody/nothing", Pair)


@pytest.mark.parametrize("name", hub.pretrained_names())
def test_pairs_that_come_with_the_course(name):
    """F and G by name, with a card that was measured on models of that shape; small files."""
    F, G = hub.load_pretrained(name)
    assert isinstance(F, TARFlow) and isinstance(G, ReverseModel) and not F.training
    assert next(G.parameters()).dtype == torch.float32
    images = one_pass(G, sample_noise(G.cfg, 2), torch.tensor([0, 1]))
    assert images.shape == (2, G.cfg.channels, G.cfg.image_size, G.cfg.image_size)
    card = ModelCard.load(asset(name) / "README.md")
    assert {e.metric_type for e in card.data.eval_results} >= {"bits_per_dim", "reconstruction_mse"}
    sizes = [p.stat().st_size / 2**20 for p in asset(name).rglob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) <= (30 if "cifar" in name else 8)


def test_a_pair_that_does_not_come_with_the_course():
    """The names that there are, for one that is not."""
    said = "no pair named 'mnist-maxi' comes with this version; choose .*mnist-mini"
    with pytest.raises(BitflowError, match=said):
        hub.load_pretrained("mnist-maxi")


def test_the_example_in_the_docstring_runs():
    examples = doctest.DocTestFinder().find(hub.load_pretrained, globs=vars(hub).copy())
    failed, tried = doctest.DocTestRunner().run(examples[0])
    assert failed == 0 and tried >= 3


def test_the_example_in_the_readme_runs():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.S)[1], names)
    assert names["digits"].shape == (10, 1, 16, 16)
