"""The watcher in the loop, the mirror in TensorBoard, a run's text."""

import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image
from watched import group_of, healthy, seeded

from bitflow_edu.cli.main import main
from bitflow_edu.inverse_strategies import reading_norms
from bitflow_edu.io.checkpoints import read_metrics
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import load_model
from bitflow_edu.scale import watching
from bitflow_edu.scale.watching import Watcher, images_per_second, to_tensorboard, watch
from bitflow_edu.tarflow import TARFlow, trajectory_norms
from conftest import small_flow, small_reverse


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
    with pytest.raises(BitflowError, match="not a run"):
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
    code = "import sys, bitflow_edu.scale.watching; "
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


DAMAGE = {
    "run.json": ["[]", "null", '{"train": []}', '{"train": {"steps": "many", "batch_size": 1}}']
    + ['{"train": {"steps": 9}}', '{"train": {"steps": Infinity, "batch_size": 1}}'],
    "metrics.jsonl": [
        "[]",
        "null",
        '{"step": Infinity}',
        '{"step": true}',
        '{"step": 1, "loss": "x"}',
    ]
    + ['{"loss": 1}', '{"step": 1, "loss": [1]}', '{"step": -5}'],
    "alarms.jsonl": ['{"step": 1}', '{"step": 1, "name": 3, "message": "x"}', "7"],
}


@pytest.mark.parametrize("name, text", [(name, t) for name in DAMAGE for t in DAMAGE[name]])
def test_damaged_files_of_a_run_are_named(tmp_path, name, text):
    run = write_run(tmp_path / "run", healthy(30))
    write_alarms(run, [20])
    assert "step 600" in watch(run)
    (run / name).write_text(text + "\n")
    with pytest.raises(BitflowError, match=name):
        watch(run)


def test_damaged_mirrors_and_pictures_are_named(tmp_path):
    pytest.importorskip("tensorboard")
    run, board = write_run(tmp_path / "run", healthy(3)), tmp_path / "board"
    board.mkdir()
    for text in ("{}", "[1]", "[[1, 2, 3]]", '[["a", "b", "c"]]', "null"):
        (board / "mirror.json").write_text(text)
        with pytest.raises(BitflowError, match="mirror.json"):
            to_tensorboard(run, board)
    (board / "mirror.json").unlink()
    picture(run, 20, 1)
    (run / "samples" / "step-00000020.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    with pytest.raises(BitflowError, match="step-00000020.png"):
        to_tensorboard(run, board)


def test_the_command_watches(tmp_path, capsys):
    """`train … --watch` leaves alarms, norms and curves; `bitflow watch` reads and mirrors them."""
    pytest.importorskip("tensorboard")
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
    assert main(["watch", str(tmp_path)]) == 2 and "is not a run" in capsys.readouterr().err
