"""The report of a run: every number from its measurements, every picture embedded."""

import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from bitflow_edu.io.models import build
from bitflow_edu.io.results import load_result
from bitflow_edu.lab import report
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.lab.sampling import METHODS, draw_all, pair_samplers
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.tarflow import TARFlow


@pytest.fixture(scope="module")
def result():
    return load_result("demo-mnist-mini", Path(__file__).parent.parent / "results")


@pytest.fixture(scope="module")
def pair():
    preset = find_preset("mnist-mini-smoke")
    return build(TARFlow, preset.forward, 0), build(ReverseModel, preset.reverse, 0)


def test_the_table_has_what_was_measured_and_a_dash_for_the_rest(result):
    table = report.table(result)
    assert table.count("<tr>") == len(METHODS) + 2
    assert "<td>0.958</td>" in table and "<td>4.49</td>" in table and "<td>–</td>" in table
    times = report.cell(result, "one-pass", "ms_per_image", 1, "{:.2f}")
    assert re.fullmatch(r"3\.07 <small>\(3\.04 to 3\.15\)</small>", times)
    assert report.cell(result, "exact", "speedup", 1, "{:.1f}×") == "5.4×"


def test_the_page_asks_for_no_other_file(result):
    figure = Figure(figsize=(1, 1))
    figure.subplots()
    page = report.page(result, {key: report.embed(figure, key) for key in report.TEXTS})
    assert page.count("data:image/png;base64,") == len(report.TEXTS)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert report.headline(result) in page and result["commit"] in page


def test_nothing_that_was_written_elsewhere_becomes_html(result):
    tag = "<script>1</script>"
    texts = {name: tag for name in ("preset", "command", "commit", "date")}
    config = {"name": tag}
    lines = [{**m, "protocol": tag} if "protocol" in m else m for m in result["measurements"]]
    hostile = {**result, **texts, "config": config, "versions": config, "measurements": lines}
    page = report.page(hostile, {})
    assert tag not in page and page.count("&lt;script&gt;") == 7


def test_rows_of_pictures_end_with_real_ones(pair, digits):
    rows = report.sample_rows(draw_all(pair_samplers(*pair), 10, seed=0), digits)
    assert list(rows) == [*METHODS.values(), "real digits"]
    assert all(x.shape == (10, 1, 16, 16) for x in rows.values())
    assert len(report.draw_rows(rows).axes) == 4


def test_both_ways_meet_in_the_noise(pair, digits):
    F, G = pair
    above, below = report.both_ways(F, G, digits.x[:2], digits.labels[:2])
    assert len(above) == len(below) == F.cfg.num_blocks + 2
    assert torch.equal(above[0], digits.x[:2]) and torch.equal(above[-1], below[-1])
    assert len(report.draw_trajectory(F, G, digits).axes) == 2 * len(above)
