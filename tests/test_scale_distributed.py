"""Many processes (gloo, on the CPU): the same numbers as one, a lost process, whole results."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bitflow_edu.inverse_strategies import hidden_alignment, naive_distillation, reverse_loss
from bitflow_edu.io.checkpoints import read_metrics, read_state
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.locks import LOCK
from bitflow_edu.io.models import newest_checkpoint
from bitflow_edu.io.processes import SINGLE_PROCESS, SingleProcess
from bitflow_edu.scale.distributed import (
    Distributed,
    LossModule,
    can_shard,
    find_processes,
    leaves_unused,
    lost_contact,
)
from bitflow_edu.tarflow import forward_loss
from bitflow_edu.training import TrainConfig, check_shares, own_turns, train
from bitflow_edu.transformer import compile_layers
from conftest import small_flow, small_reverse

pytest.importorskip("accelerate")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SIX = (
    "--train-forward.batch-size 24 --train-forward.num-microbatches 6 "
    "--train-forward.precision fp32 --train-forward.log-every 1"
).split()
FORWARD = "train forward --preset mnist-mini-smoke --device cpu --steps 12".split()
FORWARD += ["--train-forward.checkpoint-every", "8", *SIX]
NEEDS_SHARDS = pytest.mark.skipif(
    not can_shard("cpu"), reason=f"FSDP2 on a CPU needs PyTorch 2.7, this is {torch.__version__}"
)
SHARDINGS = ("none", pytest.param("full", marks=NEEDS_SHARDS))
FIVE = [word.replace("24", "25") if word != "6" else "5" for word in FORWARD]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def start(n, *words):
    """The command on n processes, one of them without torchrun."""
    launcher = [sys.executable] if n == 1 else [*TORCHRUN, f"--nproc-per-node={n}"]
    command = [*launcher, "-m", "bitflow_edu.cli", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=ENV, text=True, **pipes)


def run(n, *words):
    """The same, waited for: its output. Where a process died of a fault in native code (gloo's
    threads have corrupted the heap once in some hundred runs), the command goes on as users let it,
    and must come to the same numbers."""
    process = start(n, *words)
    out, _ = process.communicate(timeout=240)
    if process.returncode and n > 1 and re.search(r"SIGABRT|SIGSEGV", out):
        process = start(n, *words, *([] if "--resume" in words else ["--resume"]))
        out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-3000:]
    return out


def losses(folder):
    return torch.tensor([m["loss"] for m in read_metrics(folder / "metrics.jsonl")])


def weights(folder):
    """All tensors of the newest checkpoint: averages, weights and moments."""
    saved = read_state(newest_checkpoint(folder))
    averaged = {f"averaged.{k}": v for k, v in saved["averaged"].items()}
    return {**averaged, **saved["training"]}, saved["step"]


def assert_same_run(a, b, within=1e-7):
    """Loss curves agree to 1e-7 (of losses above 1, relatively: float32 has no more digits), and
    weights as far as rounding lets Adam's division agree."""
    assert losses(a).shape == losses(b).shape
    off = (losses(a) - losses(b)).abs() / losses(a).abs().clamp(min=1)
    assert off.max() < within, off
    (one, step), (other, same) = weights(a), weights(b)
    assert step == same and one.keys() == other.keys()
    for name in one:
        if not name.startswith("adam"):
            assert torch.allclose(one[name], other[name], atol=2e-4, rtol=1e-2), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process that the others are compared with."""
    folder = tmp_path_factory.mktemp("alone") / "f"
    run(1, *FORWARD, "--out", folder)
    return folder


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_same_run_on_more_processes(alone, tmp_path, sharding):
    """Six microbatches with noise of their own: who computes which does not matter."""
    said = run(2, *FORWARD, "--out", tmp_path / "f", "--sharding", sharding)
    assert_same_run(alone, tmp_path / "f")
    assert said.count("F is in") == 1, "one process speaks"
    assert len((tmp_path / "f" / "starts.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "f" / "samples").exists()


@NEEDS_SHARDS
def test_one_process_alone_can_be_sharded(alone, tmp_path, monkeypatch):
    """On a single GPU the whole path of FSDP2 can be tried, and the run stays the same."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert find_processes() is SINGLE_PROCESS, "nothing to share, nothing to shard"
    words = ["-m", "bitflow_edu.cli", *FORWARD, "--out", tmp_path / "f", "--sharding", "full"]
    command = [*TORCHRUN, "--nproc-per-node=1", *map(str, words)]
    found = subprocess.run(command, env=ENV, text=True, capture_output=True, timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    assert_same_run(alone, tmp_path / "f")


def test_a_lost_process_and_another_number_of_them(alone, tmp_path):
    """One of two is killed: a clear end, a whole checkpoint; three go on from it as one would."""
    folder = tmp_path / "f"
    process = start(2, *FORWARD, "--out", folder)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=100)
    assert process.returncode != 0 and "exitcode  : -9" in said
    # the other process notices by itself, or is stopped first
    stopped = "Signal 15" in said or "via 15, forcefully exiting via 9" in said
    assert "go on with --resume" in said or stopped, said[-3000:]
    assert newest_checkpoint(folder).name < "step-00000012", "it was killed on the way"
    sharding = "full" if can_shard("cpu") else "none"
    run(3, *FORWARD, "--out", folder, "--resume", "--sharding", sharding)
    assert_same_run(alone, folder)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_pieces_that_do_not_divide(tmp_path, sharding):
    """Five microbatches on three; one is killed, two go on, then one: the curve of one."""
    one, folder = tmp_path / "one", tmp_path / "f"
    run(1, *FIVE, "--out", one)
    process = start(3, *FIVE, "--out", folder, "--sharding", sharding)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(workers_of(process)[2], signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0 and newest_checkpoint(folder).name < "step-00000012"
    run(2, *FIVE, "--out", folder, "--resume", "--sharding", sharding)
    assert_same_run(one, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    run(1, *FIVE, "--out", folder, "--resume")
    assert_same_run(one, folder)


@NEEDS_SHARDS
def test_a_replica_on_each_node(alone, tmp_path, monkeypatch):
    """Two pretended nodes of two processes: shards within a node, gradients between them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif 'RANK' in os.environ: os.environ['LOCAL_WORLD_SIZE'] = '2'\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setitem(ENV, "PYTHONPATH", path)
    run(4, *FORWARD, "--out", tmp_path / "f", "--sharding", "hybrid")
    assert_same_run(alone, tmp_path / "f")


@NEEDS_SHARDS
def test_shards_are_gathered_in_bf16_where_products_are(tmp_path):
    """The curve of one process in bf16, within bf16's own rounding."""
    words = [word if word != "fp32" else "bf16" for word in FORWARD]
    words += ["--forward.transformer.norm", "rms"]  # LayerNorm's kernel on a CPU takes no bf16
    run(1, *words, "--out", tmp_path / "one")
    run(2, *words, "--out", tmp_path / "two", "--sharding", "full")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert (one - two)[:2].abs().max() < 1e-5, "rounded for the product, as in autocast"
    assert 0 < (one - two).abs().max() < 5e-3, "then gradients in bf16 lead a little apart"


def workers_of(process):
    """The processes that torchrun started, by rank."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    ranks = {}
    for worker in found.stdout.split():
        for word in Path(f"/proc/{worker}/environ").read_bytes().split(b"\0"):
            if word.startswith(b"RANK="):
                ranks[int(word[5:])] = int(worker)
    return ranks


@NEEDS_SHARDS
def test_a_signal_to_one_process_stops_all_after_the_same_step(alone, tmp_path):
    """Only the second of two is sent SIGTERM: both save one step, and one goes on from it."""
    folder = tmp_path / "f"
    process = start(2, *FORWARD, "--out", folder, "--sharding", "full")
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(workers_of(process)[1], signal.SIGTERM)
    said, _ = process.communicate(timeout=100)
    assert "stopped by SIGTERM; step" in said and "go on with --resume" in said, said[-3000:]
    assert process.returncode != 0 and not (folder / LOCK).exists()
    run(1, *FORWARD, "--out", folder, "--resume")
    assert_same_run(alone, folder)


@NEEDS_SHARDS
def test_sharded_weights_go_on_alone(alone, tmp_path):
    """A checkpoint knows nothing of the number of processes that wrote it."""
    folder = tmp_path / "f"
    run(2, *FORWARD, "--out", folder, "--sharding", "full")
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    run(1, *FORWARD, "--out", folder, "--resume")
    assert_same_run(alone, folder)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_second_stage_on_three_processes(alone, tmp_path, sharding):
    """Guidance runs G through `run_blocks`, twice a step, not `forward`: all weights are seen.
    Five microbatches, so that one process takes fewer."""
    words = "train reverse --preset mnist-mini-smoke --device cpu --steps 4".split()
    words += ["--forward", alone, "--reverse.max-guidance", "3"]
    five = FIVE[FIVE.index("--train-forward.batch-size") :]
    words += [w.replace("train-forward", "train-reverse") for w in five]
    run(1, *words, "--out", tmp_path / "one")
    run(3, *words, "--out", tmp_path / "three", "--sharding", sharding)
    assert_same_run(tmp_path / "one", tmp_path / "three")


COMPILED = """
import sys
import torch.nn as nn
from bitflow_edu.cli.main import main
from bitflow_edu.scale.distributed import end
from bitflow_edu.transformer import Layer
Layer.compile = lambda layer: nn.Module.compile(layer, backend="eager")  # traced, and not built
end(main(sys.argv[1:]))  # as the command does
"""


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_compiled_layers_on_two_processes(alone, tmp_path, sharding):
    """As on a node of GPUs, with the layers' insides computed again in the backward pass."""
    (tmp_path / "s.py").write_text(COMPILED)
    switches = [f"--train-forward.{name}" for name in ("compile", "activation-checkpointing")]
    words = [*FORWARD, switches[0], "True", switches[1], "True"]
    words = [tmp_path / "s.py", *words, "--out", tmp_path / "f", "--sharding", sharding]
    command = [*TORCHRUN, "--nproc-per-node=2", *map(str, words)]
    found = subprocess.run(command, env=ENV, text=True, capture_output=True, timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    assert_same_run(alone, tmp_path / "f")


SCRIPT = """
import sys, torch
from bitflow_edu.io.files import BitflowError
from bitflow_edu.scale.distributed import end, find_processes, together
processes = find_processes("cpu")
mine = torch.arange(7)[processes.rank::processes.size].double()
assert processes.all_gather(mine).tolist() == [0, 2, 4, 6, 1, 3, 5]
assert processes.all_reduce_mean([processes.rank, torch.tensor(2.0)]) == [0.5, 2.0]
assert processes.broadcast(f"from {processes.rank}") == "from 0"
assert processes.on_rank_zero(lambda: 5) == (5 if processes.main else None)
def full():
    raise BitflowError("the disk is full")
try:
    processes.on_rank_zero(full)
except BitflowError as e:
    print(f"process {processes.rank}: {e}", flush=True)
processes.barrier()
together()
end(0)
"""


def test_what_processes_tell_each_other(tmp_path):
    """Sums, means, lists in order; and a mistake of the main process is everybody's."""
    (tmp_path / "s.py").write_text(SCRIPT)
    command = [*TORCHRUN, "--nproc-per-node=2", tmp_path / "s.py"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):  # each, once, though perhaps on one line
        assert done.stdout.count(f"process {rank}: the disk is full") == 1


READING = """
import re, sys, torch
from bitflow_edu.io.checkpoints import read_state, restore, save_checkpoint
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build
from bitflow_edu.scale.distributed import distribute_parameters, end, find_processes
from bitflow_edu.training import TrainConfig, new_state
from torch.distributed.device_mesh import init_device_mesh
from pathlib import Path

class Wide(torch.nn.Module):
    Config = None
    def __init__(self, cfg=None):
        super().__init__()
        self.cfg = cfg or TrainConfig()
        self.big = torch.nn.Parameter(torch.randn(4096, 2048))
        self.odd = torch.nn.Parameter(torch.randn(1))  # the second process keeps nothing of it

def state_of(processes, seed):
    torch.manual_seed(seed)
    model, averaged = Wide(), Wide()
    mesh = init_device_mesh("cpu", (2,))
    for part in (model, averaged):
        distribute_parameters(part, mesh)
    state = new_state(model.requires_grad_(True), TrainConfig(), averaged, processes)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    return state

def mapped():
    return int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

processes = find_processes("cpu", "full")
run = Path(sys.argv[1])
first = state_of(processes, seed=0)
folder = processes.broadcast(save_checkpoint(first, run))
second = state_of(processes, seed=1)
for _ in range(2):  # the first time code is loaded, too
    before = mapped()
    saved = read_state(folder)
    second.load_state_dict(saved, folder)
    grown = mapped() - before
    del saved
def all_of(state):
    for part in (state.model, state.averaged):
        yield from part.parameters()
    for p in state.model.parameters():
        yield from (state.optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq"))

pairs = zip(all_of(first), all_of(second))
same = all([torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs])
print(f"process {processes.rank}: {grown:.1f} MB of 128, {same}", flush=True)
processes.barrier()
saved = read_state(folder)
saved["training"]["adam.exp_avg_sq.big"][-1, -1] = -1.0  # in the rows of the second process
try:
    second.load_state_dict(saved, folder)
except BitflowError as e:
    print(f"process {processes.rank} refuses: {e}", flush=True)
processes.barrier()
end(0)
"""


@NEEDS_SHARDS
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_each_process_reads_its_part_of_a_checkpoint(tmp_path):
    """Of a mapped file only own rows are touched; damage in one part is everybody's."""
    (tmp_path / "s.py").write_text(READING)
    command = [*TORCHRUN, "--nproc-per-node=2", tmp_path / "s.py", tmp_path / "run"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    read = re.findall(r"process \d: ([\d.]+) MB of 128, True", done.stdout)
    assert len(read) == 2 and all(60 < float(mb) < 80 for mb in read), done.stdout
    assert done.stdout.count("adam.exp_avg_sq.big holds") == 1
    assert done.stdout.count("another process found damage") == 1


def test_weights_without_a_gradient_are_found_once():
    """Naive distillation leaves the projections of G alone, hidden alignment uses all weights."""
    F, G = small_flow(), small_reverse(small_flow())
    x, c = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, -1])
    for strategy, unused in ((naive_distillation, True), (hidden_alignment, False)):
        generator = torch.Generator().manual_seed(1)
        module = LossModule(G, reverse_loss(F, strategy))
        assert leaves_unused(module, (x, c, generator)) == unused, strategy
        assert all(p.grad is None for p in G.parameters())
        fresh = torch.Generator().manual_seed(1)
        assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=fresh))


def test_mistakes(monkeypatch):
    """An unknown sharding; microbatches that cannot be shared; errors that are no lost contact."""
    lost = RuntimeError("Connection closed by peer [127.0.0.1]")
    with pytest.raises(BitflowError, match="'half'.*none.*full.*hybrid"):
        find_processes("cpu", "half")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_processes("cpu", "full") is SINGLE_PROCESS and lost_contact(lost) is None
    monkeypatch.setenv("WORLD_SIZE", "3")
    with monkeypatch.context() as before_2_7:
        before_2_7.delattr(torch.cpu.Stream, "record_event", raising=False)
        with pytest.raises(BitflowError, match=f"CPU.*2.7.*{re.escape(torch.__version__)}.*none"):
            find_processes("cpu", "full")
    assert "lost contact" in lost_contact(lost)
    assert lost_contact(RuntimeError("shapes differ")) is None

    class Three(SingleProcess):
        size = 3

    assert own_turns(TrainConfig(num_microbatches=4), Three()) == [(0, True), (3, True)]
    with pytest.raises(BitflowError, match="2 microbatches.* 3 processes; .*num_microbatches"):
        check_shares(TrainConfig(num_microbatches=2), Three())
    with pytest.raises(BitflowError, match="64 .*6 .*microbatches"):
        TrainConfig(num_microbatches=6)


def trained(cfg, data, folder):
    """A small flow, always from the same start."""
    torch.manual_seed(0)
    flow = small_flow(side=8, patch=2, num_classes=10).train()
    return train(flow, forward_loss, data, cfg, folder)


def test_microbatches_and_checkpointing_change_no_gradient(tmp_path, digits):
    """Recomputed layers give the same weights; microbatches have other noise, of the same size."""
    cfg = TrainConfig(steps=3, batch_size=12, precision="fp32", checkpoint_every=6)
    configs = {"plain": cfg, "again": replace(cfg, activation_checkpointing=True)}
    configs["three"] = replace(cfg, num_microbatches=3)
    made = {name: trained(c, digits[:40], tmp_path / name) for name, c in configs.items()}
    plain, again, three = (torch.cat([p.flatten() for p in m.parameters()]) for m in made.values())
    assert torch.equal(plain, again) and not torch.equal(plain, three)
    assert (plain - three).abs().max() < 0.05


def test_the_whole_path_to_imagenet_on_two_processes(tmp_path):
    """Pictures → latents → F → G (sharded) → metrics of n samples → pictures, on two processes."""
    pytest.importorskip("diffusers")
    from bitflow_edu.scale.autoencoder import tiny_vae
    from bitflow_edu.scale.image_sources import synthetic_images

    images, latents, vae = tmp_path / "images", tmp_path / "latents", tiny_vae(tmp_path / "vae")
    f, g, vae_on_cpu = tmp_path / "f", tmp_path / "g", ["--vae", vae, "--device", "cpu"]
    cache = ["cache-latents", "--source", images, "--image-size", 16, "--per-shard", 16]
    for split, n in (("train", 80), ("test", 30)):
        synthetic_images(images, n, split)
        run(2, *cache, "--split", split, "--out", latents, *vae_on_cpu)
    data = ["--preset", "imagenet256-b2-smoke", "--device", "cpu", "--data-root", latents]
    run(2, "train", "forward", *data, "--steps", 4, "--out", f)
    reverse = ["train", "reverse", *data, "--steps", 4, "--forward", f]
    run(2, *reverse, "--out", g, "--sharding", "full" if can_shard("cpu") else "none")
    evaluate = ["evaluate", *data, "--forward", f, "--reverse", g, "--vae", vae, "--images", 25]
    evaluate += ["--features", "effnet-lite0", "--rows", "one-pass", "--no-timing"]
    run(2, *evaluate, "--work", tmp_path / "work", "--out", tmp_path / "e.json")
    lines = json.loads((tmp_path / "e.json").read_text())["measurements"]
    found = {m["metric"]: m for m in lines}["fd[effnet-lite0]"]
    assert found["n"] == 25 and 0 < found["value"] < 1e4 and (tmp_path / "e.png").exists()
    run(2, "sample", "--checkpoint", g, "--images", 20, "--out", tmp_path / "s.png", *vae_on_cpu)
    width = Image.open(tmp_path / "s.png").size[0]
    assert width > 10 * 16, "ten pictures of 16 pixels side by side, decoded"


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="torch.compile needs a C++ compiler here",
)
def test_compiled_layers_train_the_same_model(tmp_path, digits):
    """The same weights up to rounding, under the same names; the averaged model is ordinary."""
    cfg = TrainConfig(steps=2, batch_size=8, precision="fp32", checkpoint_every=4)
    plain, compiled = (
        trained(replace(cfg, compile=yes), digits[:20], tmp_path / str(yes)).state_dict()
        for yes in (False, True)
    )
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[k], compiled[k], atol=1e-4) for k in plain)


def test_compiling_without_a_compiler_says_what_to_install(monkeypatch):
    """A CPU without g++ is told so, and not shown a page of traceback."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BitflowError, match="C\\+\\+ compiler.*g\\+\\+"):
        compile_layers(small_flow())


def test_a_flow_that_sets_itself_up_is_not_sharded():
    """FSDP would put back the weights that the first batch has set."""
    flow, many = small_flow(logit_alpha=1e-3), SimpleNamespace(sharding="full")
    with pytest.raises(BitflowError, match="choose sharding none"):
        Distributed.prepare(many, flow, None, forward_loss)
