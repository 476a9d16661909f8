"""The table of neighbours: what is trained, what is stored, and how rates are chosen."""

import json
from dataclasses import replace

import pytest

from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.results import rows_of
from bitflow_edu.lab import neighbour_table
from bitflow_edu.lab.ablations import REAL, lines_of
from bitflow_edu.lab.experiments import EXPERIMENTS
from bitflow_edu.lab.neighbour_report import draw_neighbours, neighbour_pairs, neighbour_words
from bitflow_edu.lab.neighbour_table import (
    Cell,
    at_rate,
    chosen_rate,
    neighbours_table,
    run_cell,
    searches_in,
    store_figures,
    stored_figures,
    take_over,
)
from bitflow_edu.lab.presets import find_preset

NAMES = ("normalizing-flow-matching", "flow-matching", "one-pass-mse", "aligned-to-flow")
NAMES += ("quarter-aligned",)


def tiny(steps=8):
    "The smoke preset, of a few steps and samples."
    preset = find_preset("mnist-mini-smoke")
    stages = ("train_forward", "train_reverse")
    few = {name: replace(getattr(preset, name), steps=steps) for name in stages}
    return replace(preset, num_samples=20, **few)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A table of one method with one seed, and its folder."
    root = tmp_path_factory.mktemp("neighbours")
    return neighbours_table(tiny(), range(1), root, NAMES, say=str), root


def values(found, row):
    "metric → value of a row, of seed 0."
    return {m["metric"]: m["value"] for m in found if m["row"] == row and m["seed"] == 0}


def test_every_row_has_its_numbers(made):
    found, _ = made
    numbers = values(found, "normalizing-flow-matching-4")
    wanted = "nfe params fd[mnist-cnn] fd_train[mnist-cnn] label_accuracy precision recall"
    assert set(wanted.split()) <= set(numbers) and numbers["nfe"] == 4
    assert numbers["own_minutes"] > 0
    assert numbers["teacher_minutes"] > 0  # it asks F
    assert numbers["steps"] >= 1
    assert values(found, "one-pass")["nfe"] == 1 and "exact+denoise" in {m["row"] for m in found}
    difference = [m for m in found if m["metric"] == "difference fd[mnist-cnn]"]
    assert difference and all(m["versus"] == "one-pass" for m in difference)
    params = values(found, "normalizing-flow-matching-1")["params"], values(found, "one-pass")
    assert abs(params[0] / params[1]["params"] - 1) < 0.1  # tiny: times weigh more


def test_every_row_has_a_time_and_equal_work_has_equal_ones(made):
    """Measured when the table is written; a table that is taken over is timed anew."""
    found, _ = made
    rows = {m["row"] for m in found if m["metric"] == "nfe"}
    for batch in (1, 64):
        metric = f"mean ms_per_image[{batch}]"
        times = {m["row"]: m["value"] for m in found if m["metric"] == metric}
        assert set(times) == rows and all(ms > 0 for ms in times.values())
        assert times["flow-matching-8"] == times["normalizing-flow-matching-8"]
        assert times["flow-matching-8"] == times["flow-matching-8, no average"]
        assert times["flow-matching-50"] > times["flow-matching-1"]
    assert not any(m["metric"].startswith("ms_per_image") for m in found)


def test_students_follow_another_trajectory(made):
    """In one pass; a quarter of the parameters where G teaches, whose minutes are told apart."""
    found, _ = made
    pair = values(found, "one-pass")
    whole, quarter = (values(found, name) for name in ("aligned-to-flow", "quarter-aligned"))
    assert whole["nfe"] == quarter["nfe"] == 1
    assert whole["params"] == pair["params"] and quarter["params"] < pair["params"] / 2
    assert quarter["teacher_minutes"] == pytest.approx(
        pair["teacher_minutes"] + pair["own_minutes"]
    )
    plain = values(found, "one-pass-mse")  # F's own trajectory, squared error alone
    assert plain["teacher_minutes"] == pair["teacher_minutes"]
    assert plain["params"] == pair["params"] and plain["fd[mnist-cnn]"] != pair["fd[mnist-cnn]"]
    assert 0 < whole["teacher_minutes"] != pair["teacher_minutes"]  # a flow's, and not F's


def test_heun_takes_two_evaluations_a_step(made):
    found, _ = made
    numbers = values(found, "flow-matching-4, Heun")
    assert numbers["nfe"] == 8 and numbers["fd[mnist-cnn]"] > 0
    assert numbers["fd[mnist-cnn]"] != values(found, "flow-matching-8")["fd[mnist-cnn]"]


def test_the_average_of_weights_is_compared_with_the_weights(made):
    found, _ = made
    both = [values(found, f"flow-matching-8{more}") for more in ("", ", no average")]
    assert both[0]["fd[mnist-cnn]"] != both[1]["fd[mnist-cnn]"]
    assert both[0]["params"] == both[1]["params"]


def test_the_search_is_stored_and_chooses_by_training_images(made):
    found, _ = made
    lines = [m for m in found if m["metric"] == "search fd_train"]
    assert len(lines) == 3 * (1 + 5)  # rates, of G and of the methods
    assert sum(m["row"] == "one-pass" for m in lines) == 3
    lines = [m for m in lines if m["row"] == "flow-matching"]
    assert len(lines) == 3 and sum(m["chosen"] for m in lines) == 1
    best = min(lines, key=lambda m: m["value"])
    assert best["chosen"]
    assert chosen_rate([{"lr": 1, "fd_train": 3.0}, {"lr": 2, "fd_train": 2.0}]) == 2


def test_test_images_choose_no_rate(monkeypatch):
    """They would prefer the second sampler by far, training images the first."""
    names = ("fd[mnist-cnn]", "fd_train[mnist-cnn]", "label_accuracy")
    numbers = {"a": (9.0, 1.0, 0.5), "b": (0.1, 2.0, 1.0)}
    monkeypatch.setattr(
        neighbour_table, "numbers_of", lambda s, cell: dict(zip(names, numbers[s], strict=True))
    )
    assert neighbour_table.nearest(["a", "b"], None) == 1.0
    assert neighbour_table.nearest(["b"], None) == 2.0


def test_what_was_measured_is_read_and_not_repeated(made):
    found, root = made
    preset = at_rate(tiny(), searches_in(found)["one-pass"])
    cell = Cell(preset, "normalizing-flow-matching", 0)
    (file,) = root.glob("normalizing-flow-matching-0-*/figures.json")
    stored = json.loads(file.read_text())
    stored["training"]["own_minutes"] = 123.0
    file.write_text(json.dumps(stored))
    assert run_cell(cell, root, [])["training"]["own_minutes"] == 123.0
    assert (
        cell.key
        == file.parent.name
        != Cell(at_rate(tiny(3), searches_in(found)["one-pass"]), cell.method, 0).key
    )
    figure = draw_neighbours(found, "title")
    assert figure.axes[0].get_ylabel() == "fd[mnist-cnn]" and figure.axes[1].lines
    other = [{**m, "metric": m["metric"].replace("mnist-cnn", "effnet-lite0")} for m in found]
    assert draw_neighbours(other, "title").axes[0].get_ylabel() == "fd[effnet-lite0]"
    assert {"one-pass", "aligned-to-flow"} <= rows_of({"measurements": found}).keys()


def test_what_is_said_names_the_best_and_what_is_missing(made):
    found = {"name": "tiny", "measurements": made[0]}
    said = " ".join(neighbour_words(found))
    assert "One seed so far" in said and "Not measured yet: reflow, mean-flow" in said
    fd = {m["row"]: m["value"] for m in made[0] if m["metric"] == "mean fd[mnist-cnn]"}
    floor = fd["real training images"]
    assert f"one-pass {fd['one-pass']:.1f}" in said and f"floor {floor:.1f}" in said
    to_train = {m["row"]: m["value"] for m in made[0] if m["metric"] == "mean fd_train[mnist-cnn]"}
    several = [
        f"{name}-{k}"
        for name in ("flow-matching", "normalizing-flow-matching")
        for k in (2, 4, 8, 50)
    ]
    best = min(several, key=to_train.get)  # chosen by training images, told by test images
    assert f"training images choose {best}: {fd[best]:.1f}" in said
    lines = list(neighbour_pairs(found))
    assert any("“flow-matching-8” and “flow-matching-8, no average”" in line for line in lines)
    assert sum("normalizing-flow-matching-2" in line for line in lines) >= 1
    (rates,) = (line for line in lines if line.startswith("learning rates"))
    assert "one-pass" in rates
    largest = [m["row"] for m in made[0] if m.get("chosen") and m["lr"] == 0.004]
    assert lines[-1].endswith(f"not tried: {', '.join(largest)}") or not largest


def pretended(steps=(100, 120), **rows):
    "A table's measurements: row → FD of each seed."
    found = []
    for row, seeds in rows.items():
        row, real = row.replace("_", "-"), row == REAL
        one = {"fd[mnist-cnn]": seeds, "fd_train[mnist-cnn]": seeds, "nfe": [1] * len(seeds)}
        one |= {"steps": steps[: len(seeds)], "share_of_budget": [1] * len(seeds)}
        one = {name: one[name] for name in list(one)[: 2 if real else None]}
        found += lines_of(row, {name: dict(enumerate(v)) for name, v in one.items()}, 20)
    return {"name": "pretended", "measurements": found}


def test_what_is_said_in_short_follows_the_intervals():
    """A clear lead, a clear lag and an open case; and who made unequal numbers of steps."""
    table = {"one_pass": [5.0, 6.0], "gan_1": [9.0, 10.01], "one_pass_mse": [3.0, 4.01]}
    result = pretended(**table, reflow_1=[4.0, 8.0], **{REAL: [3.0, 3.0]})
    (short, *_) = (line for line in neighbour_pairs(result) if "in short" in line)
    assert short.endswith("ahead: gan-1; undecided: reflow-1; behind: one-pass-mse")
    said = " ".join(neighbour_words(result))
    assert "made 100 steps in them, another one 120" in said


def test_the_first_point_of_a_line_counts_what_the_search_did_beside_its_steps(made):
    """A tenth of the method's minutes, and the pairs of reflow; no two methods share a colour."""
    found = [dict(m) for m in made[0]]
    method = "flow-matching"
    own = next(
        m["value"] for m in found if (m["row"], m["metric"]) == (f"{method}-1", "mean own_minutes")
    )
    for m in found:
        if (m["row"], m["metric"]) == (method, "search fd_train"):
            m["beside"] = 7.0
    first = [line.get_xdata()[0] for line in draw_neighbours(found, "title").axes[1].lines]
    assert any(x == pytest.approx(7.0 + 0.1 * own) for x in first)
    colours = [line.get_color() for line in draw_neighbours(found, "title").axes[1].lines]
    assert len({c for c in colours if c != "black"}) == sum(c != "black" for c in colours) == 2


def test_seeds_of_a_results_file_are_not_measured_again(made, tmp_path, monkeypatch):
    """A table taken up in another folder trains nothing, and says the same."""
    found, _ = made
    kept = json.loads(json.dumps(found))
    take_over(kept, tiny(), tmp_path)
    assert {p.name for p in tmp_path.glob("*/*")} == {"figures.json", "images.json"}
    monkeypatch.setattr(neighbour_table, "run_training", None)
    monkeypatch.setattr(neighbour_table, "train_cell", None)
    again = neighbours_table(tiny(), range(1), tmp_path, NAMES, say=str)
    said = [[m for m in t if "ms_per_image" not in m["metric"]] for t in (found, again)]
    key = [[(m["row"], m["metric"], m["seed"], m["value"]) for m in t] for t in said]
    assert sorted(map(str, key[0])) == sorted(map(str, key[1]))
    other = Cell(tiny(3), "pair", 0)
    assert stored_figures(other, tmp_path) is None  # another preset has other figures


def test_a_method_off_the_budget_is_called_so(made, tmp_path):
    """Seconds of training cannot keep to 5%; an exact share raises no alarm."""
    found, root = made
    (file,) = root.glob("flow-matching-0-*/figures.json")
    stored, names = json.loads(file.read_text()), ("flow-matching",)
    for share, called in ((1.04, False), (1.06, True), (0.9, True)):
        stored["training"]["share_of_budget"] = share
        file.write_text(json.dumps(stored))
        said = []
        neighbours_table(tiny(), range(1), root, names, say=said.append)
        assert ("MORE THAN 5% OFF" in said[0]) == called


def test_the_rate_of_G_is_searched_too(made):
    """By training images alone; the pair and what learns from it take the chosen one."""
    found, root = made
    search = searches_in(found)["one-pass"]
    rates = {line["lr"]: line["fd_train"] for line in search}
    assert len(rates) == 3 and chosen_rate(search) == min(rates, key=rates.get)
    assert at_rate(tiny(), search).train_reverse.lr == chosen_rate(search)
    assert len(list(root.glob("reverse-0-*"))) == 4  # three brief trainings, then the pair's


def test_an_unknown_method_is_refused_before_hours_are_spent(tmp_path):
    with pytest.raises(BitflowError, match="osmosis"):
        neighbours_table(tiny(), range(1), tmp_path, ("osmosis",))
    assert not list(tmp_path.iterdir())


def test_the_experiments_are_a_laptops_and_a_gpus():
    for name, size in (("neighbours", "cpu"), ("cifar10-neighbours", "gpu")):
        commands = EXPERIMENTS[name].commands
        assert set(commands) == {size, "smoke"}
        assert "-smoke" in commands["smoke"][0] and "--num-samples 20" in commands["smoke"][0]


def test_figures_of_other_images_are_refused(tmp_path, monkeypatch):
    cell = Cell(tiny(), "pair", 0)
    assert stored_figures(cell, tmp_path) is None
    store_figures(cell, tmp_path, {"rows": {}})
    assert stored_figures(cell, tmp_path) == {"rows": {}}
    monkeypatch.setattr(neighbour_table, "fingerprint_of", lambda cfg, split: "dogs")
    with pytest.raises(BitflowError, match="was trained on other images"):
        stored_figures(cell, tmp_path)
