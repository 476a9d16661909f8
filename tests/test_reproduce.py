"""Experiments as lists of commands: every one can be parsed, is skipped when its result stands, and the page shows what the files hold."""

import json
from pathlib import Path

import pytest

from bitflow_edu import cli
from bitflow_edu.data import BitflowError
from bitflow_edu.evaluation import measurement, save_results
from bitflow_edu.reproduce import (
    BUDGETS,
    EXPERIMENTS,
    commands_of,
    compare_guard,
    mark,
    markdown_table,
    run_experiment,
    stands,
    write_index,
)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_command_can_be_typed(name, budget, tmp_path):
    """Presets, options and fields of every experiment exist; each stage reads what the one before writes."""
    commands = [
        cli.parse(words) for words in commands_of(name, budget, tmp_path / "runs", tmp_path)
    ]
    assert len(commands) == len(EXPERIMENTS[name].commands[budget]) and set(
        EXPERIMENTS[name].minutes
    ) == set(BUDGETS)
    for command in commands:
        if isinstance(command, (cli.TrainForward, cli.TrainReverse)):
            stage = "forward" if isinstance(command, cli.TrainForward) else "reverse"
            cli.with_options(cli.preset_of(command), command, stage)
        if isinstance(command, (cli.TrainReverse, cli.Evaluate)):
            assert command.forward == commands[0].out


def test_an_experiment_from_end_to_end(tmp_path, capsys):
    """`bitflow reproduce mnist-full --budget smoke`: trains, measures, marks its size; the second time nothing is done again; the page has it all."""
    words = [
        "reproduce",
        "mnist-full",
        "--budget",
        "smoke",
        "--out",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "results"),
        "--device",
        "cpu",
    ]
    assert cli.main(words) == 0
    result = json.loads((tmp_path / "results" / "mnist-full.json").read_text())
    assert (result["budget"], result["experiment"], result["preset"]) == (
        "smoke",
        "mnist-full",
        "mnist-mini-smoke",
    )
    assert {m["metric"] for m in result["measurements"]} >= {
        "train_steps",
        "fd[mnist-cnn]",
        "ms_per_image",
    } and (tmp_path / "results" / "mnist-full.png").exists()
    capsys.readouterr()
    assert cli.main(words) == 0 and "mnist-full.json stands" in capsys.readouterr().out
    page = (tmp_path / "results" / "README.md").read_text()
    assert (
        "budget `smoke`" in page
        and "![mnist-full](mnist-full.png)" in page
        and "exact+denoise" in page
    )
    index = json.loads((tmp_path / "results" / "index.json").read_text())
    assert [(e["name"], e["budget"], e["picture"]) for e in index] == [
        ("mnist-full", "smoke", "mnist-full.png")
    ]


def test_a_command_that_fails_stops_the_experiment(tmp_path):
    """What is done stays done, and the message says which command to mend."""
    said = []
    with pytest.raises(BitflowError, match="cifar10-main stopped at: bitflow train reverse"):
        run_experiment(
            "cifar10-main",
            "cpu",
            tmp_path,
            tmp_path,
            lambda words: said.append(words) or 2 * (words[1] == "reverse"),
        )
    assert [w[1] for w in said] == ["forward", "reverse"]


def test_a_result_of_another_command_is_not_taken_for_ours(tmp_path):
    save_results(
        tmp_path,
        "mnist-full",
        "cifar10",
        "bitflow evaluate --preset cifar10",
        {},
        [measurement("exact", "fid", 1.0)],
        1.0,
    )
    words = commands_of("mnist-full", "cpu", tmp_path, tmp_path)[-1]
    with pytest.raises(BitflowError, match="was made by another command .*move it away"):
        stands(words, "cpu")


def test_a_result_of_another_size_is_not_taken_for_ours(tmp_path):
    """It is named before anything is trained."""
    save_results(
        tmp_path,
        "mnist-full",
        "mnist",
        "bitflow evaluate --preset mnist",
        {},
        [measurement("exact", "fid", 1.0)],
        1.0,
    )
    mark(tmp_path / "mnist-full.json", "mnist-full", "cpu")
    with pytest.raises(BitflowError, match="was made with --budget cpu, not gpu; move it away"):
        run_experiment(
            "mnist-full", "gpu", tmp_path, tmp_path, lambda words: pytest.fail("something ran")
        )
    assert stands(commands_of("mnist-full", "cpu", tmp_path, tmp_path)[-1], "cpu")


def test_mistakes(tmp_path, capsys):
    assert (
        cli.main(["reproduce", "mnist-ful", "--results", str(tmp_path)]) == 2
        and "did you mean mnist-full?" in capsys.readouterr().err
    )
    assert (
        cli.main(["reproduce", "mnist-full", "--budget", "tpu"]) == 2
        and "choose gpu, cpu, smoke" in capsys.readouterr().err
    )
    assert (
        cli.main(["reproduce", "--check", "--results", str(tmp_path)]) == 2
        and "measure it first" in capsys.readouterr().err
    )


def test_the_page_shows_every_seed_and_no_mean(tmp_path):
    found = [
        measurement("naive", "fid", 4.0, seed=0),
        measurement("naive", "fid", 5.0, seed=1),
        measurement("naive", "mean fid", 4.5),
        measurement("exact", "ms_per_image", 2.0, "ms", batch=64),
    ]
    save_results(tmp_path, "t", "mnist-mini", "bitflow ablate", {}, found, 1.0)
    table = markdown_table(json.loads((tmp_path / "t.json").read_text()))
    assert (
        "| naive | 4; 5 | – |" in table and "| exact | – | 2 ms |" in table and "mean" not in table
    )
    (tmp_path / "other.json").write_text("[]")
    assert (
        "## t" in write_index(tmp_path).read_text()
        and len(json.loads((tmp_path / "index.json").read_text())) == 1
    )
    listed = (tmp_path / "EXPERIMENTS.md").read_text()
    assert all(
        f"bitflow {' '.join(words)}" in listed
        for name in EXPERIMENTS
        for budget in BUDGETS
        for words in commands_of(name, budget, Path("runs/reproduce"), Path("results"))
    )


def test_the_guard_sees_what_moved():
    """Within four standard deviations of the stored seeds, or not; the limit grows with the spread."""
    stored = {
        "measurements": [measurement("one-pass", "fid", v) for v in (1.0, 1.1, 0.9, 1.05, 0.95)]
    }
    fine = lambda v: compare_guard(stored, [measurement("one-pass", "fid", v)])[0][-1]
    assert fine(1.2) and not fine(1.5) and not fine(0.5)


@pytest.mark.slow
def test_quality_is_as_stored():
    """The regression guard itself: a minute of training."""
    assert cli.main(["reproduce", "--check", "--device", "cpu"]) == 0
