"""Tables as lists of rows: what each trains, and that no two rows train the same."""

from dataclasses import replace

import pytest

from bitflow_edu.io.files import BitflowError
from bitflow_edu.lab import tables
from bitflow_edu.lab.presets import PAIRS, PRESETS, find_preset
from bitflow_edu.lab.sampling import SAMPLERS, WITHOUT_REVERSE
from bitflow_edu.lab.tables import TABLES, Row, Training, check_rows, rows_for, training_of

SMOKE = find_preset("mnist-mini-smoke")
PAIR_NAMES = [name for name in PRESETS if PRESETS[name]().reverse is not None]


@pytest.mark.parametrize("preset", PAIR_NAMES)
@pytest.mark.parametrize("table", TABLES)
def test_no_two_rows_are_the_same_training_unless_one_says_so(table, preset):
    """For every preset; a table that would have such rows refuses to start."""
    p = find_preset(preset)
    try:
        rows = rows_for(table, p)
    except BitflowError as e:
        assert "would be the same training" in str(e) and not p.objective.features
        return
    assert len({row.name for row in rows}) == len(rows) > 1
    first = {}
    for row in rows:
        first.setdefault(training_of(row, p, 0).key, []).append(row)
    for original, *others in first.values():
        assert all(row.shares == original.name for row in others)
        ways = {(row.method, row.scales) for row in (original, *others)}
        assert len(ways) == 1 + len(others), "the same training measured in the same way"


@pytest.mark.parametrize("name", [n for n in PAIRS if find_preset(n).objective.features])
def test_presets_with_a_perceptual_end_have_every_table(name):
    for table in TABLES:
        assert rows_for(table, find_preset(name))


def test_rows_that_are_alike_are_named():
    alike = [Row("a"), Row("b", (tables.objective(depth_weights=()),))]
    with pytest.raises(BitflowError, match="'a' and 'b' would be the same training"):
        check_rows(alike, SMOKE)
    check_rows([Row("a"), Row("b", method="guided", shares="a")], SMOKE)
    with pytest.raises(
        BitflowError, match="'x' is not a row of denoising; choose from no denoising"
    ):
        rows_for("denoising", SMOKE, ("x",))


def test_rows_fit_their_presets():
    for table in TABLES:
        names = set()
        for row in rows_for(table, SMOKE):
            preset = row.preset(SMOKE)
            assert preset.reverse.num_blocks == preset.forward.num_blocks
            assert preset.reverse.patch_size == preset.forward.patch_size
            assert row.method in SAMPLERS
            assert row.stage == ("forward" if row.method in WITHOUT_REVERSE else "reverse")
            names.add(row.name)
            assert not row.versus or row.versus in {r.name for r in rows_for(table, SMOKE)}


def test_squared_error_alone_has_no_weights():
    """Neither perceptual distances nor adaptive weights."""
    for name in ("mnist-mini", "cifar10", "mnist"):
        end = tables.MSE(find_preset(name)).objective
        assert (end.features, end.feature_weights, end.adaptive_power) == ((), (), 0.0)


def test_the_table_of_distances_sweeps_weight_and_power():
    found = {}
    for row in rows_for("distances", find_preset("mnist-mini")):
        end = row.preset(find_preset("mnist-mini")).objective
        found[row.name] = end.feature_weights, end.adaptive_power
    assert set(found.values()) == {
        *(((), p) for p in (0.0, 0.5, 1.0)),
        *(((w,), 1.0) for w in (1.0, 3.0, 9.0)),
        ((3.0,), 0.0),
        ((3.0,), 0.5),
    }


def test_a_training_is_known_by_what_it_depends_on():
    one, train = Training(SMOKE, 0), SMOKE.train_forward
    assert one.key == Training(replace(SMOKE, name="other", num_samples=7), 0).key
    often = replace(SMOKE, train_forward=replace(train, log_every=1, sample_every=1))
    assert one.key == Training(often, 0).key
    changed = [
        Training(SMOKE, 1),
        Training(tables.forward(clip=1.0)(SMOKE)),
        Training(tables.MSE(SMOKE)),
        Training(replace(SMOKE, train_forward=replace(train, lr=1.0))),
        Training(SMOKE, 0, "forward"),
    ]
    assert len({t.key for t in (one, *changed)}) == 6
    assert one.key.startswith("reverse-0-") and changed[-1].key.startswith("forward-0-")
    assert training_of(Row("exact", method="exact"), SMOKE, 3).stage == "forward"


def test_a_default_is_not_part_of_the_name():
    """A field that a later version adds leaves earlier trainings where they are."""
    assert "depth_weights" not in Training(SMOKE).depends_on["objective"]
    weighed = replace(SMOKE, objective=replace(SMOKE.objective, depth_weights=(1.0, 1.0)))
    assert Training(weighed).depends_on["objective"]["depth_weights"] == (1.0, 1.0)


def test_the_longer_f_has_the_time_of_both():
    """A step of G costs a pass of F and three of G; a step of F three of F."""
    p = find_preset("mnist-mini")  # four blocks alike in F, five in G
    more = tables.longer_forward(p).train_forward.steps - p.train_forward.steps
    assert more == round(1500 * (4 + 3 * 5) / (3 * 4))


def test_the_longer_f_of_minutes_has_both():
    p = find_preset("mnist-mini")
    forward = replace(p.train_forward, steps=None, minutes=3.0)
    reverse = replace(p.train_reverse, steps=None, minutes=2.0)
    both = replace(p, train_forward=forward, train_reverse=reverse)
    assert tables.longer_forward(both).train_forward.minutes == 5.0
    with pytest.raises(BitflowError, match="F has minutes None and G 2.0"):
        tables.longer_forward(replace(p, train_reverse=reverse))
