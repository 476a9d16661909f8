"""A results file as a table in Markdown."""

from bitflow_edu.io.results import measurement
from bitflow_edu.lab.ablations import difference_lines, lines_of
from bitflow_edu.lab.result_tables import commands_text, is_paired, paired_table, results_table


def made_up(**config):
    found = lines_of("a", {"fd[x]": {0: 2.0, 1: 4.0}, "share_0": {0: 1.0, 1: 1.0}}, 100, w=0.5)
    found += lines_of("b", {"fd[x]": {0: 3.0, 1: 5.0}}, 100)
    found += lines_of("b, w = 1", {"fd[x]": {0: 3.0, 1: 5.0}}, 100, sweep=True)
    found += difference_lines(found, "b", "a", 100)
    return {"name": "t", "config": config, "measurements": found}


def test_a_table_of_seeds_shows_intervals_and_their_n():
    """Means with intervals, n and seeds in each row; neither a sweep nor the shares of the loss."""
    head, _, a, b = paired_table(made_up()).splitlines()
    assert head == "| | fd[x] | paired difference in fd[x] | n, seeds |"
    assert a == "| a (w = 0.5) | 3 [-9.706, 15.71] | – | 100, 2 |"
    assert b == "| b | 4 [-8.706, 16.71] | +1 from a | 100, 2 |"
    assert is_paired(made_up())


def test_what_has_no_seeds_stands_below():
    result = made_up()
    result["measurements"].append(measurement("c", "trip", 0.5, "x"))
    assert paired_table(result).startswith(paired_table(made_up()))
    assert paired_table(result).splitlines()[-3:] == ["| | trip |", "|---|---|", "| c | 0.5 x |"]


def test_every_row_has_its_command():
    assert commands_text(made_up()) == ""
    text = commands_text(made_up(row_commands={"a": "bitflow ablate x --rows a"}))
    assert "bitflow ablate x --rows a  # a\n" in text


def test_a_plain_file_has_a_plain_table():
    lines = [measurement("exact", "fid", 1.5), measurement("exact", "ms", 2.0, "ms", batch=4)]
    result = {"name": "t", "config": {}, "measurements": lines}
    assert not is_paired(result)
    assert results_table(result).splitlines()[0] == "| | fid | ms, batch 4 |"
    assert results_table(result).splitlines()[2] == "| exact | 1.5 | 2 ms |"
