"""Alarms on planted failures and silence elsewhere, the mirror in TensorBoard, a run's text."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as nnf
from conftest import small_flow, small_reverse

from bitflow_edu import watching
from bitflow_edu.data import BitflowError, DataConfig, add_noise, asset, load_data
from bitflow_edu.inverse_strategies import reading_norms
from bitflow_edu.pipeline import build, draw, noise_for
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.tarflow import TARFlow, trajectory_norms
from bitflow_edu.training import load_model, read_metrics
from bitflow_edu.watching import (
    FAILURES,
    Bound,
    Watcher,
    alike,
    check_line,
    check_metrics,
    check_samples,
    images_per_second,
    reference,
    reference_of,
    seams,
    to_tensorboard,
    watch,
    watch_labels,
)

CHEQUERS = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
TILES = torch.kron((torch.arange(4)[:, None] + torch.arange(4)) % 2 * 2.0 - 1, torch.ones(4, 4))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def train_digits():
    return load_data(DataConfig(), "train")


@pytest.fixture(scope="module")
def normal(train_digits):
    return reference_of(train_digits, watch_labels(train_digits.labels), patch_size=4)


def group_of(digits, normal, seed=0):
    """Digits with the reference's labels."""
    return digits[alike(normal.labels, digits.labels, seeded(seed))].x


def names(x, reference):
    return [alarm.name for alarm in check_samples(x, reference.labels, reference)]


def spoil(x, place, value):
    """A copy of x with one image or pixel changed."""
    x = x.clone()
    x[place] = value
    return x


def one_class_collapsed(x):
    x = x.clone()
    x[7::10] = x[7]
    return x


def three_modes(x):
    return x[torch.arange(100) % 3] + 0.02 * torch.randn(x.shape, generator=seeded(0))


def with_failures(x):
    """Failure's name → 100 digits with the failure in them."""
    padded = nnf.pad(x, (1, 1, 1, 1), mode="replicate")
    return {
        "seams": x + 0.25 * TILES,
        "pattern": x + 0.1 * CHEQUERS,
        "texture": add_noise(x, 0.25, seeded(0)),
        "blur": nnf.avg_pool2d(padded, 3, 1),
        "collapse": three_modes(x),
        "class-collapse": one_class_collapsed(x),
        "condition": x[torch.randperm(100, generator=seeded(2))],
        "constant": spoil(x, 0, 0.2),
        "not-finite": spoil(x, (3, 0, 5, 5), math.nan),
        "saturation": 1.7 * x,
        "wash-out": 0.6 * x,
    }


def test_every_alarm_has_a_planted_failure(digits):
    assert set(with_failures(digits[:100].x)) == {*FAILURES, "not-finite"}


@pytest.mark.parametrize("name", [*FAILURES, "not-finite"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_failures_fire_their_own_alarm(name, seed, digits, normal):
    fired = names(with_failures(group_of(digits, normal, seed))[name], normal)
    assert name in fired and len(fired) <= 3  # its own, and what follows from it


def test_the_worst_collapse_and_ignored_labels(digits, normal):
    group = group_of(digits, normal)
    assert "collapse" in names(group[:1].expand_as(group), normal)
    repeated = group[:10].repeat_interleave(10, dim=0)  # pictures do not follow their labels
    assert {"condition", "collapse"} <= set(names(repeated, normal))


def test_real_digits_are_silent(digits, normal):
    for seed in range(40):
        assert names(group_of(digits, normal, seed), normal) == []


def test_the_shipped_pair_is_silent(train_digits, normal):
    F = load_model(asset("mnist-mini/forward"), TARFlow)
    G = load_model(asset("mnist-mini/reverse"), ReverseModel)
    noisy = reference_of(train_digits, normal.labels, 4, F.cfg.noise_std)
    one_pass = [(seed, "one-pass") for seed in range(3)]
    for seed, row in [*one_pass, (0, "exact+denoise"), (0, "exact")]:
        x = draw(row, F, G, noise_for(F.cfg, 100, seed), normal.labels)
        assert names(x, noisy if row == "exact" else normal) == []


def test_an_untrained_model_is_not_silent(normal):
    G = load_model(asset("mnist-mini/reverse"), ReverseModel)
    young = build(ReverseModel, G.cfg, seed=0)
    x = draw("one-pass", None, young, noise_for(G.cfg, 100), normal.labels)
    assert "condition" in names(x, normal)


def test_messages_say_what_was_seen_and_what_to_try(digits, normal):
    (alarm,) = check_samples(1.7 * group_of(digits, normal), normal.labels, normal)
    assert alarm.value > alarm.limit > normal.bounds["saturation"].real
    assert f"{alarm.value:.3g}" in alarm.message and "guidance" in alarm.message


def test_mostly_nan_says_only_that(digits, normal):
    x = digits[:100].x
    x[:60] = math.inf
    (alarm,) = check_samples(x, normal.labels, normal)
    assert alarm.name == "not-finite" and alarm.value == 60


def test_huge_values_do_not_overflow(digits, normal):
    assert "saturation" in names(1e30 * digits[:100].x, normal)


def test_samples_must_fit_the_reference(digits, normal):
    with pytest.raises(BitflowError, match="make one for these samples"):
        check_samples(digits[:40].x, normal.labels[:40], normal)


def test_a_limit_lies_half_way_but_four_spreads_off():
    assert Bound(1.0, 0.01, 0.0).limit == 0.5
    assert Bound(0.0, 0.2, 1.0).limit == pytest.approx(0.8)
    assert Bound(0.0, 0.3, 1.0).limit is None and not Bound(0.0, 0.3, 1.0).crossed(9)
    assert Bound(math.nan, math.nan, math.nan).limit is None


def test_latents_labels_and_patches_may_be_missing():
    x, c = torch.randn(400, 4, 8, 8, generator=seeded(0)), torch.zeros(400, dtype=torch.long)
    blind = reference(x, c, -torch.ones(40, dtype=torch.long), patch_size=1).blind
    assert {"seams", "pattern", "class-collapse", "condition"} <= set(blind)
    latents = reference(x, c, watch_labels(c, 40), 2)
    assert "collapse" not in latents.blind and names(x[:40], latents) == []
    assert "pattern" in names(x[:40] + 2 * CHEQUERS[:8, :8], latents)


def test_many_classes_are_watched_through_a_few():
    c = torch.arange(64_000) % 1000
    labels = watch_labels(c)
    assert len(labels) == 96 and len(labels.unique()) == 12
    x, c = torch.randn(3000, 1, 4, 4, generator=seeded(0)), c[torch.isin(c, labels)].repeat(4)
    normal = reference(x, c[:3000], labels, 2)
    assert len(normal.known.class_means) == 12


def test_too_little_data_is_refused():
    with pytest.raises(BitflowError, match="no class has 8 images"):
        watch_labels(torch.arange(20))
    with pytest.raises(BitflowError, match="of class 3"):
        alike(torch.tensor([3, 3]), torch.tensor([1, 2, 3]), seeded(0))
    with pytest.raises(BitflowError, match="twice as many"):
        reference(torch.zeros(5, 1, 4, 4), torch.zeros(5).long(), torch.zeros(4).long())


def test_data_that_draw_themselves(train_digits, normal):
    class Drawn:
        labels, classes = train_digits.labels, train_digits.classes

        def draw(self, index, generator):
            return train_digits[index].x

    assert reference_of(Drawn(), normal.labels, 4).bounds == normal.bounds


def test_seams_see_a_step_at_the_border():
    x = torch.randn(8, 1, 8, 8, generator=seeded(0)) + torch.arange(8)[:, None] // 4 * 5.0
    assert seams(x, 4) > 1 and math.isnan(seams(x, 8))
    assert abs(seams(torch.zeros(2, 1, 8, 8), 4)) == 0


def healthy(n=60):
    g, lines = seeded(0), []
    for i in range(1, n + 1):
        loss = -1.5 + 0.02 * torch.randn((), generator=g).item()
        norm = math.exp(0.2 * torch.randn((), generator=g).item())
        line = {"step": 20 * i, "loss": loss, "grad_norm": norm, "z_rms": 1.0, "seconds": 2.0 * i}
        lines.append(line)
    return lines


def test_metrics_alarms():
    lines = healthy()
    assert check_metrics(lines) == []
    accidents = {
        "loss-spike": {"loss": -1.0},
        "gradient-blow-up": {"grad_norm": 30.0},
        "not-finite": {"depth_2": math.nan},
    }
    for name, accident in accidents.items():
        assert [a.name for a in check_line(lines[-1] | accident, lines[:-1])] == [name]
    drifted = [{**line, "z_rms": 1.4} for line in lines]
    assert {a.name for a in check_metrics(drifted)} == {"z-rms"}
    early = {"step": 1, "loss": 99.0, "grad_norm": 1e9}
    assert check_line(early, lines[:5]) == []  # nothing to compare with yet
    assert check_metrics([{"step": i, "loss": 1.0, "grad_norm": 0.0} for i in range(60)]) == []
    lines[49]["loss"] = 3.0
    assert lines[49]["step"] == 1000 and "step 1000" in check_metrics(lines)[0].message


def test_norms_of_the_trajectory():
    F = small_flow()
    G = small_reverse(F)
    with torch.no_grad():
        t = F(torch.randn(5, 1, 6, 6, generator=seeded(0)), torch.zeros(5).long())
        out = G(t.z, torch.zeros(5).long())
    found = trajectory_norms(t)
    assert list(found) == [f"state_rms_{i}" for i in range(4)]
    assert found["state_rms_3"] == t.z.square().mean().sqrt()
    assert list(reading_norms(out)) == [f"reading_rms_{i}" for i in range(3)]


def test_throughput():
    first, second = {"step": 20, "seconds": 2.0}, {"step": 40, "seconds": 4.0}
    assert images_per_second(second, first, 64) == images_per_second(first, None, 64) == 640
    assert images_per_second({"step": 20, "seconds": 0.0}, None, 64) == 0


def write_run(folder, lines, **train):
    """A run's plain files."""
    folder.mkdir(exist_ok=True)
    settings = {"steps": 1200, "minutes": None, "batch_size": 64, **train}
    (folder / "run.json").write_text(json.dumps({"train": settings}))
    write_lines(folder / "metrics.jsonl", lines)
    return folder


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_alarms(run, steps):
    alarm = {"name": "blur", "value": 0.1, "limit": 0.2, "message": "blurred"}
    write_lines(run / "alarms.jsonl", [{"step": step, **alarm} for step in steps])


def picture(folder, step, value):
    from PIL import Image

    (folder / "samples").mkdir(exist_ok=True)
    image = Image.new("RGB", (8, 8 + value), (value, 0, 0))
    image.save(folder / "samples" / f"step-{step:08d}.png")


def shown(folder):
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def curve(folder, tag="train/loss"):
    return [(e.step, round(e.value, 4)) for e in shown(folder).Scalars(tag)]


def points(values):
    return [{"step": s, "loss": v, "depth_0": 2 * v, "seconds": s / 10} for s, v in values]


def test_mirror_is_incremental(tmp_path):
    run, board = write_run(tmp_path / "run", points([(20, 3.0), (40, 2.0)])), tmp_path / "board"
    picture(run, 40, 1)
    assert to_tensorboard(run, board) == 3 and to_tensorboard(run, board) == 0
    write_run(run, points([(20, 3.0), (40, 2.0), (60, 1.0)]))
    write_alarms(run, [60])
    assert to_tensorboard(run, board) == 2
    assert curve(board) == [(20, 3.0), (40, 2.0), (60, 1.0)]
    assert curve(board, "depth/0")[0] == (20, 6.0)
    events = shown(board)
    assert events.Scalars("train/loss")[1].wall_time == 4.0  # the relative axis is the run's time
    assert [e.step for e in events.Images("samples")] == [40]
    assert "alarms/blur/text_summary" in events.Tags()["tensors"]


def test_mirror_of_a_resumed_run_does_not_double_back(tmp_path):
    lines = points([(s, s / 10) for s in range(20, 101, 20)])
    run, board = write_run(tmp_path / "run", lines), tmp_path / "board"
    for step in (40, 80):
        picture(run, step, 1)
    to_tensorboard(run, board)
    write_run(run, points([(20, 2.0), (40, 4.0)]))  # back at a checkpoint, nothing new yet
    to_tensorboard(run, board)
    assert curve(board) == [(20, 2.0), (40, 4.0)]
    picture(run, 80, 2)
    write_run(run, points([(20, 2.0), (40, 4.0), (60, -6.0), (80, -8.0)]))
    to_tensorboard(run, board)
    assert curve(board) == [(20, 2.0), (40, 4.0), (60, -6.0), (80, -8.0)]
    assert [(e.step, e.height) for e in shown(board).Images("samples")] == [(40, 9), (80, 10)]


def test_an_interrupted_mirror_is_mended(tmp_path, monkeypatch):
    lines = points([(20, 3.0), (40, 2.0), (60, 1.0)])
    run, board = write_run(tmp_path / "run", lines), tmp_path / "board"
    write, calls = watching.write_item, []

    def cut(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(watching, "write_item", cut)
    with pytest.raises(KeyboardInterrupt):
        to_tensorboard(run, board)
    monkeypatch.setattr(watching, "write_item", write)
    to_tensorboard(run, board)
    assert curve(board) == [(20, 3.0), (40, 2.0), (60, 1.0)]


def test_mirror_refuses_what_is_not_its_own(tmp_path):
    with pytest.raises(BitflowError, match="no run"):
        to_tensorboard(tmp_path, tmp_path / "board")
    run = write_run(tmp_path / "run", points([(20, 1.0)]))
    board = tmp_path / "board"
    board.mkdir()
    (board / "events.out.tfevents.1").write_text("")
    with pytest.raises(BitflowError, match="another folder"):
        to_tensorboard(run, board)
    (board / "mirror.json").write_text("{")
    with pytest.raises(BitflowError, match="damaged"):
        to_tensorboard(run, board)


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = write_run(tmp_path / "run", points([(20, 1.0)]))
    with pytest.raises(BitflowError, match="pip install tensorboard"):
        to_tensorboard(run, tmp_path / "board")
    Watcher(run).close()  # without TensorBoard nothing is missing
    code = "import sys, bitflow_edu.watching; "
    code += "assert not [m for m in sys.modules if m.startswith('tensorboard')]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_watcher_writes_alarms_and_says_them_once(tmp_path, digits, normal, capsys):
    run, group = write_run(tmp_path / "run", []), group_of(digits, normal)
    watcher = Watcher(run, reference=normal, batch_size=64, tensorboard=True)
    for line in healthy(30):
        watcher.metrics(line["step"], {k: v for k, v in line.items() if k != "step"})
    watcher.metrics(620, {"loss": 5.0, "grad_norm": 1.0, "seconds": 62.0})
    for step in (500, 1000):
        watcher.samples(step, 1.7 * group)
    watcher.close()
    alarms = [(a["step"], a["name"]) for a in read_metrics(run / "alarms.jsonl")]
    assert alarms == [(620, "loss-spike"), (500, "saturation"), (1000, "saturation")]
    said = capsys.readouterr().err
    assert said.count("saturation:") == 1 and said.count("loss-spike:") == 1
    events = shown(run / "tensorboard")
    assert [e.step for e in events.Images("samples")] == [500, 1000]
    assert len(events.Scalars("train/loss")) == 31
    assert events.Scalars("train/images_per_second")[5].value == 640


def test_a_resumed_watcher_drops_what_comes_after_its_checkpoint(tmp_path, digits, normal, capsys):
    run, group = write_run(tmp_path / "run", healthy(30)), group_of(digits, normal)
    for start, steps in ((0, (100, 200, 300)), (200, (300, 400))):
        watcher = Watcher(run, step=start, reference=normal, tensorboard=True)
        assert len(watcher.lines) == start // 20
        for step in steps:
            watcher.metrics(step, {"loss": float(start)})
            watcher.samples(step, 1.7 * group)
        watcher.close()
    assert [a["step"] for a in read_metrics(run / "alarms.jsonl")] == [100, 200, 300, 400]
    assert curve(run / "tensorboard") == [(100, 0.0), (200, 0.0), (300, 200.0), (400, 200.0)]
    assert capsys.readouterr().err.count("saturation:") == 1


def test_watcher_shows_latents_and_nan(tmp_path):
    watcher = Watcher(write_run(tmp_path / "run", []), tensorboard=True)
    watcher.samples(1, torch.full((3, 4, 8, 8), math.nan))
    watcher.close()
    assert len(shown(tmp_path / "run" / "tensorboard").Images("samples")) == 1


def test_watch_tells_how_a_run_goes(tmp_path):
    run = write_run(tmp_path / "run", healthy(30))
    assert "alarms: none" in watch(run) and "newest samples: none yet" in watch(run)
    picture(run, 500, 1)
    write_alarms(run, (100, 500))
    text = watch(run)
    assert "step 600 of 1200 steps, 50%, 10 steps/s, 640 images/s, about 1 min 0 s left" in text
    assert "blur (2 times, steps 100 to 500): blurred" in text
    assert text.endswith("step-00000500.png")
    assert "grad_norm" in text and "z_rms 1" in text


def test_watch_by_the_clock_and_at_the_end(tmp_path):
    assert "50%" in watch(write_run(tmp_path / "run", healthy(30), steps=None, minutes=2.0))
    assert "finished" in watch(write_run(tmp_path / "run", healthy(30), steps=600))
    assert "no line" in watch(write_run(tmp_path / "run", []))
    assert "step 20 of" in watch(write_run(tmp_path / "run", healthy(1)))
    with pytest.raises(BitflowError, match="run.json"):
        watch(tmp_path)


def test_the_command_watches(tmp_path, capsys):
    """`train … --watch` leaves alarms, norms and curves; `bitflow watch` reads and mirrors them."""
    pytest.importorskip("tensorboard")
    from bitflow_edu.cli import main

    preset = ["--preset", "mnist-mini-smoke", "--device", "cpu"]
    f, g, plain = (str(tmp_path / name) for name in ("f", "g", "plain"))
    assert main(["train", "forward", *preset, "--out", f, "--watch"]) == 0
    assert main(["train", "reverse", *preset, "--forward", f, "--out", g, "--watch"]) == 0
    assert main(["train", "forward", *preset, "--out", plain]) == 0
    for run in (tmp_path / "f", tmp_path / "g"):
        assert list((run / "tensorboard").glob("events*")) and (run / "alarms.jsonl").exists()
    assert read_metrics(tmp_path / "f" / "alarms.jsonl"), "thirty steps draw no digits"
    line = read_metrics(tmp_path / "g" / "metrics.jsonl")[-1]
    assert {"state_rms_0", "state_rms_2", "reading_rms_0", "depth_1", "image"} <= line.keys()
    assert not (tmp_path / "plain" / "alarms.jsonl").exists()
    a, b = (load_model(tmp_path / run, TARFlow).state_dict() for run in ("f", "plain"))
    assert all(torch.equal(a[k], b[k]) for k in a), "watching changes nothing"
    capsys.readouterr()
    assert main(["watch", f, "--tensorboard", str(tmp_path / "mirror")]) == 0
    said = capsys.readouterr().out
    assert "alarm" in said and "items mirrored" in said
    assert list((tmp_path / "mirror").glob("events*"))
    assert main(["watch", str(tmp_path)]) == 2 and "is no run" in capsys.readouterr().err
