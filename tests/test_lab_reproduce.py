"""Experiments as lists of commands: each can be parsed, and is skipped when its result stands.

The page shows what the files hold."""

import io
import json
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

from bitflow_edu.cli import common, lab, options
from bitflow_edu.cli.main import main
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import num_parameters
from bitflow_edu.io.results import load_result, measurement, save_results
from bitflow_edu.lab import reproduce
from bitflow_edu.lab.ablations import REAL
from bitflow_edu.lab.experiments import BUDGETS, EXPERIMENTS, in_miniature, row_by_row
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.lab.reproduce import (
    commands_of,
    compare_guard,
    result_exists,
    run_experiment,
    tag_result,
    write_results_index,
)
from bitflow_edu.lab.sampling import METHODS
from bitflow_edu.lab.tables import rows_for
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.tarflow import TARFlow


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """A few images in the layouts of MNIST and of CIFAR-10's JPEG copy."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    raw, arrays = root / "MNIST" / "raw", {"classes": list("abcdefghij")}
    raw.mkdir(parents=True)
    for split, prefix, n in (("train", "train", 40), ("test", "t10k", 30)):
        labels = np.arange(n, dtype=np.uint8) % 10
        pixels = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        head = struct.pack(">iiii", 2051, n, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">ii", 2049, n)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
        files = []
        for image in random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8):
            Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG")
            files.append(buffer.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    np.savez(root / "cifar10_jpeg.npz", **arrays)
    return root


def save_score(folder, preset):
    """A results file that has the name of the experiment `mnist-full`."""
    command, found = f"bitflow evaluate --preset {preset}", [measurement("exact", "fid", 1.0)]
    save_results(folder, "mnist-full", preset, command, {}, found, 1.0)


SIZES = [(name, size) for name, e in EXPERIMENTS.items() for size in e.commands]


@pytest.mark.parametrize("name, budget", SIZES)
def test_every_command_can_be_typed(name, budget, tmp_path):
    """Presets, options and fields exist; each stage reads what the one before writes."""
    experiment = EXPERIMENTS[name]
    typed = commands_of(name, budget, tmp_path / "runs", tmp_path)
    commands = [options.parse(words) for words in typed]
    assert len(commands) == len(experiment.commands[budget])
    assert set(experiment.minutes) == set(experiment.commands) <= set(BUDGETS)
    for command in commands:
        if isinstance(command, (options.TrainForward, options.TrainReverse)):
            common.preset_of(command)
        if isinstance(command, (options.TrainReverse, options.Evaluate)):
            assert command.forward == commands[0].out


def test_an_experiment_from_end_to_end(tmp_path, capsys, small_data):
    """Trains, measures and marks its size; the second time nothing is done again."""
    results = tmp_path / "results"
    folders = f"--out {tmp_path}/runs --results {results} --data-root {small_data}"
    words = shlex.split(f"reproduce mnist-full --budget smoke {folders} --device cpu")
    assert main(words) == 0
    result = json.loads((results / "mnist-full.json").read_text())
    assert (result["budget"], result["experiment"]) == ("smoke", "mnist-full")
    assert result["preset"] == "mnist-smoke"
    metrics = {m["metric"] for m in result["measurements"]}
    assert metrics >= {"train_steps", "fd[mnist-cnn]", "fd_train[mnist-cnn]", "chosen_w"}
    assert (results / "mnist-full.png").exists()
    capsys.readouterr()
    assert main(words) == 0 and "mnist-full.json stands" in capsys.readouterr().out
    page = (results / "README.md").read_text()
    for text in ("budget `smoke`", "![mnist-full](mnist-full.png)", "exact+denoise"):
        assert text in page
    (line,) = json.loads((results / "index.json").read_text())
    assert (line["name"], line["budget"]) == ("mnist-full", "smoke")
    assert line["picture"] == "mnist-full.png"


@pytest.mark.parametrize(
    "name, budget",
    [
        ("cifar10-main", "smoke"),
        pytest.param("cifar10-main", "cpu", marks=pytest.mark.slow),
        pytest.param("mnist-full", "cpu", marks=pytest.mark.slow),
    ],
)
def test_every_size_runs_on_its_own_preset_in_miniature(name, budget, tmp_path, small_data):
    """The same options, so that one which does not fit its preset is found here."""
    if name == "cifar10-main":
        pytest.importorskip("stlpips_pytorch")
        pytest.importorskip("efficientnet_lite_pytorch")
    words = commands_of(name, budget, tmp_path / "runs", tmp_path / "results")
    lines = [shlex.join(w) for w in words]
    lines = lines if budget == "smoke" else in_miniature(lines)
    for line in lines:
        more = f" --work {tmp_path}/work" if "--features" in line and "--work" not in line else ""
        run(f"{line}{more} --data-root {small_data} --device cpu")
    (path,) = (tmp_path / "results").glob("*.json")
    result = json.loads(path.read_text())
    preset = words[0][words[0].index("--preset") + 1]
    assert result["preset"] == f"{preset.removesuffix('-smoke')}-smoke"
    chosen = {m["row"] for m in result["measurements"] if m["metric"] == "chosen_w"}
    assert chosen == {f"{method}, chosen w" for method in METHODS}, "this G takes w"


def test_the_neighbours_in_colour_run_in_miniature(tmp_path, small_data):
    """The command for a GPU, on its own preset; one method stands for all of them."""
    pytest.importorskip("stlpips_pytorch")
    (words,) = commands_of("cifar10-neighbours", "smoke", tmp_path / "runs", tmp_path)
    run(f"{' '.join(words)} --methods flow-matching --data-root {small_data} --device cpu")
    result = load_result("neighbours-cifar10", tmp_path)
    rows = {m["row"] for m in result["measurements"] if m["metric"] == "nfe"}
    assert result["preset"] == "cifar10-smoke" and {"one-pass", "flow-matching-50"} <= rows


def test_a_miniature_keeps_the_options():
    command = "train reverse --preset mnist --minutes 3 --batch-size 256 --lr 1e-3"
    command += " --train-reverse.compile True"
    small = "train reverse --preset mnist-smoke --lr 1e-3 --train-reverse.compile False"
    assert in_miniature((command,)) == (f"{small} --steps 2 --batch-size 4",)
    (small,) = in_miniature(("evaluate --preset mnist --w 0.5 1 --n 500 --batch-size 99",))
    assert small == "evaluate --preset mnist-smoke --w 0.5 1 --batch-size 99 --n 20"


def test_what_is_made_on_a_lent_gpu_travels_back():
    """Minutes, so that the schedule ends in time; fewer than 15M parameters each."""
    for name in ("mnist-full", "cifar10-main"):
        typed = commands_of(name, "gpu-short", Path("runs"), Path("results"))
        forward, reverse, _ = map(options.parse, typed)
        assert forward.minutes <= 3 and reverse.minutes <= 3.5
        preset = common.preset_of(reverse)
        assert preset.forward == common.preset_of(forward).forward
        for kind, cfg in ((TARFlow, preset.forward), (ReverseModel, preset.reverse)):
            with torch.device("meta"):
                assert num_parameters(kind(cfg)) < 15e6


@pytest.mark.parametrize(
    "name", [name for name, e in EXPERIMENTS.items() if "gpu-short" in e.commands]
)
def test_a_short_experiment_has_a_plan_of_eight_minutes(name):
    """Minutes for each command; a training's own budget leaves room to start and compile."""
    experiment = EXPERIMENTS[name]
    commands = experiment.commands["gpu-short"]
    assert len(experiment.plan) == len(commands) and sum(experiment.plan) <= 8
    for minutes, words in zip(experiment.plan, map(shlex.split, commands)):
        if "--minutes" in words:
            assert float(words[words.index("--minutes") + 1]) <= minutes - 0.5


def test_a_short_table_is_begun_row_by_row(tmp_path):
    """A training of G in each command, F in the first alone; the last one asks for the table."""
    experiment, preset = EXPERIMENTS["cifar10-strategies"], find_preset("cifar10")
    typed = list(
        map(options.parse, commands_of("cifar10-strategies", "gpu-short", *2 * [tmp_path]))
    )
    *rows, whole = typed
    assert not whole.rows and {command.out for command in typed} == {whole.out}
    named = [command.rows for command in rows]
    trained = [row for row in rows_for("strategies", preset) if row.stage == "reverse"]
    assert named == [(row.name,) for row in trained] and len(named) == 6
    assert len({command.results for command in typed}) == 7, "no table is written over another"
    fields = dict(zip(whole.changes[::2], whole.changes[1::2]))
    F, G = (float(fields[f"--train-{stage}.minutes"]) for stage in ("forward", "reverse"))
    assert F + 6 * G < sum(experiment.plan) - 2, "two minutes to start, compile and measure"
    assert F + G <= experiment.plan[0] - 0.5
    assert all(G <= minutes - 0.35 for minutes in experiment.plan[1:-1])


def test_the_last_command_finds_what_the_rows_made(tmp_path, capsys):
    """Two rows, then the table: what they trained stays, and it trains and measures the rest."""
    more = "--seeds 1 --steps 2 --workers 1 --num-samples 20 --train-forward.steps 2 --device cpu"
    lines = row_by_row("mnist-mini-smoke", "strategies", more)
    folders = {"RUNS": f"{tmp_path}/runs", "RESULTS": f"{tmp_path}/results"}
    for name, folder in folders.items():
        lines = [line.replace(name, folder) for line in lines]
    for line in (*lines[:2], lines[-1]):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("step-*")}
        run(line)
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    table = load_result("ablate-strategies-mnist-mini-smoke-2-steps", tmp_path / "results")
    assert {m["row"] for m in table["measurements"]} >= {"exact + score denoising", "naive, MSE"}
    for i in (0, 1):
        (file,) = (tmp_path / "results" / "ablate-strategies-rows" / str(i)).glob("*.json")
        kept = {m["metric"]: m["value"] for m in json.loads(file.read_text())["measurements"]}
        row = shlex.split(lines[i])[shlex.split(lines[i]).index("--rows") + 1]
        same = {m["metric"]: m["value"] for m in table["measurements"] if m["row"] == row}
        assert kept["inverse_mse"] == same["inverse_mse"]


def test_what_the_minutes_cannot_hold_is_not_begun(tmp_path, capsys, monkeypatch):
    """Evaluation is planned for 1.5 minutes and is left out when 1 is left; then it is done."""
    said, clock = [], [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def takes_3_5_minutes(words):
        said.append(words[0])
        clock[0] += 3.5 * 60
        if words[0] == "evaluate":
            command = " ".join(["bitflow", *words])
            found = [measurement("exact", "fid", 1.0)]
            save_results(tmp_path, "mnist-full", "mnist", command, {}, found, 1.0)
        return 0

    def go(within):
        sizes = ("mnist-full", "gpu-short", tmp_path, tmp_path)
        run_experiment(*sizes, takes_3_5_minutes, within=within)
        return capsys.readouterr().out

    assert "planned for 3 + 3.5 + 1.5 minutes of one GPU, within 8" in go(None)
    assert said == ["train", "train"]
    assert "left out, 2.0 minutes are left for 3: bitflow train forward" in go(2)
    said.clear()
    assert "evaluate" in go(9) and said == ["train", "train", "evaluate"]
    assert "planned for 3 + 3.5 minutes" in go(9) and "mnist-full.json stands" in go(9)


def test_a_command_that_fails_stops_the_experiment(tmp_path):
    """What is done stays done, and the message says which command to mend."""
    said = []

    def fail_at_reverse(words):
        said.append(words[1])
        return 2 if words[1] == "reverse" else 0

    with pytest.raises(BitflowError, match="cifar10-main stopped at: bitflow train reverse"):
        run_experiment("cifar10-main", "cpu", tmp_path, tmp_path, fail_at_reverse)
    assert said == ["forward", "reverse"]


def test_a_result_of_another_command_is_not_taken_for_ours(tmp_path):
    save_score(tmp_path, "cifar10")
    words = commands_of("mnist-full", "cpu", tmp_path, tmp_path)[-1]
    with pytest.raises(BitflowError, match="was made by another command .*move it away"):
        result_exists(words, "cpu")


def test_a_result_of_another_size_is_not_taken_for_ours(tmp_path):
    """It is named before anything is trained."""
    save_score(tmp_path, "mnist")
    tag_result(tmp_path / "mnist-full.json", "mnist-full", "cpu")
    with pytest.raises(BitflowError, match="was made with --budget cpu, not gpu; move it away"):
        run_experiment("mnist-full", "gpu", tmp_path, tmp_path, pytest.fail)
    assert result_exists(commands_of("mnist-full", "cpu", tmp_path, tmp_path)[-1], "cpu")


RESULTS = Path(__file__).resolve().parent.parent / "results"


def test_the_pages_that_come_with_the_course_are_those_of_its_files(tmp_path):
    """Written anew from the results and the list of experiments, they are as they stand."""
    pages = ("README.md", "EXPERIMENTS.md", "index.json")
    for file in (*RESULTS.glob("*.json"), *RESULTS.glob("*.png")):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "index.json").unlink()
    write_results_index(tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text() == (RESULTS / page).read_text(), f"{page} is older"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("ablate-*.json")), ids=lambda p: p.stem)
def test_the_command_beside_each_row_can_be_typed(file):
    """With today's options: it asks for the row, and for the preset and a seed of its table."""
    found = load_result(file.stem, RESULTS)
    rows = dict.fromkeys(m["row"] for m in found["measurements"] if m["row"] != REAL)
    commands = found["config"]["row_commands"]
    assert set(commands) <= set(rows)
    for row, command in commands.items():
        threads, program, *words = shlex.split(command)
        assert threads.startswith("OMP_NUM_THREADS=") and program == "bitflow"
        args = options.parse(words)
        assert args.rows[-1] == row and args.preset == found["preset"]
        assert (args.seed, args.seeds) == (0, found["config"]["seeds"])
        tables_rows = [r.name for r in rows_for(args.table, common.preset_of(args), args.rows)]
        assert set(tables_rows) == set(args.rows)


def test_what_a_laptop_measured_is_not_taken_for_a_gpus():
    """Among the results that come with the course."""
    with pytest.raises(BitflowError, match="bench-speed-imagenet256-b2.json was .*without a GPU"):
        run_experiment("speed-imagenet256", "gpu-short", Path("runs"), RESULTS, pytest.fail)


@pytest.mark.parametrize(
    "words, said",
    [
        ("mnist-ful", "did you mean mnist-full?"),
        ("mnist-full --budget tpu", "choose gpu, gpu-short, cpu, smoke"),
        ("cifar10-scaling --budget gpu-short", "choose gpu, cpu, smoke"),
        ("mnist-full --within 8", "--within 8.0 is not read with --budget cpu"),
        ("mnist-full --budget gpu-short --within 0", "must be greater than 0"),
        ("--check", "measure it first"),
        ("--check --budget gpu", "--budget gpu is not read"),
        ("mnist-full --record", "mnist-full"),
        ("--budget smoke", "--budget smoke is not read"),
    ],
)
def test_mistakes(tmp_path, capsys, words, said):
    assert main(["reproduce", *words.split(), "--results", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_the_page_shows_every_seed_and_no_mean(tmp_path):
    found = [measurement("naive", "fid", value, seed=i) for i, value in enumerate((4.0, 5.0))]
    found += [measurement("naive", "mean fid", 4.5)]
    found += [measurement("exact", "ms_per_image", 2.0, "ms", batch=64)]
    save_results(tmp_path, "t", "mnist-mini", "bitflow ablate", {}, found, 1.0)
    page = write_results_index(tmp_path).read_text()
    assert "| naive | 4; 5 | – |" in page and "| exact | – | 2 ms |" in page
    assert "mean fid" not in page
    (tmp_path / "other.json").write_text("[]")
    assert "## t" in write_results_index(tmp_path).read_text()
    assert len(json.loads((tmp_path / "index.json").read_text())) == 1


@pytest.mark.parametrize("name, budget", SIZES)
def test_every_command_is_listed(name, budget, tmp_path):
    write_results_index(tmp_path)
    listed = (tmp_path / "EXPERIMENTS.md").read_text()
    for words in commands_of(name, budget, Path("runs/reproduce"), Path("results")):
        assert f"bitflow {shlex.join(words)}" in listed


@pytest.mark.parametrize("value, fine", [(1.2, True), (1.5, False), (0.5, False)])
def test_the_guard_sees_what_moved(value, fine):
    """Within four standard deviations of the stored seeds, or not."""
    values = (1.0, 1.1, 0.9, 1.05, 0.95)
    stored = {"measurements": [measurement("one-pass", "fid", v) for v in values]}
    one = (("one-pass", "fid"),)
    compared = compare_guard(stored, [measurement("one-pass", "fid", value)], guarded=one)
    assert compared[0][-1] == fine
    assert not compare_guard(stored, [], guarded=one)[0][-1]  # a figure that is gone has moved
    with pytest.raises(BitflowError, match="holds 1 of fid, one-pass, and needs 2"):
        compare_guard({"measurements": stored["measurements"][:1]}, [], guarded=one)


@pytest.mark.slow
def test_quality_is_as_stored():
    """The regression guard itself: a minute of training."""
    assert main(["reproduce", "--check", "--device", "cpu"]) == 0


@pytest.mark.parametrize("name, text", [("README.md", "# My project"), ("index.json", '{"a": 1}')])
def test_pages_of_somebody_else_are_kept(tmp_path, capsys, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert main(["reproduce", "--results", str(tmp_path)]) == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]
    path.unlink()
    for _ in range(2):  # its own pages are written anew
        assert main(["reproduce", "--results", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", ["mnist-mini-tables", "neighbours"])
def test_results_of_the_default_preset_stand(name):
    """The command in their files leaves out what is the default: the preset, too."""
    commands = [w for w in commands_of(name, "cpu", Path("runs"), RESULTS) if w[0] != "train"]
    there = [words for words in commands if reproduce.file_of(words).exists()]
    assert there and all(result_exists(words, "cpu") for words in there)
    words = [
        word.replace("mnist-mini", "mnist") if word == "mnist-mini" else word for word in there[0]
    ]
    assert not reproduce.made_by(load_result(reproduce.file_of(there[0]).stem, RESULTS), words)


def test_an_experiment_that_is_stopped_ends_as_its_command(tmp_path):
    """By a signal: nothing is to be mended, and the exit code is the signal's."""
    with pytest.raises(KeyboardInterrupt, match="start bitflow reproduce cifar10-main") as stopped:
        run_experiment("cifar10-main", "cpu", tmp_path, tmp_path, lambda words: 143)
    assert stopped.value.code == 143


def test_the_data_folder_is_not_told_to_a_bench(tmp_path, monkeypatch):
    """It reads no images, and refuses the option."""
    said = []

    def carry_out_one_of_each(name, budget, runs, results, run, within):
        assert run(["bench", "--out", "b"]) == run(["ablate", "depth"]) == 0

    monkeypatch.setattr(reproduce, "run_experiment", carry_out_one_of_each)
    args = options.Reproduce(names=("mnist-full",), data_root=tmp_path, results=tmp_path)
    lab.run_reproduce(args, lambda words: said.append(words) or 0)
    bench, ablate = said
    assert bench == ["bench", "--out", "b"]
    assert ablate == ["ablate", "depth", "--data-root", str(tmp_path)]
