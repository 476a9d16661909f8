"""Experiments as lists of commands: each can be parsed, and is skipped when its result stands.

The page shows what the files hold."""

import json
import shlex
from pathlib import Path

import pytest

from bitflow_edu.cli import common, options
from bitflow_edu.cli.main import main
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.results import measurement, save_results
from bitflow_edu.lab.reproduce import (
    BUDGETS,
    EXPERIMENTS,
    commands_of,
    compare_guard,
    result_exists,
    run_experiment,
    tag_result,
    write_results_index,
)


def save_score(folder, preset):
    """A results file that has the name of the experiment `mnist-full`."""
    command, found = f"bitflow evaluate --preset {preset}", [measurement("exact", "fid", 1.0)]
    save_results(folder, "mnist-full", preset, command, {}, found, 1.0)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_command_can_be_typed(name, budget, tmp_path):
    """Presets, options and fields exist; each stage reads what the one before writes."""
    experiment = EXPERIMENTS[name]
    typed = commands_of(name, budget, tmp_path / "runs", tmp_path)
    commands = [options.parse(words) for words in typed]
    assert len(commands) == len(experiment.commands[budget])
    assert set(experiment.minutes) == set(BUDGETS)
    for command in commands:
        if isinstance(command, (options.TrainForward, options.TrainReverse)):
            common.preset_of(command)
        if isinstance(command, (options.TrainReverse, options.Evaluate)):
            assert command.forward == commands[0].out


def test_an_experiment_from_end_to_end(tmp_path, capsys):
    """Trains, measures and marks its size; the second time nothing is done again."""
    results = tmp_path / "results"
    folders = f"--out {tmp_path}/runs --results {results}"
    words = shlex.split(f"reproduce mnist-full --budget smoke {folders} --device cpu")
    assert main(words) == 0
    result = json.loads((results / "mnist-full.json").read_text())
    assert (result["budget"], result["experiment"]) == ("smoke", "mnist-full")
    assert result["preset"] == "mnist-mini-smoke"
    metrics = {m["metric"] for m in result["measurements"]}
    assert metrics >= {"train_steps", "fd[mnist-cnn]", "ms_per_image"}
    assert (results / "mnist-full.png").exists()
    capsys.readouterr()
    assert main(words) == 0 and "mnist-full.json stands" in capsys.readouterr().out
    page = (results / "README.md").read_text()
    for text in ("budget `smoke`", "![mnist-full](mnist-full.png)", "exact+denoise"):
        assert text in page
    (line,) = json.loads((results / "index.json").read_text())
    assert (line["name"], line["budget"]) == ("mnist-full", "smoke")
    assert line["picture"] == "mnist-full.png"


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


@pytest.mark.parametrize(
    "words, said",
    [
        ("mnist-ful", "did you mean mnist-full?"),
        ("mnist-full --budget tpu", "choose gpu, cpu, smoke"),
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


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_command_is_listed(name, budget, tmp_path):
    write_results_index(tmp_path)
    listed = (tmp_path / "EXPERIMENTS.md").read_text()
    for words in commands_of(name, budget, Path("runs/reproduce"), Path("results")):
        assert f"bitflow {' '.join(words)}" in listed


@pytest.mark.parametrize("value, fine", [(1.2, True), (1.5, False), (0.5, False)])
def test_the_guard_sees_what_moved(value, fine):
    """Within four standard deviations of the stored seeds, or not."""
    values = (1.0, 1.1, 0.9, 1.05, 0.95)
    stored = {"measurements": [measurement("one-pass", "fid", v) for v in values]}
    compared = compare_guard(stored, [measurement("one-pass", "fid", value)])
    assert compared[0][-1] == fine


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
