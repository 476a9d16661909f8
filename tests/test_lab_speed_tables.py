"""What is made of a results file of speed: ratios, tables, the roofline."""

from pathlib import Path

import pytest

from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.results import load_result, measurement
from bitflow_edu.lab import speed_tables
from bitflow_edu.lab.bench_speed import left_out

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.fixture
def result():
    """A results file with the paper's times: one pass 0.29 ms, decoder 1.3 ms."""
    ms = {"one-pass": 0.5, "one-pass, compiled": 0.29, "exact": 202.0, "graph": 101.0}
    ms |= {"score-step": 3.0, "vae-decoder": 1.3, "tiny-decoder": 0.1}
    found = [
        measurement("machine", "measured_peak_tflops", 100.0),
        measurement("machine", "measured_bandwidth_gbs", 1000.0),
    ]
    for row, value in ms.items():
        found += [
            measurement(row, "ms_per_image", value, "ms", batch=8),
            measurement(row, "flops_per_image", 1e9, batch=8),
            measurement(row, "bytes_per_image", 1e7, batch=8),
        ]
    return {"name": "x", "measurements": found + [left_out("exact", 256, "too slow")]}


def test_the_table_gives_the_papers_ratios(result):
    table = speed_tables.with_decoders(result, 8)
    ours, exact = table["one pass, fastest"], table["exact, by default"]
    small, large = "+ small decoder", "+ VAE decoder"
    assert ours == {"alone": 0.29, small: pytest.approx(0.39), large: pytest.approx(1.59)}
    assert exact["alone"] / 0.29 == pytest.approx(697, abs=1)
    assert exact[large] / ours[large] == pytest.approx(128, abs=1)
    assert table["exact, fastest + score step"]["alone"] == 104.0
    text = speed_tables.speed_table(result)
    assert "696.55 ×" in text and "left out: exact at batch 256: too slow" in text


def test_pictures_come_from_a_results_file_alone(result):
    intensity, reached, batch = speed_tables.roofline_points(result)["one-pass"][0]
    assert (intensity, batch) == (100, 8) and reached == pytest.approx(2.0)  # 10⁹ in 0.5 ms
    ax = speed_tables.plot_roofline(result)
    x, y = ax.lines[0].get_data()
    assert max(y) == pytest.approx(100.0)
    assert y[0] == pytest.approx(x[0])  # 1000 GB/s: 1 operation a byte is 1 TFLOP/s
    fig = speed_tables.plot_speed(result)
    texts = [t.get_text() for t in fig.axes[0].texts]
    assert "697×" in texts and "128×" in texts
    with pytest.raises(BitflowError, match="x holds no time"):
        speed_tables.plot_speed(result | {"measurements": [left_out("one-pass", 8, "too slow")]})


def test_times_of_guided_cases_stand_apart():
    lines = []
    for w, exact in ((None, 5.0), (0.0, 6.0), (1.0, 9.0)):
        case = speed_tables.case_key(2, w)
        for row, value in (("one-pass", 1.0), ("exact", exact), ("score-step", 2.0)):
            lines.append(measurement(row, "ms_per_image", value, "ms", **case))
    result = {"name": "x", "measurements": lines}
    assert speed_tables.cases_of(result) == [(2, None), (2, 0.0), (2, 1.0)]
    assert speed_tables.times_of(result, 2, 1.0)["exact"] == 9.0
    assert speed_tables.times_of(result, 2)["exact"] == 5.0
    assert speed_tables.times_of(result, 3) == {}
    text = speed_tables.speed_table(result)
    assert "batch 2, w = 1" in text and "9.00 ×" in text
    found = speed_tables.speedups(lines)
    ratios = {(m["metric"], m.get("guidance")): m["value"] for m in found if m["row"] == "one-pass"}
    assert ratios["speedup_vs_exact", None] == 5.0
    assert ratios["speedup_vs_exact+denoise, fastest", None] == 7.0
    assert (
        ratios["speedup_vs_exact+denoise", 1.0]
        == ratios["speedup_vs_exact+denoise, fastest", 1.0]
        == 11.0
    )


def test_where_a_row_was_left_out_no_ratio_is_made_up():
    assert speed_tables.fastest_ratios({"one-pass": 1.0, "exact": 2.0}, {"batch": 1}) == []
    lines = [measurement("one-pass", "ms_per_image", 1.0, "ms", batch=1, guidance=1.0)]
    assert speed_tables.speedups(lines) == []


def test_the_fastest_are_compared_where_the_plain_inverse_was_too_slow():
    ms = {"one-pass, graph": 2.0, "graph": 50.0, "score-step": 4.0, "one-pass": 3.0}
    found = {m["metric"]: m for m in speed_tables.fastest_ratios(ms, {"batch": 1})}
    assert found["speedup_vs_exact, fastest"]["value"] == 25.0
    assert found["speedup_vs_exact+denoise, fastest"]["value"] == 27.0
    assert "speedup_vs_exact+denoise" not in found


def test_a_file_of_an_earlier_version_is_read_with_todays_names_of_rows():
    result = load_result("bench-pair-mnist-mini", RESULTS)
    assert speed_tables.cases_of(result) == [(1, 0.0), (1, 1.0), (64, 0.0), (64, 1.0)]
    for case in speed_tables.cases_of(result):
        key = speed_tables.case_key(*case)
        new = speed_tables.fastest_ratios(speed_tables.times_of(result, *case), key)
        for m in new:
            old = [
                o for o in result["measurements"] if all(o.get(k) == m[k] for k in (*key, "metric"))
            ]
            assert [o["value"] for o in old] == [pytest.approx(m["value"])]
            assert (old[0]["row"], old[0]["fastest"]) == ("one-pass", m["fastest"])
