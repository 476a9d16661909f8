"""Model cards made from measurements, and the Hub (a stand-in) that takes a model with its card."""

import importlib
import os
import re

import pytest
import torch
from huggingface_hub import ModelCard

from bitflow_edu.exact_inverse import exact_inverse
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.results import load_result
from bitflow_edu.lab import hub
from bitflow_edu.lab import model_card as cards
from bitflow_edu.lab.hub import Pair, from_pretrained, save_pretrained
from bitflow_edu.lab.model_card import DataSource, model_card, push_to_hub
from bitflow_edu.lab.sampling import METHODS, grid_labels, noise_for
from bitflow_edu.reverse_model import ReverseModel, one_pass
from conftest import small_flow, small_reverse
from test_lab_hub import contents, refuse_network, same

RESULTS = asset("mnist-mini").parent.parent / "results"


@pytest.fixture(scope="module")
def pair():
    flow = small_flow()
    return Pair(flow, small_reverse(flow))


@pytest.fixture(scope="module")
def result():
    return load_result("demo-mnist-mini", RESULTS)


@pytest.fixture(scope="module")
def shipped():
    return from_pretrained(asset("mnist-mini"), Pair)


@pytest.fixture
def no_network(monkeypatch):
    """No other machine can be reached."""
    refuse_network(monkeypatch)


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
        if m["row"] in METHODS and m["metric"] in QUALITIES:
            wanted.add((m["metric"], METHODS[m["row"]], m["value"]))
    assert said == wanted and len(wanted) == 9
    assert args["label_accuracy", 0.958] == {"n": 2000, "seed": 0}
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


@pytest.mark.parametrize(
    "name, run",
    [("mnist-mini", "demo-mnist-mini"), ("mnist", "mnist-full"), ("cifar10-mini", "cifar10-main")],
)
def test_shipped_cards_are_what_the_code_writes(name, run):
    """And they say what tells their two squared errors apart."""
    folder = asset(name)
    written = model_card(load_result(run, RESULTS), from_pretrained(folder, Pair))
    there = ModelCard.load(folder / "README.md")
    assert there.text == written.text and cards.ERRORS in there.text
    assert there.data.to_dict() == written.data.to_dict()


def test_the_card_explains_squared_errors_where_it_has_them(result, shipped):
    others = [m for m in result["measurements"] if not m["metric"].endswith("_mse")]
    assert cards.ERRORS not in model_card({**result, "measurements": others}, shipped).text
    renamed = [{**m, "metric": "inverse_mse"} for m in others[:1]]
    assert cards.ERRORS in model_card({**result, "measurements": renamed}, shipped).text


def test_the_card_of_the_guided_pair_has_what_training_images_chose():
    """A column for each scale above 0, on the same line as the others; all trainings of G."""
    text = ModelCard.load(asset("mnist") / "README.md").text
    for seen in (
        "| exact inverse + score denoising, w = 0.1 | real images (the floor) |",
        "| train_steps |  | 9,600 | – | 5,800, of them 4,000 before the last training |",
        "G: steps 1800",
        "before that steps 4000",
        "by squared error.",
    ):
        assert seen in text, seen
    (line,) = [line for line in text.split("\n") if line.startswith("| kid[mnist-cnn]")]
    assert "–" not in line and line.count("±") == 6 and "chosen_w" not in text


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
    with pytest.raises(BitflowError, match="'Apache 2' is not an identifier"):
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
    monkeypatch.setattr(cards, "HfApi", fake)
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
        monkeypatch.setattr(cards, "HfApi", fake)
        with pytest.raises(BitflowError, match=seen):
            push_to_hub(shipped, "me/digits", card)
        assert fake.files is None
    fake = FakeHub(exists=True)
    monkeypatch.setattr(cards, "HfApi", fake)
    push_to_hub(shipped, "me/digits", card, overwrite=True, private=False)
    assert fake.created == ("me/digits", False) and fake.files
    for name in ("digits", "me/digits/more", "a b/c"):
        with pytest.raises(BitflowError, match="not a repository's name"):
            push_to_hub(shipped, name, card)
    with pytest.raises(BitflowError, match="does not load me/other"):
        push_to_hub(shipped, "me/other", card)
    with pytest.raises(BitflowError, match="does not load me/digits as a ReverseModel"):
        push_to_hub(shipped.reverse, "me/digits", card)


@pytest.mark.parametrize("kind", cards.CLASS_HOMES)
def test_the_example_imports_a_class_from_where_it_is(kind):
    home = importlib.import_module(f"bitflow_edu.{cards.CLASS_HOMES[kind]}")
    assert getattr(home, kind.__name__) is kind
