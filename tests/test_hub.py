"""Checkpoints for others: saving, loading, model cards, the Hub (a stand-in), and failures."""

import json
import os
import re
import socket
from errno import ENOSPC
from functools import partial

import pytest
import torch
from conftest import shake, small_flow, small_reverse
from huggingface_hub import ModelCard

import bitflow_edu.training as training
from bitflow_edu import __version__, hub
from bitflow_edu.coupling import CouplingConfig, CouplingFlow
from bitflow_edu.data import BitflowError, asset
from bitflow_edu.exact_inverse import exact_inverse
from bitflow_edu.hub import (
    DataSource,
    Pair,
    from_pretrained,
    model_card,
    push_to_hub,
    save_pretrained,
)
from bitflow_edu.pipeline import build, grid_labels, noise_for
from bitflow_edu.reverse_model import ReverseModel, one_pass, sample_noise
from bitflow_edu.tarflow import TARFlow
from bitflow_edu.training import load_model, save_model


@pytest.fixture(scope="module")
def pair():
    flow = small_flow()
    return Pair(flow, small_reverse(flow))


@pytest.fixture(scope="module")
def result():
    results = asset("mnist-mini").parent.parent / "results"
    return json.loads((results / "demo-mnist-mini.json").read_text())


@pytest.fixture(scope="module")
def shipped():
    return from_pretrained(asset("mnist-mini"), Pair)


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach another machine raises."""

    def refuse(*args, **kw):
        raise OSError("a test reached for the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


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
    stored = training.load_file(folder / "model.safetensors")
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
    with pytest.raises(BitflowError, match="no intact safetensors"):
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
        (training, "save_file", 2, FULL),
        (training, "save_file", 2, training.SafetensorError("I/O error: no space")),
        (training, "save_file", 2, KeyboardInterrupt()),
        (hub, "stamp", 2, FULL),
        (hub.os, "rename", 2, FULL),
        (hub, "to_disk", 4, FULL),
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
    fails_at(monkeypatch, training, "save_file", 2, FULL)
    with pytest.raises(BitflowError, match="No space left"):
        save_pretrained(pair, tmp_path / "m")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BitflowError, match="cannot save to"):
        save_pretrained(pair, tmp_path / "file" / "below")


QUALITIES = (
    "fd[mnist-cnn] label_accuracy bits_per_dim round_trip_max_error reconstruction_mse".split()
)


def test_the_card_holds_what_was_measured(result, shipped):
    card = model_card(result, shipped)
    read = ModelCard(str(card))
    assert read.data.to_dict() == card.data.to_dict()
    assert read.data.license == "apache-2.0" and read.data.datasets == ["ylecun/mnist"]
    said, args = set(), {}
    for e in read.data.eval_results:
        said.add((e.metric_type, e.metric_name.split(", ")[1], e.metric_value))
        args[e.metric_type, e.metric_value] = e.metric_args
    wanted = set()
    for m in result["measurements"]:
        if m["row"] in hub.METHODS and m["metric"] in QUALITIES:
            wanted.add((m["metric"], hub.METHODS[m["row"]], m["value"]))
    assert said == wanted and len(wanted) == 9
    assert args["label_accuracy", 0.9580000042915344] == {"n": 2000, "seed": 0}
    for seen in (
        result["commit"],
        result["command"],
        result["hardware"]["cpu"],
        result["versions"]["torch"],
        "CC BY-SA 3.0",
        "steps 2500",
        "σ = 0.1",
        "| label_accuracy |  | 0.923 | 0.929 | 0.958 | 0.9995 | n 2000, seed 0 |",
        "| ms_per_image | ms | 16.45 (16.1 to 16.78) | 26.64 (25.64 to 28.28) "
        "| 3.072 (3.042 to 3.151) | – | n 15, batch 1 |",
    ):
        assert seen in read.text, seen


def test_the_card_of_a_part_speaks_of_that_part(result, shipped):
    card = model_card(result, shipped.reverse)
    methods = {e.metric_name.split(", ")[1] for e in card.data.eval_results}
    assert methods == {"one pass of G"}
    assert card.data.tags == ["normalizing-flow", "biflow", "safetensors"]
    assert "**F**" not in card.text and "exact inverse |" not in card.text


@pytest.mark.parametrize(
    "part, draws",
    [
        (lambda p: p, lambda p, z, c: one_pass(p.reverse, z, c)),
        (lambda p: p.reverse, one_pass),
        (lambda p: p.forward, exact_inverse),
    ],
)
def test_the_example_in_the_card_runs(
    result, shipped, tmp_path, monkeypatch, no_network, part, draws
):
    model = part(shipped)
    folder = save_pretrained(model, tmp_path / "m", card=model_card(result, model))
    monkeypatch.chdir(folder)
    names, text = {}, ModelCard.load(folder / "README.md").text
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    cfg = (model.reverse if isinstance(model, Pair) else model).cfg
    assert torch.equal(names["images"], draws(model, noise_for(cfg, 10), grid_labels(cfg, 10)))


def test_a_card_from_other_results_is_refused(result, shipped, pair):
    said = r"demo-mnist-mini was measured with forward\.image_size = 16, but this TARFlow has 6"
    with pytest.raises(BitflowError, match=said):
        model_card(result, pair)
    with pytest.raises(BitflowError, match="measured with reverse = None"):
        model_card({**result, "config": {"forward": result["config"]["forward"]}}, shipped)
    for key in ("commit", "hardware", "measurements"):
        with pytest.raises(BitflowError, match=f"needs {key}"):
            model_card({k: v for k, v in result.items() if k != key}, shipped)
    of_g = [m for m in result["measurements"] if m["row"] == "one-pass"]
    with pytest.raises(BitflowError, match="nothing on exact or exact"):
        model_card({**result, "measurements": of_g}, shipped.forward)
    with pytest.raises(BitflowError, match="'Apache 2' is no identifier"):
        model_card(result, shipped, licence="Apache 2")


def test_what_is_not_finite_stands_in_the_table_alone(result, shipped):
    lines = [dict(m) for m in result["measurements"]]
    for m in lines:
        if m["metric"] == "bits_per_dim":
            m["value"] = float("nan")
    card = model_card({**result, "measurements": lines}, shipped)
    assert "bits_per_dim" not in {e.metric_type for e in card.data.eval_results}
    assert "| bits_per_dim | bits | nan |" in card.text


def test_images_that_are_not_listed(result, shipped):
    other = {**result, "config": {**result["config"], "data": {"name": "image-folder"}}}
    card = model_card(other, shipped)
    assert card.data.datasets is None and "image-folder" in card.text
    named = model_card(other, shipped, trained_on=DataSource("my cats", "CC0", "me/cats"))
    assert named.data.datasets == ["me/cats"]
    assert "my cats, 16×16 pixels, 1 channel; licence: CC0" in named.text


class FakeHub:
    """Records what `HfApi` would be asked; refuses a repository that exists unless allowed."""

    def __init__(self, exists=False, broken=None):
        self.exists, self.broken = exists, broken
        self.created = self.files = self.options = None

    def __call__(self):
        return self

    def create_repo(self, repo_id, private, exist_ok):
        if self.exists and not exist_ok:
            raise RuntimeError("409 Conflict: You already created this model repo")
        self.created = repo_id, private

    def upload_folder(self, *, repo_id, folder_path, **options):
        if self.broken:
            raise self.broken
        self.files, self.options = contents(folder_path), options
        return type("Commit", (), {"commit_url": f"https://hub.example/{repo_id}/commit/1"})()


def test_push_uploads_what_from_pretrained_reads(
    result, shipped, tmp_path, monkeypatch, no_network
):
    fake, card = FakeHub(), model_card(result, shipped, "me/digits")
    monkeypatch.setattr(hub, "HfApi", fake)
    url = push_to_hub(shipped, "me/digits", card, torch.bfloat16)
    assert url == "https://hub.example/me/digits/commit/1" and fake.created == ("me/digits", True)
    assert sorted(fake.files) == [
        "README.md",
        "forward/config.json",
        "forward/model.safetensors",
        "reverse/config.json",
        "reverse/model.safetensors",
    ]
    assert 'from_pretrained("me/digits", Pair)' in fake.files["README.md"].decode()
    assert set(fake.files) <= set(fake.options["delete_patterns"])

    def fetch(repo_id, revision, allow_patterns):
        assert (repo_id, revision) == ("me/digits", "main")
        for name, data in fake.files.items():
            if name in allow_patterns:
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_bytes(data)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert same(from_pretrained("me/digits", ReverseModel, revision="main"), shipped.reverse)
    assert sorted(os.listdir(tmp_path)) == ["reverse"]  # F was not fetched
    assert same(from_pretrained("me/digits", Pair, revision="main").forward, shipped.forward)


def test_push_refuses_and_explains(result, shipped, monkeypatch):
    card = model_card(result, shipped, "me/digits")
    broken, said = ConnectionError("no way"), r"to me/digits \(ConnectionError: no way\)"
    for fake, seen in ((FakeHub(True), "overwrite=True"), (FakeHub(False, broken), said)):
        monkeypatch.setattr(hub, "HfApi", fake)
        with pytest.raises(BitflowError, match=seen):
            push_to_hub(shipped, "me/digits", card)
        assert fake.files is None
    fake = FakeHub(exists=True)
    monkeypatch.setattr(hub, "HfApi", fake)
    push_to_hub(shipped, "me/digits", card, overwrite=True, private=False)
    assert fake.created == ("me/digits", False) and fake.files
    for name in ("digits", "me/digits/more", "a b/c"):
        with pytest.raises(BitflowError, match="no repository's name"):
            push_to_hub(shipped, name, card)
    with pytest.raises(BitflowError, match="does not load me/other"):
        push_to_hub(shipped, "me/other", card)
    with pytest.raises(BitflowError, match="does not load me/digits as a ReverseModel"):
        push_to_hub(shipped.reverse, "me/digits", card)


@pytest.mark.parametrize("offline", [False, True])
def test_a_repository_that_cannot_be_reached(no_network, tmp_path, monkeypatch, offline):
    fetch = partial(hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    said = "cannot load nobody/nothing, which is no folder here, from the Hub"
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
    card = hub.ModelCard.load(asset(name) / "README.md")
    assert {e.metric_type for e in card.data.eval_results} >= {"bits_per_dim", "reconstruction_mse"}
    sizes = [p.stat().st_size / 2**20 for p in asset(name).rglob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) <= (30 if "cifar" in name else 8)


def test_a_pair_that_does_not_come_with_the_course():
    """The names that there are, for one that is not."""
    said = "no pair named 'mnist-maxi' comes with this version; choose .*mnist-mini"
    with pytest.raises(BitflowError, match=said):
        hub.load_pretrained("mnist-maxi")
