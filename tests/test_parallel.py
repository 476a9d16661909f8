"""Many processes (gloo, on the CPU): the same numbers as one, a lost process, another number of them, and whole figures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from conftest import small_flow

from bitflow_edu.data import BitflowError
from bitflow_edu.parallel import find_ranks, lost_contact
from bitflow_edu.tarflow import forward_loss
from bitflow_edu.training import (
    ALONE,
    Alone,
    TrainConfig,
    check_shares,
    newest_checkpoint,
    read_metrics,
    read_state,
    train,
)
from bitflow_edu.transformer import compile_layers

pytest.importorskip("accelerate")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SIX = [
    "--train-forward.batch-size",
    "24",
    "--train-forward.pieces",
    "6",
    "--train-forward.precision",
    "fp32",
    "--train-forward.log-every",
    "1",
]
FORWARD = [
    "train",
    "forward",
    "--preset",
    "mnist-mini-smoke",
    "--device",
    "cpu",
    "--steps",
    "12",
    "--train-forward.checkpoint-every",
    "4",
    *SIX,
]


def start(n, *words):
    """The command on n processes, one of them without torchrun."""
    launcher = (
        [] if n == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    )
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "bitflow_edu.cli", *map(str, words)],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(n, *words):
    """The same, waited for: its output."""
    process = start(n, *words)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-3000:]
    return out


def losses(folder):
    return torch.tensor([m["loss"] for m in read_metrics(folder / "metrics.jsonl")])


def weights(folder):
    """All tensors of the newest checkpoint: averages, weights and moments."""
    averaged, training, step, _ = read_state(newest_checkpoint(folder))
    return {**{f"averaged.{k}": v for k, v in averaged.items()}, **training}, step


def assert_same_run(a, b, within=1e-5):
    """Loss curves agree to 1e-5, and weights as far as rounding lets Adam's division agree."""
    assert losses(a).shape == losses(b).shape and (losses(a) - losses(b)).abs().max() < within
    (one, step), (other, same) = weights(a), weights(b)
    assert step == same and one.keys() == other.keys()
    assert all(
        torch.allclose(one[k], other[k], atol=2e-4, rtol=1e-2)
        for k in one
        if not k.startswith("adam")
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process that the others are compared with."""
    folder = tmp_path_factory.mktemp("alone") / "f"
    run(1, *FORWARD, "--out", folder)
    return folder


@pytest.mark.parametrize("n, sharding", [(2, "none"), (2, "full")])
def test_the_same_run_on_more_processes(alone, tmp_path, n, sharding):
    """One batch, cut into six pieces with noise of their own: who computes which does not matter."""
    said = run(n, *FORWARD, "--out", tmp_path / "f", "--sharding", sharding)
    assert_same_run(alone, tmp_path / "f")
    assert said.count("F is in") == 1, "one process speaks"
    assert (
        len((tmp_path / "f" / "starts.jsonl").read_text().splitlines()) == 1
        and (tmp_path / "f" / "samples").exists()
    )


def test_a_lost_process_and_another_number_of_them(alone, tmp_path):
    """Kill one of two: the end is clear and the checkpoint whole; three go on from it, and come to the weights of the one that was alone."""
    folder = tmp_path / "f"
    process = start(2, *FORWARD, "--out", folder)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    victim = next(
        int(p) for p in workers if b"\0RANK=1\0" in open(f"/proc/{p}/environ", "rb").read()
    )
    os.kill(victim, signal.SIGKILL)
    said, _ = process.communicate(timeout=100)
    assert process.returncode != 0 and "exitcode  : -9" in said
    assert "start again with --resume" in said or "Signal 15" in said, said[
        -3000:
    ]  # the other process notices by itself, or is stopped first
    assert newest_checkpoint(folder).name < "step-00000012", "it was killed on the way"
    run(3, *FORWARD, "--out", folder, "--resume", "--sharding", "full")
    assert_same_run(alone, folder)


def test_sharded_weights_go_on_alone(alone, tmp_path):
    """A checkpoint knows nothing of the number of processes that wrote it. And G, which is run through `walk` and twice a step, shards too."""
    folder = tmp_path / "f"
    run(2, *FORWARD, "--out", folder, "--sharding", "full")
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    run(1, *FORWARD, "--out", folder, "--resume")
    assert_same_run(alone, folder)


def test_the_second_stage_on_two_processes(alone, tmp_path):
    """G with guidance in training is run through `walk`, twice a step, and not through `forward`: both ways of sharing see all its weights."""
    words = [
        "train",
        "reverse",
        "--preset",
        "mnist-mini-smoke",
        "--device",
        "cpu",
        "--forward",
        alone,
        "--steps",
        "4",
        "--reverse.max-guidance",
        "3",
    ]
    words += [w.replace("train-forward", "train-reverse") for w in SIX]
    for n, sharding, name in ((1, "none", "one"), (2, "none", "copies"), (2, "full", "shards")):
        run(n, *words, "--out", tmp_path / name, "--sharding", sharding)
    assert_same_run(tmp_path / "one", tmp_path / "copies")
    assert_same_run(tmp_path / "one", tmp_path / "shards")


SCRIPT = """
import sys, torch
from bitflow_edu.data import BitflowError
from bitflow_edu.parallel import end, find_ranks, together
ranks = find_ranks("cpu")
mine = torch.arange(7)[ranks.rank::ranks.size].double()
assert ranks.gather(mine).tolist() == [0, 2, 4, 6, 1, 3, 5] and ranks.total(mine.sum()).item() == 21
assert ranks.mean([ranks.rank, torch.tensor(2.0)]) == [0.5, 2.0]
assert ranks.agree(f"from {ranks.rank}") == "from 0" and ranks.on_main(lambda: 5) == (5 if ranks.main else None)
def full():
    raise BitflowError("the disk is full")
try:
    ranks.on_main(full)
except BitflowError as e:
    print(f"process {ranks.rank}: {e}", flush=True)
ranks.barrier()
together()
end(0)
"""


def test_what_processes_tell_each_other(tmp_path):
    """Sums, means, lists in order; and a mistake of the main process is everybody's."""
    (tmp_path / "s.py").write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            tmp_path / "s.py",
        ],
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(done.stdout.count(f"process {rank}: the disk is full") == 1 for rank in (0, 1)), (
        "each, once, though perhaps on one line"
    )


def test_mistakes(monkeypatch):
    """An unknown sharding; pieces that cannot be shared; errors that are no lost contact."""
    with pytest.raises(BitflowError, match="unknown sharding 'half'; choose none or full"):
        find_ranks("cpu", "half")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (
        find_ranks("cpu", "full") is ALONE
        and lost_contact(RuntimeError("Connection closed by peer")) is None
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (
        "lost contact" in lost_contact(RuntimeError("Connection closed by peer [127.0.0.1]"))
        and lost_contact(RuntimeError("shapes differ")) is None
    )

    class Three(Alone):
        size = 3

    with pytest.raises(
        BitflowError,
        match="4 pieces of a batch cannot be shared equally by 3 processes; set pieces to a multiple of 3",
    ):
        check_shares(TrainConfig(pieces=4), Three())
    with pytest.raises(BitflowError, match="batch of 64 cannot be cut into 6 equal pieces"):
        TrainConfig(pieces=6)


def test_pieces_and_checkpointing_change_no_gradient(tmp_path, digits):
    """Layers that are computed again give the same weights; a batch in pieces is a batch with other noise, of the same size."""
    cfg = TrainConfig(steps=3, batch_size=12, precision="fp32", checkpoint_every=3)
    made = {}
    for name, change in (
        ("plain", {}),
        ("again", {"checkpointing": True}),
        ("pieces", {"pieces": 3}),
    ):
        torch.manual_seed(0)
        made[name] = train(
            small_flow(side=8, patch=2, num_classes=10).train(),
            forward_loss,
            digits[:40],
            replace(cfg, **change),
            tmp_path / name,
        )
    plain, again, pieces = (
        torch.cat([p.flatten() for p in made[n].parameters()]) for n in ("plain", "again", "pieces")
    )
    assert (
        torch.equal(plain, again)
        and not torch.equal(plain, pieces)
        and (plain - pieces).abs().max() < 0.05
    )


def test_the_whole_path_to_imagenet_on_two_processes(tmp_path):
    """Pictures → latents → F → G (sharded) → figures of exactly n samples → decoded pictures, each command on two processes."""
    pytest.importorskip("diffusers")
    from bitflow_edu.latents import synthetic_images, tiny_vae

    for split, n in (("train", 80), ("test", 30)):
        synthetic_images(tmp_path / "images", n, split)
    vae, latents, preset = (
        tiny_vae(tmp_path / "vae"),
        tmp_path / "latents",
        ["--preset", "imagenet256-b2-smoke", "--device", "cpu"],
    )
    for split in ("train", "test"):
        run(
            2,
            "cache-latents",
            "--source",
            tmp_path / "images",
            "--split",
            split,
            "--vae",
            vae,
            "--image-size",
            16,
            "--per-shard",
            16,
            "--out",
            latents,
            "--device",
            "cpu",
        )
    data = [*preset, "--data-root", latents]
    run(2, "train", "forward", *data, "--steps", 4, "--out", tmp_path / "f")
    run(
        2,
        "train",
        "reverse",
        *data,
        "--steps",
        4,
        "--forward",
        tmp_path / "f",
        "--out",
        tmp_path / "g",
        "--sharding",
        "full",
    )
    run(
        2,
        "evaluate",
        *data,
        "--forward",
        tmp_path / "f",
        "--reverse",
        tmp_path / "g",
        "--vae",
        vae,
        "--features",
        "effnet-lite0",
        "--rows",
        "one-pass",
        "--images",
        25,
        "--no-timing",
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "e.json",
    )
    found = {m["metric"]: m for m in json.loads((tmp_path / "e.json").read_text())["measurements"]}
    assert (
        found["fd[effnet-lite0]"]["n"] == 25
        and 0 < found["fd[effnet-lite0]"]["value"] < 1e4
        and (tmp_path / "e.png").exists()
    )
    run(
        2,
        "sample",
        "--checkpoint",
        tmp_path / "g",
        "--vae",
        vae,
        "--images",
        20,
        "--out",
        tmp_path / "s.png",
        "--device",
        "cpu",
    )
    assert Image.open(tmp_path / "s.png").size[0] > 10 * 16, (
        "ten pictures of 16 pixels side by side, decoded"
    )


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="torch.compile needs a C++ compiler here",
)
def test_compiled_layers_train_the_same_model(tmp_path, digits):
    """The same weights up to rounding, under the same names; the averaged model is an ordinary one."""
    cfg = TrainConfig(steps=2, batch_size=8, precision="fp32", checkpoint_every=2)
    made = {}
    for name, compiled in (("plain", False), ("compiled", True)):
        torch.manual_seed(0)
        made[name] = train(
            small_flow(side=8, patch=2, num_classes=10).train(),
            forward_loss,
            digits[:20],
            replace(cfg, compile=compiled),
            tmp_path / name,
        ).state_dict()
    assert made["plain"].keys() == made["compiled"].keys()
    assert all(
        torch.allclose(made["plain"][k], made["compiled"][k], atol=1e-4) for k in made["plain"]
    )


def test_compiling_without_a_compiler_says_what_to_install(monkeypatch):
    """A CPU without g++ is told so, and not shown a page of traceback."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BitflowError, match="needs a C\\+\\+ compiler on a CPU.*install g\\+\\+"):
        compile_layers(small_flow())
