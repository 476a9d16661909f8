"""Results files: written in one shape, looked up, and honest about the code they come from."""

import json
import subprocess
from pathlib import Path

import pytest

from bitflow_edu.io import results
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.results import (
    commit,
    figure,
    load_result,
    markdown_table,
    measured,
    measurement,
    rows_of,
    save_results,
    table_text,
    text_table,
    time_per_image,
)

ROOT = Path(__file__).resolve().parent.parent


def test_results_file_has_the_shape_everything_reads(tmp_path):
    found = [
        measurement("exact", "ms_per_image", 2.5, "ms", 15, batch=1),
        measurement("exact", "ms_per_image", 0.5, "ms", 15, batch=64),
    ]
    run = ("try", "mnist-mini", "bitflow demo", {"a": 1})
    path = save_results(tmp_path / "results", *run, found, 1.23)
    result = json.loads(path.read_text())
    keys = "name preset command commit date wall_s hardware versions config measurements"
    assert list(result) == keys.split() and result == load_result("try", tmp_path / "results")
    assert figure(result, "exact", "ms_per_image", 64) == 0.5 and result["measurements"] == found
    assert measured(result, "exact", "ms_per_image") == found
    lines = path.read_text().splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines[-4:-2]] == found
    with pytest.raises(BitflowError, match="one-pass"):
        figure(result, "one-pass", "ms_per_image")


def test_a_line_is_stored_short_and_read_whole(tmp_path):
    """Seven digits; what most lines have alike is left out and comes back."""
    found = [
        measurement("a", "fd", 2 / 3, n=20, seed=1, low=1 / 3),
        measurement("b", "count", 12345678),
    ]
    path = save_results(tmp_path, "short", "p", "bitflow", {}, found, 1.0)
    text = path.read_text()
    assert '"value":0.6666667,' in text and '"low":0.3333333}' in text and "12345678" in text
    assert '"unit"' not in text and '"batch"' not in text
    read = load_result("short", tmp_path)["measurements"]
    assert [set(m) for m in read] == [set(m) for m in found]
    assert [(m["unit"], m["batch"]) for m in read] == [("1", None)] * 2


def test_seeds_of_a_row_stand_in_one_line(tmp_path):
    """A line for a row and a metric; what is read is what was measured, in its order."""
    seeds = [measurement("a", "fd", i / 4, n=20, seed=i, method="exact", w=0.5) for i in range(3)]
    alone = measurement("a", "params", 7, seed=0)
    other = [measurement("a", "fd", float("nan"), n=n, seed=0) for n in (10, 20)]
    found = [*seeds, alone, *other, measurement("a", "mean fd", 0.25, seeds=3), seeds[0]]
    path = save_results(tmp_path, "seeds", "p", "bitflow", {}, found, 1.0)
    text = path.read_text()
    assert text.count('"row"') == 6
    assert '"value":[0.0,0.25,0.5],"n":20,"seed":[0,1,2],"method":"exact"' in text
    read = load_result("seeds", tmp_path)["measurements"]
    lines = [[sorted(map(str, m.items())) for m in which] for which in (read, found)]
    assert lines[0] == lines[1]


def test_a_results_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "half.json").write_text('{"name": ')
    for name in ("half", "none"):
        with pytest.raises(BitflowError, match=f"{name}.json.*measure it"):
            load_result(name, tmp_path)


def test_results_that_come_with_the_course_are_found_anywhere(tmp_path, monkeypatch):
    """By name alone, whatever the current folder; another name is refused in a sentence."""
    monkeypatch.chdir(tmp_path)
    assert load_result("classifiers")["name"] == "classifiers"
    with pytest.raises(BitflowError, match="no results named 'none'.*measure"):
        load_result("none")


def test_the_commit_is_that_of_the_package(monkeypatch):
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True)
    if head.returncode:
        assert commit() == "unknown"
    else:
        assert commit().removesuffix("+changes") == head.stdout.strip()
    monkeypatch.setattr(results, "git", lambda *words: None)
    assert commit() == "unknown"


def test_a_time_is_per_image():
    t = {"median_ms": 6.4, "low_ms": 3.2, "high_ms": 12.8, "repeats": 15}
    line = time_per_image("exact", t, batch=64, chip="cpu")
    assert (line["value"], line["low"], line["high"]) == (0.1, 0.05, 0.2)
    assert (line["n"], line["batch"], line["unit"], line["chip"]) == (15, 64, "ms", "cpu")


def test_a_table_has_every_seed_and_the_mean():
    lines = [measurement("a", "d", v, seed=s, paper=3.0) for s, v in enumerate((1.0, 2.0))]
    lines += [measurement("b", "other", 1.0), measurement("a", "mean d", 1.5, low=1.0, high=2.0)]
    lines += [measurement("c", "d", 3.0, paper=None, sweep=True)]
    lines += [measurement("a", "difference d", 0.5, low=-0.5, high=1.5, versus="b")]
    result = {"name": "made up", "measurements": lines}
    assert rows_of(result, "d") == {"a": ([1.0, 2.0], 1.5, 3.0)}
    assert (
        table_text(result, "d").splitlines()[1].split() == "a 1.5 [1, 2] +0.5 [-0.5, +1.5]".split()
    )
    assert table_text(result, "d", "none").splitlines()[1].split()[-2:] == ["–", "–"]


def test_a_table_is_as_wide_as_it_has_to_be():
    rows = [["", "ms"], ["exact", "12"], ["one-pass", "3"]]
    assert text_table(rows, "lr").splitlines() == [
        "           ms",
        "exact      12",
        "one-pass    3",
    ]
    assert text_table(rows, "lr", (10, 4), "").splitlines()[1] == "exact       12"
    assert text_table(rows).splitlines()[1] == "exact      12"


def test_no_cell_breaks_out_of_a_markdown_table():
    rows = [["", "a|b"], ["one\ntwo", ""]]
    assert markdown_table(rows).splitlines() == ["| | a\\|b |", "|---|---|", "| one two |  |"]


@pytest.mark.parametrize("name", ["../x", "a/b", "/x"])
def test_results_stay_in_their_folder(tmp_path, name):
    with pytest.raises(BitflowError, match="cannot be named"):
        save_results(tmp_path / "results", name, "p", "bitflow", {}, [], 1.0)
    assert not list(tmp_path.iterdir())
