"""Ablation tables: what is trained, what is kept, and what is said about the order."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bitflow_edu.cli import lab, options
from bitflow_edu.cli.main import main
from bitflow_edu.data import Images
from bitflow_edu.evaluation import (
    accuracy,
    as_stored,
    frechet_distance,
    in_batches,
    load_classifier,
    precision_recall,
)
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.results import measurement
from bitflow_edu.lab import ablations
from bitflow_edu.lab.ablations import (
    TABLES,
    RealImages,
    Row,
    Training,
    jobs_of,
    judged,
    main_metric,
    table_measurements,
    training_of,
    verdict,
)
from bitflow_edu.lab.evaluate import network_for, sampler_source, stream_config
from bitflow_edu.lab.hub import load_pretrained
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.lab.sampling import SAMPLERS, WITHOUT_REVERSE, draw_all, noise_for
from bitflow_edu.scale.fid import reference_in_memory
from bitflow_edu.scale.fingerprints import note_images
from bitflow_edu.scale.streaming import dataset_source

SMOKE = find_preset("mnist-mini-smoke")


def test_every_row_of_every_table_is_a_preset():
    for name, table in TABLES.items():
        rows = table()
        assert len({row.name for row in rows}) == len(rows) > 1, name
        for preset in (row.preset(SMOKE) for row in rows):
            assert preset.reverse.num_blocks == preset.forward.num_blocks


def test_what_several_tables_share_is_trained_once():
    separate = sum(len(jobs_of([name], SMOKE, range(2))) for name in TABLES)
    together = jobs_of(list(TABLES), SMOKE, range(2))
    assert len(together) < separate
    keys = {t.key for t in together}
    assert all(t.forward.key in keys for t in together)  # no G without its F
    # the preset's F, the clipped one, and those of two other regimes
    assert len({t.forward.key for t in together}) == 4


def test_a_training_is_known_by_what_it_depends_on():
    one = Training(SMOKE, 0)
    assert one.key == Training(replace(SMOKE, name="other", num_samples=7), 0).key
    changed = [
        Training(SMOKE, 1),
        Training(ablations.forward(clip=1.0)(SMOKE)),
        Training(ablations.MSE(SMOKE)),
        Training(SMOKE, 0, "forward"),
    ]
    assert len({t.key for t in (one, *changed)}) == 5
    assert training_of(Row("exact", method="exact"), SMOKE, 3).stage == "forward"


def table_of(*rows):
    """Means of (value, spread, paper)."""
    found = []
    for i, (value, spread, paper) in enumerate(rows):
        more = dict(spread=spread, paper=paper)
        found.append(measurement(f"row {i}", "mean fd[mnist-cnn]", value, **more))
    return found


@pytest.mark.parametrize(
    "rows,word",
    [
        ([(1, 0.1, 10), (2, 0.1, 20)], "same order"),
        ([(2, 0.1, 10), (1, 0.1, 20)], "other order"),
        ([(1, 0.5, 10), (1.3, 0.5, 20)], "within the noise"),
        ([(1, 0.1, None), (2, 0.1, 3)], "the paper has no figures"),
        (
            [(1, 0.1, 10), (2, 0.1, 20), (1, 0.1, 30)],
            "other order (row 0 before row 1: same order; row 1 before row 2: other order)",
        ),
    ],
)
def test_verdict(rows, word):
    assert verdict(table_of(*rows)).startswith(word)


def test_a_table_by_one_command_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = "ablate denoising --preset mnist-mini-smoke --seeds 2 --steps 4 --workers 1".split()
    words += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert main(words) == 0
    file = tmp_path / "ablate-denoising-mnist-mini-smoke-4-steps.json"
    result = json.loads(file.read_text())
    assert result["command"].startswith("bitflow ablate denoising --preset mnist-mini-smoke")
    assert result["config"]["verdict"]
    fd = [m for m in result["measurements"] if m["metric"] == "fd[mnist-cnn]"]
    expected = [(row.name, seed) for row in TABLES["denoising"]() for seed in (0, 1)]
    assert [(m["row"], m["seed"]) for m in fd] == expected
    assert (tmp_path / "ablate-denoising-mnist-mini-smoke-4-steps.png").stat().st_size > 1000
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
    preset = lab.ablation_preset(options.parse(words))
    jobs = jobs_of(["denoising"], preset, range(2))
    assert all((tmp_path / "runs" / t.key / "images.json").exists() for t in jobs)
    files = {t.key: tmp_path / "runs" / t.key / "figures.json" for t, ways in jobs.items() if ways}
    figures = {key: json.loads(file.read_text()) for key, file in files.items()}
    assert table_measurements("denoising", preset, range(2), figures) == result["measurements"]


@pytest.mark.parametrize(
    "words,say",
    [
        (["strategiez"], "no ablation is named 'strategiez'"),
        (["denoising", "--preset", "mnist-minix"], "did you mean mnist-mini"),
        (["denoising", "--preset", "mnist-glow"], "flow alone"),
        (["denoising", "--seeds", "0"], "--seeds 0"),
        (["denoising", "--steps", "0"], "--steps 0"),
        (["denoising", "--steps", "-4"], "--steps -4"),
        (["denoising", "--workers", "0"], "--workers 0"),
        (["denoising", "--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_words(words, say, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *words]) == 2
    assert say in capsys.readouterr().err


def test_every_row_names_a_sampler():
    for row in (row for table in TABLES.values() for row in table()):
        assert row.method in SAMPLERS
        assert row.stage == ("forward" if row.method in WITHOUT_REVERSE else "reverse")


def test_photographs_are_compared_through_other_networks(digits):
    """Colour by EfficientNet-Lite0."""
    pytest.importorskip("efficientnet_lite_pytorch")
    colour = Images(digits.pixels[:20].expand(-1, 3, -1, -1), digits.labels[:20], ("cat", "dog"))
    network, cfg = network_for(colour, 3), stream_config(10)
    real = reference_in_memory(colour[:10], network, cfg, "10 images")
    source = dataset_source(colour, torch.arange(10, 20))
    found = judged(source, 10, 0, RealImages(network, real, real))
    assert found["fd[effnet-lite0]"] > 0 and "label_accuracy" not in found
    assert {"precision", "recall", "fd_train[effnet-lite0]"} <= found.keys()
    assert main_metric([{"metric": "params"}, {"metric": "fd[effnet-lite0]"}]) == "fd[effnet-lite0]"


def test_a_row_is_judged_by_the_functions_of_lesson_06(digits):
    """One sampler of the shipped pair, in batches that are no whole hundreds."""
    F, G = load_pretrained("mnist-mini")
    sampler, n = SAMPLERS["one-pass"](F, G, 0.0), 130
    network, noise = network_for(digits, 1), noise_for(G.cfg, n, seed=3)
    cfg = stream_config(300)
    real = [reference_in_memory(part, network, cfg, "") for part in (digits[:300], digits[300:500])]
    source = sampler_source(sampler, noise=noise, labelled=True)
    found = judged(source, n, 3, RealImages(network, *real))
    drawn = draw_all([sampler], n, seed=3)["one-pass"]
    seen, test, train = (
        in_batches(network.features, as_stored(x), 100)
        for x in (drawn, digits[:300].x, digits[300:500].x)
    )
    precision, recall = precision_recall(test, seen)
    assert found == {
        "fd[mnist-cnn]": frechet_distance(seen, test),
        "fd_train[mnist-cnn]": frechet_distance(seen, train),
        "label_accuracy": accuracy(load_classifier(), drawn, torch.arange(n) % 10),
        "precision": precision,
        "recall": recall,
    }


def test_what_is_measured_already_is_not_measured_again(tmp_path, monkeypatch):
    """Stored numbers are found by method and guidance scale."""
    training = Training(SMOKE, 0, "forward")
    folder = tmp_path / training.key
    folder.mkdir()
    about = {"num_samples": 100, "train": "ab", "test": "cd", "weights": "ef", "forward": "ef"}
    stored = {"exact@0": {"params": 1}, "exact+denoise@0.5": {"params": 2}, "training": {}}
    stored |= {"made_from": about}
    file = folder / "figures.json"
    monkeypatch.setattr(ablations, "run_training", lambda *args: None)
    monkeypatch.setattr(ablations, "made_from", lambda *args: dict(about))
    monkeypatch.setattr(ablations, "measure", lambda *args: {"params": 3, "fd": math.nan})
    monkeypatch.setattr(ablations, "anatomy", lambda *args: {"state_rms_0": 1.0})
    monkeypatch.setitem(SAMPLERS, "exact", lambda *args: None)
    monkeypatch.setitem(SAMPLERS, "exact+denoise", lambda *args: None)
    ways = [("exact", 0.0), ("exact+denoise", 0.5)]

    def measured(text):
        file.write_text(text)
        return ablations.measure_training(training, ways, tmp_path, "cpu")

    assert measured(json.dumps(stored)) == stored
    new = {"exact@0": {"params": 3}, "exact+denoise@0.5": {"params": 3}}
    new |= {"training": {"state_rms_0": 1.0}, "made_from": about}
    earlier = {name: found for name, found in stored.items() if name != "made_from"}
    others = [stored | {"made_from": about | {name: "other"}} for name in about]
    for text in map(json.dumps, [earlier, *others, {**stored, "exact@0": 1}, [], None]):
        assert measured(text) == new
    assert measured(json.dumps(stored)[:50]) == new == json.loads(file.read_text())


def test_trainings_on_other_images_are_not_taken_for_these(tmp_path):
    """The folder of a training notes its images; what notes none is not trusted."""
    note_images(tmp_path / "run", "ab")
    note_images(tmp_path / "run", "ab")
    with pytest.raises(BitflowError, match="other images.*ab, not cd"):
        note_images(tmp_path / "run", "cd")
    (tmp_path / "old" / "run").mkdir(parents=True)
    with pytest.raises(BitflowError, match="old was made by an earlier version"):
        note_images(tmp_path / "old", "ab")
    for text in ("[]", "null", "{", "3"):
        (tmp_path / "run" / "images.json").write_text(text)
        with pytest.raises(BitflowError, match="images.json|earlier version"):
            note_images(tmp_path / "run", "ab")


def test_broken_samples_of_one_seed_are_none_of_the_others():
    row = Row("one", w=0.5)
    figures, numbers = {}, [{"params": 1, "broken_samples": 0.25}, {"params": 1}]
    for seed, found in enumerate(numbers):
        figures[training_of(row, SMOKE, seed).key] = {"one-pass@0.5": found, "training": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "made-up", lambda: [row])
        lines = table_measurements("made-up", SMOKE, range(2), figures)
    broken = [m["value"] for m in lines if m["metric"].endswith("broken_samples")]
    assert broken == [0.25, 0.0, 0.125]
