"""Ablation tables: what is trained, what is kept, and what is said about the order."""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scipy.stats
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
from bitflow_edu.io.results import load_result, measurement, results_text, save_results
from bitflow_edu.lab import ablations
from bitflow_edu.lab.ablations import (
    MEASURED,
    REAL,
    RealImages,
    ahead,
    difference,
    difference_lines,
    inverse_gap,
    jobs_of,
    judged,
    lines_of,
    main_metric,
    table_measurements,
    verdict,
)
from bitflow_edu.lab.evaluate import choose_scale, network_for, sampler_source, stream_config
from bitflow_edu.lab.experiments import EXPERIMENTS
from bitflow_edu.lab.hub import load_pretrained
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.lab.reproduce import index_entry, section_of
from bitflow_edu.lab.sampling import SAMPLERS, draw_all, noise_for
from bitflow_edu.lab.tables import EXACT, TABLES, Row, Training, training_of
from bitflow_edu.scale.fid import reference_in_memory
from bitflow_edu.scale.fingerprints import note_images
from bitflow_edu.scale.streaming import dataset_source
from bitflow_edu.training import fast_bf16

SMOKE = find_preset("mnist-mini-smoke")


def table_of(*rows):
    """A table of (values of the seeds, the paper's figure)."""
    found = []
    for i, (values, paper) in enumerate(rows):
        by_seed = {"fd[mnist-cnn]": dict(enumerate(values))}
        found += lines_of(f"row {i}", by_seed, 100, paper=paper)
    return found


@pytest.mark.parametrize(
    "rows,word",
    [
        ([((1, 2, 3), 10), ((1.1, 2.12, 3.1), 20)], "row 0 before row 1: same order, +0.107"),
        ([((1.1, 2.12, 3.1), 10), ((1, 2, 3), 20)], "row 0 before row 1: other order, -0.107"),
        ([((1, 2, 3), 10), ((2, 2, 2.5), 20)], "row 0 before row 1: undecided"),
        ([((1,), 10), ((2,), 20)], "row 0 before row 1: undecided, +1"),
        ([((1, 2), None), ((2, 3), 3)], "no order of these rows was published"),
    ],
)
def test_verdict(rows, word):
    """Large differences between seeds do not count, where rows differ alike with every seed."""
    assert verdict(table_of(*rows)).startswith(word)


def test_differences_are_taken_seed_by_seed():
    found = table_of(((1.0, 5.0, 9.0), None), ((1.5, 5.4, 9.6), None))
    d = difference(found, "row 1", "row 0", "fd[mnist-cnn]")
    by_scipy = scipy.stats.ttest_rel([1.5, 5.4, 9.6], [1.0, 5.0, 9.0]).confidence_interval(0.95)
    assert (d.mean, d.n) == (pytest.approx(0.5), 3)
    assert (d.low, d.high) == pytest.approx(tuple(by_scipy))
    (line,) = difference_lines(found, "row 1", "row 0", 100)
    assert (line["value"], line["low"], line["versus"]) == (d.mean, d.low, "row 0")
    assert difference(found, "row 1", "another", "fd[mnist-cnn]") is None


@pytest.mark.parametrize(
    "metric,second,says",
    [
        ("fd[mnist-cnn]", (1.1, 2.12, 3.1), "“row 0” is ahead of “row 1” by 0.107 [0.078"),
        ("fd[mnist-cnn]", (0.9, 1.88, 2.9), "“row 1” is ahead of “row 0” by 0.107 [0.078"),
        ("label_accuracy", (1.1, 2.12, 3.1), "“row 1” is ahead of “row 0” by 0.107 [0.078"),
        ("inverse_mse", (2.0, 2.0, 2.5), "“row 0” and “row 1”: undecided, -0.167 [-"),
        ("inverse_mse", (2.0,), "“row 0” and “row 1”: undecided, -1"),
    ],
)
def test_who_is_ahead(metric, second, says):
    found = []
    for i, values in enumerate(((1, 2, 3), second)):
        found += lines_of(f"row {i}", {metric: dict(enumerate(values))}, 100)
    assert ahead({"name": "t", "measurements": found}, "row 0", "row 1", metric).startswith(says)
    with pytest.raises(BitflowError, match="share no seed of precision"):
        ahead({"name": "t", "measurements": found}, "row 0", "row 1", "precision")


def test_the_gap_is_a_ratio_seed_by_seed():
    """Rows of another table may be compared with its exact row: the same seeds, the same F."""
    exact = {"name": "a", "measurements": lines_of(EXACT, {"inverse_mse": {0: 0.1, 1: 0.2}}, 100)}
    rows = {"inverse_mse": {0: 0.4, 1: 0.8, 2: 5.0}}
    table = {"name": "b", "measurements": lines_of("row", rows, 100)}
    gap = inverse_gap(table, "row", exact)
    assert tuple(gap) == pytest.approx((4, 4, 4, 2))
    table["measurements"] = lines_of("row", {"inverse_mse": {0: 0.2, 1: 0.8}}, 100)
    gap = inverse_gap(table, "row", exact)
    assert gap.mean == pytest.approx(8**0.5) and gap.low < 2 < 4 < gap.high
    with pytest.raises(BitflowError, match="shares no seed"):
        inverse_gap(exact, "row")


def test_a_scale_is_chosen_without_test_images(monkeypatch):
    """Whatever test images say, the choice and what is handed to it stay as they are."""
    row, seen = Row("guided", method="guided", scales=(0.0, 0.5, 1.0)), []
    rows = [row, Row("plain")]
    monkeypatch.setitem(TABLES, "made-up", lambda preset: rows)

    def choose(fd_train):
        seen.append(fd_train)
        return choose_scale(fd_train)

    monkeypatch.setattr(ablations, "choose_scale", choose)
    by_train, reported = {0.0: 3.0, 0.5: 1.0, 1.0: 2.0}, []
    for by_test in (by_train, {0.0: 1.0, 0.5: 9.0, 1.0: 5.0}):
        found = {"training": {}}
        for w in row.scales:
            numbers = {"fd[mnist-cnn]": by_test[w], "fd_train[mnist-cnn]": by_train[w]}
            found[f"guided@{w:g}"] = found[f"one-pass@{w:g}"] = numbers
        figures = {training_of(row, SMOKE, 0).key: found}
        figures[Training(SMOKE, 0, "forward").key] = {"real@0": {}}
        monkeypatch.setattr(ablations, "rows_for", lambda name, preset, only: TABLES[name](preset))
        lines = table_measurements("made-up", SMOKE, range(1), figures)
        (fd,) = [m for m in lines if (m["row"], m["metric"]) == ("guided", "fd[mnist-cnn]")]
        reported.append((fd["w"], fd["value"]))
        assert len([m for m in lines if m.get("sweep") and m["metric"] == "fd[mnist-cnn]"]) == 3
    assert reported == [(0.5, 1.0), (0.5, 9.0)]
    assert seen == [by_train, by_train]


def test_what_rows_share_is_trained_once_for_a_seed():
    """Seed i is one F for all rows; no G without its F."""
    jobs = jobs_of("strategies", SMOKE, range(2))
    stages = [t.stage for t in jobs]
    assert (stages.count("forward"), stages.count("reverse")) == (2, 12)
    keys = {t.key for t in jobs}
    assert all(t.forward.key in keys for t in jobs)
    assert {t.seeded.train_forward.seed for t in jobs} == {0, 1}
    one = Training(SMOKE, 1)
    assert one.forward.seeded.train_forward.seed == one.seeded.train_reverse.seed == 1


def test_a_table_by_one_command_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = "ablate denoising --preset mnist-mini-smoke --seeds 2 --steps 4 --workers 1".split()
    words += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert main(words) == 0
    file = tmp_path / "ablate-denoising-mnist-mini-smoke-4-steps.json"
    result = load_result(file.stem, file.parent)
    assert result["command"].startswith("bitflow ablate denoising --preset mnist-mini-smoke")
    assert result["config"]["verdict"]
    fd = [m for m in result["measurements"] if m["metric"] == "fd[mnist-cnn]"]
    names = [REAL, *(row.name for row in TABLES["denoising"](SMOKE))]
    assert [(m["row"], m["seed"]) for m in fd] == [(name, i) for name in names for i in (0, 1)]
    pairs = [m for m in result["measurements"] if m["metric"] == "difference fd[mnist-cnn]"]
    assert [(m["row"], m["versus"]) for m in pairs] == [(name, names[1]) for name in names[2:]]
    assert all(m["low"] < m["value"] < m["high"] for m in pairs)
    assert (tmp_path / "ablate-denoising-mnist-mini-smoke-4-steps.png").stat().st_size > 1000
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
    preset = lab.ablation_preset(options.parse(words))
    jobs = jobs_of("denoising", preset, range(2))
    assert all((tmp_path / "runs" / t.key / "images.json").exists() for t in jobs)
    files = {t.key: tmp_path / "runs" / t.key / "figures.json" for t, ways in jobs.items() if ways}
    figures = {key: json.loads(file.read_text()) for key, file in files.items()}
    again = table_measurements("denoising", preset, range(2), figures)
    (tmp_path / "again.json").write_text(results_text({"name": ""}, again))
    assert load_result("again", tmp_path)["measurements"] == result["measurements"]


def test_seeds_are_taken_over_from_a_results_file(tmp_path, monkeypatch, capsys):
    """Their trainings are elsewhere: nothing is trained for them, and each number stays."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = "ablate denoising --preset mnist-mini-smoke --steps 4 --workers 1 --results".split()
    base += [str(tmp_path), "--resume", "--out"]
    file = tmp_path / "ablate-denoising-mnist-mini-smoke-4-steps.json"
    assert main([*base, str(tmp_path / "there"), "--seeds", "1"]) == 0
    first = load_result(file.stem, file.parent)
    first["commit"], first["hardware"]["cpu"] = "abc", "another"
    file.write_text(json.dumps(first))
    capsys.readouterr()
    assert main([*base, str(tmp_path / "here"), "--seeds", "2"]) == 0
    assert "seeds 0 are taken over" in capsys.readouterr().out
    assert {f.name.split("-")[1] for f in (tmp_path / "here").iterdir()} == {"1"}
    both = load_result(file.stem, file.parent)

    def of_seed(result, seed):
        lines = [m for m in result["measurements"] if m["seed"] == seed]
        return {(m["row"], m["metric"]): m["value"] for m in lines}

    assert of_seed(both, 0) == of_seed(first, 0) and of_seed(both, 1)
    (earlier,) = both["config"]["taken_over"]
    assert (earlier["seeds"], earlier["commit"]) == ([0], "abc")
    how = section_of(both, index_entry(both, tmp_path))
    assert f"Seeds 0: {earlier['hardware']['cores']} cores, another; commit abc" in how
    # where seed 0 is measured, seed 1 is not
    assert main([*base, str(tmp_path / "there"), "--seeds", "2"]) == 0
    third = load_result(file.stem, file.parent)
    assert [one["seeds"] for one in third["config"]["taken_over"]] == [[1]]
    assert [of_seed(third, seed) for seed in (0, 1)] == [of_seed(both, seed) for seed in (0, 1)]
    # where nothing is trained, the file is only written anew
    third["commit"] = "def"
    third["config"].pop("seeds_forward")
    third["config"]["train_forward"]["precision"] = "bf16"  # what `auto` meant
    file.write_text(json.dumps(third))
    assert main([*base, str(tmp_path / "nowhere"), "--seeds", "2"]) == 0
    last = load_result(file.stem, file.parent)
    assert not (tmp_path / "nowhere").exists() and last["config"]["seeds_forward"] == [0, 1]
    assert all(last[k] == third[k] for k in ("commit", "date", "wall_s", "hardware", "versions"))
    assert last["config"]["taken_over"] == third["config"]["taken_over"]
    assert of_seed(last, 0) == of_seed(third, 0)
    # numbers of another way of measuring are not mixed in
    assert last["config"]["measured"] == MEASURED
    last["config"]["measured"] = MEASURED - 1
    file.write_text(json.dumps(last))
    assert main([*base, str(tmp_path / "nowhere"), "--seeds", "2"]) == 2
    assert "seeds 0, 1 of the results file were measured in another way" in capsys.readouterr().err


def test_the_tables_measure_the_inverse_in_one_way():
    """One noise on the test images for all seeds: where F is the same, so is the error of its way
    back. The one table that was measured otherwise says so, in its file and on the page."""
    score, values = "exact + score denoising", {}
    rows = {"strategies-mnist-mini-500-steps": score, "strategies-mnist-mini": score}
    rows |= {"guidance-mnist-mini": f"{score}, w = 0", "recipes-mnist-mini": score}
    rows |= {"forward-guidance-mnist-mini": "linear, w = 0"}
    for name, row in rows.items():
        lines = load_result(f"ablate-{name}")["measurements"]
        values[name] = [
            m["value"] for m in lines if (m["row"], m["metric"]) == (row, "inverse_mse")
        ]
    five = values["strategies-mnist-mini"]
    assert len(five) == 5 and all(found == five[: len(found)] for found in values.values())
    otherwise = []
    for file in Path("results").glob("ablate-*.json"):
        found = load_result(file.stem)
        if "noise of its own here" in section_of(found, index_entry(found, file.parent)):
            otherwise.append(file.stem)
    assert otherwise == ["ablate-tokens-mnist-mini-700-steps"]


@pytest.mark.parametrize(
    "more,say",
    [
        (["--seeds", "1"], "holds seeds 1, which would be lost; ask for them with --seeds"),
        (["--seeds", "2", "--train-forward.steps", "3"], "was made with train_forward.steps"),
    ],
)
def test_a_results_file_is_not_lost_to_fewer_seeds_or_another_preset(tmp_path, capsys, more, say):
    words = "ablate denoising --preset mnist-mini-smoke --steps 4 --resume".split()
    words += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    preset = lab.ablation_preset(options.parse(words))
    found = [measurement("no denoising", "fd", 1.0, seed=seed) for seed in (0, 1)]
    stem = "ablate-denoising-mnist-mini-smoke-4-steps"
    save_results(tmp_path, stem, preset.name, "", dataclasses.asdict(preset), found, 1.0)
    before = (tmp_path / f"{stem}.json").read_bytes()
    assert main([*words, *more]) == 2 and say in capsys.readouterr().err
    assert (tmp_path / f"{stem}.json").read_bytes() == before


def test_a_results_file_grows_whatever_is_logged_and_saved_how_often(tmp_path):
    """No weight depends on it, so an older default is not refused; another rate is."""
    preset = find_preset("mnist-mini")
    stored = dataclasses.asdict(preset)
    for train in (stored["train_forward"], stored["train_reverse"]):
        train |= {"log_every": 7, "sample_every": 7, "checkpoint_every": 500}
    lab.check_same_preset(stored, preset, tmp_path / "x.json", "--results")
    stored["train_reverse"]["lr"] = 1.0
    with pytest.raises(BitflowError, match="was made with train_reverse.lr = 1.0"):
        lab.check_same_preset(stored, preset, tmp_path / "x.json", "--results")


def checkpoints_under(folder) -> int:
    """Finished checkpoints of all G's there."""
    return len(list(folder.glob("reverse-*/run/checkpoints/step-*/config.json")))


def children_of(process) -> list[str]:
    """Process numbers of its workers."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [pid for pid in found.stdout.split() if b"spawn_main" in commands(pid)]


def commands(pid: str) -> bytes:
    """The command line of a process, empty once it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are read in /proc")
def test_a_killed_table_goes_on_and_says_the_same(tmp_path):
    """kill -9 while G's train in two workers: they end too, and the numbers are those of one go."""
    words = "ablate denoising --preset mnist-mini-smoke --seeds 1 --workers 2 --steps 60 --resume"
    words += " --train-forward.steps 10 --train-reverse.checkpoint-every 10"
    files = []
    for name, killed in (("whole", False), ("killed", True)):
        home = tmp_path / name
        places = ["--out", home / "runs", "--results", home]
        command = [sys.executable, "-m", "bitflow_edu.cli", *words.split(), *map(str, places)]
        if killed:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while process.poll() is None and not checkpoints_under(home / "runs"):
                time.sleep(0.05)
            workers = children_of(process)
            process.kill()
            process.wait()
            assert len(workers) == 2 and not list(home.glob("*.json"))
            tries = iter(range(1200))
            while any(map(commands, workers)) and next(tries, None) is not None:
                time.sleep(0.05)
            assert not any(map(commands, workers)), "a worker trains on"
        subprocess.run(command, check=True, capture_output=True)
        (file,) = home.glob("*.json")
        files.append(load_result(file.stem, home))
    whole, killed = (
        {(m["row"], m["metric"], m["seed"]): m["value"] for m in file["measurements"]}
        for file in files
    )
    assert whole == killed


def test_all_tables_are_those_that_are_published():
    """`ablate all` and `reproduce mnist-mini-tables` name the same tables in the same sizes."""
    experiment = EXPERIMENTS["mnist-mini-tables"].commands["cpu"]
    places = "--out RUNS/ablate-mnist-mini --results RESULTS --resume"
    listed = [options.parse(shlex.split(words.replace(places, ""))) for words in experiment]
    assert lab.tables_asked(options.parse(["ablate", "all"])) == listed
    goes_on = dict(resume=True, results=Path(lab.__file__).parents[2] / "results")
    lab.check_tables([dataclasses.replace(args, **goes_on) for args in listed])  # refuses none
    stems = [lab.table_stem(args.table, args) for args in listed]
    assert len(set(stems)) == len(stems) == len(TABLES) - 1 + 2  # without lpips; two more lengths
    results = Path(lab.__file__).parents[2] / "results"
    for args, stem in zip(listed, stems):
        if not (results / f"{stem}.json").exists():
            continue
        command = json.loads((results / f"{stem}.json").read_text())["command"]
        made = options.parse(shlex.split(command)[1:])
        assert (made.seeds, made.steps) == (args.seeds, args.steps), stem
    of_smoke = lab.tables_asked(options.parse("ablate all --preset mnist-mini-smoke".split()))
    assert {args.table for args in of_smoke} == TABLES.keys() - {"lpips"}
    assert {(args.seeds, args.steps, args.changes) for args in of_smoke} == {(5, None, ())}
    own = lab.tables_asked(options.parse("ablate all --train-forward.precision fp32".split()))
    assert all(lab.ablation_preset(args).train_forward.precision == "fp32" for args in own)


def test_one_row_is_repeated_by_the_command_beside_it(tmp_path, monkeypatch, capsys):
    """Trained and measured alone, it has the numbers that it has in the table; so has the next."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    words = "ablate strategies --preset mnist-mini-smoke --seeds 1 --seed 1 --steps 4 --workers 1"
    assert main(shlex.split(words)) == 0
    (file,) = Path("results").glob("*.json")
    table = load_result(file.stem, file.parent)

    def numbers(result):
        lines = [m for m in result["measurements"] if m["seed"] == 1]
        return {(m["row"], m["metric"]): m["value"] for m in lines}

    all_rows = numbers(table)
    for row in ("hidden-alignment, MSE", EXACT):
        threads, program, *words = shlex.split(table["config"]["row_commands"][row])
        assert (threads, program) == (f"OMP_NUM_THREADS={torch.get_num_threads()}", "bitflow")
        precision = words[words.index("--train-forward.precision") + 1]
        assert precision == ("bf16" if fast_bf16("cpu") else "fp32")  # what `auto` was here
        assert main(words) == 0
        again = load_result(f"{file.stem}-some-rows", "runs/again")
        one_row, names = numbers(again), {row, "naive, MSE", REAL}
        assert {name for name, _ in one_row} == names
        assert one_row == {key: v for key, v in all_rows.items() if key[0] in names}


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
        (["denoising", "--rows", "naive"], "'naive' is not a row of denoising"),
        (["all", "--rows", "naive"], "name the table"),
        (["strategies", "--preset", "imagenet64-smoke"], "would be the same training"),
    ],
)
def test_bad_words(words, say, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *words]) == 2
    assert say in capsys.readouterr().err


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
    row = Row("one", scales=(0.5,))
    figures, numbers = {}, [{"params": 1, "broken_samples": 0.25}, {"params": 1}]
    for seed, found in enumerate(numbers):
        figures[training_of(row, SMOKE, seed).key] = {"one-pass@0.5": found, "training": {}}
        figures[Training(SMOKE, seed, "forward").key] = {"real@0": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "made-up", lambda preset: [row])
        lines = table_measurements("made-up", SMOKE, range(2), figures)
    broken = [m["value"] for m in lines if m["metric"].endswith("broken_samples")]
    assert broken == [0.25, 0.0, 0.125]


def test_the_floor_compares_no_image_with_itself():
    """Real training images have a distance to test images alone, and those are not its choice."""
    training = Training(find_preset("mnist-mini-smoke"), 3, "forward")
    found, n = ablations.floor(training), training.preset.num_samples
    real = ablations.real_images(training.preset.data, 1, 5 * n)
    train = ablations.images_of(training.preset.data, "train")
    pick = torch.randperm(len(train), generator=torch.Generator().manual_seed(3))
    numbers = ablations.judged(dataset_source(train, pick, True), n, 3, real)
    assert numbers.pop("fd_train[mnist-cnn]") < numbers["fd[mnist-cnn]"]
    assert found == numbers


class HerePool(concurrent.futures.ThreadPoolExecutor):
    """As a pool of processes is made, with threads."""

    def __init__(self, workers, *_):
        super().__init__(workers)


def test_no_training_is_begun_after_one_has_failed(tmp_path, monkeypatch):
    """As after Ctrl-C: nothing waits in the pool that would go on."""
    begun = []

    def fail(training, ways, root, device):
        begun.append(training.key)
        raise BitflowError("no more room")

    monkeypatch.setattr(ablations, "ProcessPoolExecutor", HerePool)
    monkeypatch.setattr(ablations, "measure_training", fail)
    jobs = jobs_of("strategies", SMOKE, range(4))
    with pytest.raises(BitflowError, match="no more room"):
        ablations.run_jobs(jobs, tmp_path, "cpu", workers=1)
    assert len(begun) == 1


def test_figures_know_the_network_that_compared(tmp_path, monkeypatch):
    """Without one there are fewer: they are measured anew where it is there."""
    fake = {"run_fingerprint": lambda folder: "w", "data_fingerprint": lambda data: "i"}
    for name, call in fake.items():
        monkeypatch.setattr(ablations.fingerprints, name, call)
    training = Training(SMOKE, 0)
    assert ablations.made_from(training, tmp_path)["network"] == "mnist-cnn"
    monkeypatch.setattr(ablations, "network_for", lambda images, channels: None)
    assert ablations.made_from(training, tmp_path)["network"] is None
