"""What several commands share: presets put together, classes counted, options, files to write."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import refused, run
from PIL import Image

from bitflow_edu.cli.common import (
    LEAST,
    check_numbers,
    check_paths,
    new_outputs,
    new_picture,
    preset_of,
    refuse_unread,
    show,
)
from bitflow_edu.cli.options import (
    NAMES,
    Ablate,
    Bench,
    Budget,
    Evaluate,
    Sample,
    TrainForward,
    parse,
)
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.results import measurement
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
    mse = "--objective.features --objective.feature-weights"  # LPIPS is an optional package
    run(f"train reverse {SHAPES} --data-root {three} --steps 1 --batch-size 6 {more} {mse}")
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


REQUIRED = {"checkpoint": Path("c"), "source": "s", "out": Path("o"), "run": Path("r")}
OPTIONS = [(kind, f) for kind in NAMES for f in dataclasses.fields(kind)]
COUNTS = [(kind, f.name) for kind, f in OPTIONS if f.name in LEAST]
SEEDED = [kind for kind, f in OPTIONS if f.name == "seed"]
PATHS = [(kind, f.name) for kind, f in OPTIONS if "Path" in str(f.type)]


def command(kind, **options):
    """A command with what it requires, and these options."""
    missing = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    return kind(**{name: REQUIRED[name] for name in missing} | options)


def flag(name):
    return f"--{name.replace('_', '-')}"


@pytest.mark.parametrize("kind, name", COUNTS)
def test_a_count_below_its_least_value_is_refused_by_its_option(kind, name):
    for value in (LEAST[name] - 1, -7):
        with pytest.raises(BitflowError, match=f"{flag(name)} {value}"):
            check_numbers(command(kind, **{name: value}))
    check_numbers(command(kind, **{name: 5}))


def test_every_whole_number_that_can_be_typed_has_a_least_value():
    assert {f.name for _, f in OPTIONS if "int" in str(f.type)} == {*LEAST, "seed"}


@pytest.mark.parametrize("kind", SEEDED)
def test_seeds_that_overflow_are_refused(kind):
    trains = issubclass(kind, (Budget, Ablate))
    for seed in (-1, 2**63, 10**30, *([2**53] if trains else [])):
        with pytest.raises(BitflowError, match=f"--seed {seed}"):
            check_numbers(command(kind, seed=seed))
    for seed in (0, 2**43 - 1):
        check_numbers(command(kind, seed=seed))


@pytest.mark.parametrize(
    "kind, options",
    [
        (TrainForward, {"lr": float("nan")}),
        (TrainForward, {"minutes": float("inf")}),
        (Sample, {"temperature": -1.0}),
        (Sample, {"w": float("nan")}),
        (Bench, {"w": (0.0, -1.0)}),
        (Evaluate, {"n": 1}),
    ],
)
def test_other_numbers_out_of_range(kind, options):
    ((name, _),) = options.items()
    with pytest.raises(BitflowError, match=flag(name)):
        check_numbers(command(kind, **options))


@pytest.mark.parametrize("kind, name", PATHS)
def test_a_path_that_no_system_takes_is_refused_by_its_option(kind, name, tmp_path):
    for path in (tmp_path / ("a" * 300), tmp_path / ("a" * 250), Path("nul\0")):
        with pytest.raises(BitflowError, match=flag(name)):
            check_paths(command(kind, **{name: path}))
    check_paths(command(kind, **{name: tmp_path / "a"}))


def test_an_option_that_is_not_read_is_named_as_it_was_typed():
    args = Bench(segments="3", compiled=True)
    for name, typed in (("segments", "--segments 3"), ("compiled", "--compiled")):
        with pytest.raises(BitflowError, match=f"{typed} is not read here"):
            refuse_unread(args, [name], "here")
    refuse_unread(args, ["what", "batches"], "here")


@pytest.mark.parametrize("given", ["mine", "mine.json", "mine.JSON"])
def test_all_files_of_a_command_are_known_and_none_is_overwritten(tmp_path, given):
    files = [tmp_path / "mine.json", tmp_path / "mine.png"]
    assert new_outputs(tmp_path / given, ".json", ".png") == files
    for path in files:
        path.write_text("kept")
        with pytest.raises(BitflowError, match=rf"{path}.*--there"):
            new_outputs(tmp_path / given, ".json", ".png", option="--there")
        assert new_outputs(tmp_path / given, ".json", ".png", anew=True) == files
        path.unlink()


def test_outputs_that_are_no_files(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, Path(""), Path(".."), tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(BitflowError):
            new_outputs(out, ".json")
    assert new_outputs(tmp_path / "v1.2", ".json") == [tmp_path / "v1.2.json"]


def test_pictures_get_an_ending_and_keep_one_that_can_be_written(tmp_path):
    assert new_picture(tmp_path / "digits") == tmp_path / "digits.png"
    for name in ("a.png", "a.JPG", "a.webp"):
        path = new_picture(tmp_path / name)
        Image.new("RGB", (4, 4)).save(path)
        assert path == tmp_path / name
    for name in ("a.xyz", "a.json", "a.xbm"):
        with pytest.raises(BitflowError, match=f"--out .*{name}"):
            new_picture(tmp_path / name)


SIZES = "--data.image-size {0} --forward.image-size {0} --reverse.image-size {0}"


def preset_from(words):
    return preset_of(parse(words.split()))


def test_changes_that_only_fit_together_are_checked_together(tmp_path):
    train = "train forward --preset mnist-mini-smoke"
    preset = preset_from(f"{train} --patch-size 5 {SIZES.format(15)}")
    assert preset.forward.num_tokens == preset.reverse.num_tokens == 9
    preset = preset_from(f"{train} --batch-size 6 --train-forward.num-microbatches 3")
    assert (preset.train_forward.batch_size, preset.train_forward.num_microbatches) == (6, 3)
    depths = "--objective.depth-weights 1 2 --strategy naive --train-reverse.steps 7"
    preset = preset_from(f"train reverse --preset mnist-mini-smoke {depths}")
    assert preset.objective.strategy == "naive" and preset.train_reverse.steps == 7
    (tmp_path / "p.yaml").write_text("data: {image_size: 15}\nforward: {image_size: 15}\n")
    preset = preset_from(f"{train} --config {tmp_path}/p.yaml --patch-size 3 {SIZES.format(15)}")
    assert preset.forward.num_tokens == 25
    preset = preset_from("demo --preset mnist-mini-smoke --minutes 2 --seed 4")
    for cfg in (preset.train_forward, preset.train_reverse):
        assert (cfg.steps, cfg.minutes, cfg.seed) == (None, 2, 4)


@pytest.mark.parametrize(
    "words, named",
    [
        ("--patch-size 5", "patch size 5"),
        ("--patch-size 5 --forward.patch-size 4", "--patch-size 5 and --forward.patch-size 4"),
        ("--steps 3 --train-forward.minutes 4", "--steps 3 and --train-forward.minutes 4"),
        ("--steps 3 --minutes 4", "--steps 3 and --minutes 4"),
        ("--name ../../x", "../../x"),
        (SIZES.format(15), "15"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_seen(words, named):
    with pytest.raises(BitflowError) as e:
        preset_from(f"train forward --preset mnist-mini-smoke {words}")
    assert named in str(e.value)


def test_measurements_are_shown_in_columns(capsys):
    show(
        [measurement("a-long-name-of-a-row", "m", 2.5, "ms", batch=4), measurement("b", "m", None)]
    )
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["a-long-name-of-a-row", "m", "2.5", "ms", "batch", "4"]
    assert first.index(" m ") == second.index(" m ")
