"""The number of classes: from the data, unless given or known to a model that is there already."""

import json
import shutil

import numpy as np
import pytest
from commands import refused, run
from PIL import Image

from bitflow_edu.cli.common import preset_of
from bitflow_edu.cli.options import parse
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.shards import VERSION

SHAPES = "--preset image-folder-smoke"
PLACES = ("data", "forward", "reverse")


def folder_of(root, classes):
    """An image folder with two grey images of every class in each split."""
    for split in ("train", "test"):
        for k in range(classes):
            place = root / split / f"class{k}"
            place.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(np.full((32, 32, 3), 20 * k + i, np.uint8)).save(place / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture(scope="module")
def trained(three, tmp_path_factory):
    """F and G of a folder of three classes, after a step."""
    out = tmp_path_factory.mktemp("runs")
    run(f"train forward {SHAPES} --data-root {three} --steps 1 --batch-size 6 --out {out}/f")
    more = f"--forward {out}/f --out {out}/g"
    run(f"train reverse {SHAPES} --data-root {three} --steps 1 --batch-size 6 {more}")
    return out


def counts(line):
    """The number of classes in every place of the preset that a command works with."""
    preset = preset_of(parse(line.split()))
    return [getattr(preset, part).num_classes for part in PLACES if getattr(preset, part)]


def test_the_data_say_how_many(three, tmp_path):
    for command in ("train forward", "train reverse", "evaluate", "demo", "ablate depth", "info"):
        assert counts(f"{command} {SHAPES} --data-root {three}") == [3, 3, 3], command
    assert counts(f"train forward --preset imagenet64 --data-root {three}") == [3, 3, 3]
    twelve = folder_of(tmp_path / "twelve", 12)
    assert counts(f"train forward {SHAPES} --data-root {twelve}") == [12, 12, 12]
    assert counts(f"info {SHAPES}") == [10, 10, 10], "without data, the preset's"
    assert counts("train forward --preset mnist-glow-smoke") == [10, 10]


def test_latents_and_arrays_say_how_many(tmp_path):
    (tmp_path / "train").mkdir()
    index = {"version": VERSION, "shards": [], "shape": [4, 8, 8], "classes": list("abcde")}
    index["vae"] = {"scaling_factor": 1.0, "shift_factor": 0}
    (tmp_path / "train" / "index.json").write_text(json.dumps(index))
    latents = f"train forward --preset imagenet256-b2-smoke --data-root {tmp_path}"
    assert counts(latents) == [5, 5, 5]
    np.savez(tmp_path / "cifar10_jpeg.npz", classes=["cat", "dog"])
    assert counts(f"train forward --preset cifar10-smoke --data-root {tmp_path}") == [2, 2, 2]


def given(n):
    return " ".join(f"--{place}.num-classes {n}" for place in PLACES)


def test_a_contradiction_is_one_message_with_every_place(three, tmp_path, capsys):
    train = f"train forward {SHAPES} --data-root {three} --out {tmp_path}/f"
    for n in (2, 10):
        refused(f"{train} {given(n)}", capsys, "3 classes", f"num_classes {n}", given(3))
    named = [f"{place}.num_classes" for place in PLACES]
    refused(f"{train} --data.num-classes 3", capsys, *named)
    refused(f"train forward {given(12)} --out {tmp_path}/f", capsys, "10 classes", given(10))
    (tmp_path / "p.yaml").write_text("data: {num_classes: 4}\nforward: {num_classes: 4}\n")
    refused(f"{train} --config {tmp_path}/p.yaml", capsys, *named)
    (tmp_path / "p.yaml").write_text("".join(f"{p}: {{num_classes: 4}}\n" for p in PLACES))
    refused(f"{train} --config {tmp_path}/p.yaml", capsys, "num_classes 4", given(3))
    assert counts(f"{train} {given(3)}") == [3, 3, 3] and not (tmp_path / "f").exists()


def test_models_know_the_classes_of_their_data(trained, tmp_path, capsys):
    for name in "fg":
        config = next((trained / name).rglob("config.json"))
        assert json.loads(config.read_text())["config"]["num_classes"] == 3
        sample = f"sample --checkpoint {trained}/{name} --n 2 --out {tmp_path}/{name}.png --labels"
        refused(f"{sample} 7", capsys, "label 7", "0 to 2")
        run(f"{sample} 0,2")


def test_a_model_for_more_classes_than_the_data_still_works(trained, three, tmp_path):
    """Earlier versions gave it the preset's ten; it goes on, with a warning."""
    two = tmp_path / "two"
    for split in ("train", "test"):
        shutil.copytree(three / split, two / split)
        shutil.rmtree(two / split / "class2")
    pair = f"train reverse {SHAPES} --data-root {two} --forward {trained}/f"
    with pytest.warns(UserWarning, match="3 classes, but the data have 2"):
        assert counts(pair) == [3, 3, 3]
    again = f"train forward {SHAPES} --data-root {two} --resume --out {trained}/f"
    with pytest.warns(UserWarning, match="3 classes"):
        assert counts(again) == [3, 3, 3]
    with pytest.warns(UserWarning, match="3 classes"):
        assert counts(f"{again} {given(3)}") == [3, 3, 3], "as its preset.yaml says"


def test_more_classes_than_a_model_knows_are_refused(trained, tmp_path, capsys):
    four = folder_of(tmp_path / "four", 4)
    pair = f"train reverse {SHAPES} --data-root {four} --forward {trained}/f --out {tmp_path}/g"
    refused(pair, capsys, "num_classes 3", "has 4")


def test_missing_data_are_reported_where_they_are_loaded(tmp_path, capsys):
    refused(f"train forward {SHAPES} --out {tmp_path}/f", capsys, "image-folder", "--data-root")
    with pytest.raises(BitflowError, match="no/such/folder"):
        counts(f"train forward {SHAPES} --data-root no/such/folder")
