"""Ablation tables: what is trained, what is kept, and what is said about the order."""

import json
from dataclasses import replace

import pytest

from bitflow_edu import ablations, cli
from bitflow_edu.ablations import TABLES, Row, Training, jobs_of, lines_of, training_of, verdict
from bitflow_edu.config import find_preset
from bitflow_edu.evaluation import measurement

SMOKE = find_preset("mnist-mini-smoke")


def test_every_row_of_every_table_is_a_preset():
    for name, table in TABLES.items():
        rows = table()
        assert len({row.name for row in rows}) == len(rows) > 1, name
        for preset in (row.preset(SMOKE) for row in rows):
            assert preset.reverse.num_blocks == preset.forward.num_blocks


def test_what_several_tables_share_is_trained_once():
    separate = sum(len(jobs_of([name], SMOKE, range(2))) for name in TABLES)
    together = jobs_of(list(TABLES), SMOKE, range(2))
    assert len(together) < separate
    keys = {t.key for t in together}
    assert all(t.forward.key in keys for t in together)  # no G without its F
    # the preset's F, the clipped one, and those of two other regimes
    assert len({t.forward.key for t in together}) == 4


def test_a_training_is_known_by_what_it_depends_on():
    one = Training(SMOKE, 0)
    assert one.key == Training(replace(SMOKE, name="other", num_samples=7), 0).key
    changed = [
        Training(SMOKE, 1),
        Training(ablations.forward(clip=1.0)(SMOKE)),
        Training(ablations.MSE(SMOKE)),
        Training(SMOKE, 0, "forward"),
    ]
    assert len({t.key for t in (one, *changed)}) == 5
    assert training_of(Row("exact", method="exact"), SMOKE, 3).stage == "forward"


def table_of(*rows):
    """Means of (value, spread, paper)."""
    found = []
    for i, (value, spread, paper) in enumerate(rows):
        more = dict(spread=spread, paper=paper)
        found.append(measurement(f"row {i}", "mean fd[mnist-cnn]", value, **more))
    return found


@pytest.mark.parametrize(
    "rows,word",
    [
        ([(1, 0.1, 10), (2, 0.1, 20)], "same order"),
        ([(2, 0.1, 10), (1, 0.1, 20)], "other order"),
        ([(1, 0.5, 10), (1.3, 0.5, 20)], "within the noise"),
        ([(1, 0.1, None), (2, 0.1, 3)], "the paper has no figures"),
        (
            [(1, 0.1, 10), (2, 0.1, 20), (1, 0.1, 30)],
            "other order (row 0 before row 1: same order; row 1 before row 2: other order)",
        ),
    ],
)
def test_verdict(rows, word):
    assert verdict(table_of(*rows)).startswith(word)


def test_a_table_by_one_command_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = "ablate denoising --preset mnist-mini-smoke --seeds 2 --steps 4 --workers 1".split()
    words += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert cli.main(words) == 0
    file = tmp_path / "ablate-denoising-mnist-mini-smoke-4-steps.json"
    result = json.loads(file.read_text())
    assert result["command"].startswith("bitflow ablate denoising --preset mnist-mini-smoke")
    assert result["config"]["verdict"]
    fd = [m for m in result["measurements"] if m["metric"] == "fd[mnist-cnn]"]
    expected = [(row.name, seed) for row in TABLES["denoising"]() for seed in (0, 1)]
    assert [(m["row"], m["seed"]) for m in fd] == expected
    assert (tmp_path / "ablate-denoising-mnist-mini-smoke-4-steps.png").stat().st_size > 1000
    assert cli.main(words) == 2 and "exists already" in capsys.readouterr().err
    preset = cli.ablation_preset(cli.parse(words))
    jobs = jobs_of(["denoising"], preset, range(2))
    files = {t.key: tmp_path / "runs" / t.key / "figures.json" for t, ways in jobs.items() if ways}
    figures = {key: json.loads(file.read_text()) for key, file in files.items()}
    assert lines_of("denoising", preset, range(2), figures) == result["measurements"]


@pytest.mark.parametrize(
    "words,say",
    [
        (["strategiez"], "no ablation is named 'strategiez'"),
        (["denoising", "--preset", "mnist-minix"], "did you mean mnist-mini"),
        (["denoising", "--preset", "mnist-glow"], "flow alone"),
        (["denoising", "--seeds", "0"], "--seeds 0"),
    ],
)
def test_bad_words(words, say, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ablate", *words]) == 2
    assert say in capsys.readouterr().err


def test_photographs_are_compared_through_other_eyes(digits):
    """Digits by the digit classifier; colour by EfficientNet-Lite0; latents by nothing."""
    pytest.importorskip("efficientnet_lite_pytorch")
    from bitflow_edu.ablations import judged, main_metric, network_for
    from bitflow_edu.data import Images

    colour = Images(digits.pixels[:20].expand(-1, 3, -1, -1), digits.labels[:20], ("cat", "dog"))
    assert network_for(digits, 1).name == "mnist-cnn" and network_for(colour, 4) is None
    net = network_for(colour, 3)
    real = {"network": net, **{split: net.features(colour.x[:10]) for split in ("train", "test")}}
    found = judged(colour.x[10:], real)
    assert found["fd[effnet-lite0]"] > 0 and "label_accuracy" not in found
    assert {"precision", "recall", "fd_train[effnet-lite0]"} <= found.keys()
    assert main_metric([{"metric": "params"}, {"metric": "fd[effnet-lite0]"}]) == "fd[effnet-lite0]"
