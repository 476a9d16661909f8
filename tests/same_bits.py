#!/usr/bin/env python3
"""Train F and G with the code of an earlier commit and with this one, and count what differs.

Usage: same_bits.py COMMIT [--steps 200] [--preset mnist-mini] [--results DIR]
Compares what both wrote, bit for bit: weights, moments of the optimiser, averages, and the logged
losses and norms. Beside it stand the seconds of a step, which both take in turns, and how many
values a step reads, each of which a GPU would wait for.
Writes results/same-bits-<preset>.json; ends with code 1 where a bit differs.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from bitflow_edu.io.checkpoints import read_metrics
from bitflow_edu.io.results import measurement, save_results

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"F": ("forward",), "G": ("reverse", "--forward", "F")}


LOOK_AS_ON_A_GPU = """
import contextlib, importlib, sys
from torch.utils._python_dispatch import TorchDispatchMode
from bitflow_edu.cli.main import main
from bitflow_edu.io import progress

class Reads(TorchDispatchMode):
    count, counts = 0, True
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += self.counts and func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
reads = Reads()
for name in ("bijections", "coupling", "neighbours", "io.checks"):  # free on a CPU alone
    with contextlib.suppress(ImportError):  # younger than this code
        module = importlib.import_module(f"bitflow_edu.{name}")
        for look in {"free_to_read", "may_read"} & set(vars(module)):
            setattr(module, look, lambda t: False)
settle = getattr(getattr(progress, "FiniteCheck", None), "settle", None)
def later(self):  # a step later: the number has arrived
    reads.counts = False
    settle(self)
    reads.counts = True
if settle:
    progress.FiniteCheck.settle = later
with reads:
    main(sys.argv[1:])
print(f"reads: {reads.count}")
"""


def train(code: Path, out: Path, preset: str, steps: int, parts=PARTS, program=(), more=()):
    """F and G, by the code in a folder, on one thread: what the last command said."""
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    for part, words in parts.items():
        command = [sys.executable, *(program or ("-m", "bitflow_edu.cli"))]
        command += ["train", *words, "--preset", preset, *more]
        command += ["--steps", str(steps), "--device", "cpu", "--out", part]
        done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
    return done.stdout


def own(part: str, field: str) -> str:
    """The option of a training's field."""
    return f"--train-{'forward' if part == 'F' else 'reverse'}.{field}"


def alone(code: Path, home: Path, preset: str, steps: int, part: str, more: tuple, program=()):
    """One part in a fresh folder, G on the F that `home` holds: what the command said."""
    out = home / "alone"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    words = [str(home / word) if word == "F" else word for word in PARTS[part]]
    return train(code, out, preset, steps, {part: words}, program, more)


def reads_per_step(code: Path, home: Path, preset: str, part: str) -> float:
    """Values that a step reads where it logs nothing: 12 steps and 2, and their difference."""
    seldom, counts = (own(part, "log-every"), "1000"), []
    for steps in (2, 12):
        said = alone(code, home, preset, steps, part, seldom, ("-c", LOOK_AS_ON_A_GPU))
        counts.append(int(said.rpartition("reads: ")[2]))
    return (counts[1] - counts[0]) / 10


def step_times(codes: dict, home: Path, preset: str, part: str, repeats: int = 5) -> dict:
    """Milliseconds of a step by each code, in turns, without the first 20 steps."""
    found, slow = {name: [] for name in codes}, (own(part, "lr"), "1e-5")  # for a warm-up so short
    for _ in range(repeats):
        for name, code in codes.items():
            alone(code, home / name, preset, 60, part, slow)
            log = read_metrics(home / name / "alone" / part / "metrics.jsonl")
            lines = {m["step"]: m["seconds"] for m in log}
            found[name].append(1000 * (lines[60] - lines[20]) / 40)
    return found


def costs_of(part: str, codes: dict, home: Path, preset: str) -> list:
    """The lines of what a step reads, and takes."""
    found, times = [], step_times(codes, home, preset, part)
    for name, code in codes.items():
        row, ms = f"{part}, {name}", times[name]
        reads = reads_per_step(code, home / name, preset, part)
        found.append(measurement(row, "reads", reads))
        low, high = min(ms), max(ms)
        median = statistics.median(ms)
        found.append(measurement(row, "step_ms", median, "ms", len(ms), low=low, high=high))
    ratios = [a / b for a, b in zip(times["after"], times["before"], strict=True)]
    more = dict(low=min(ratios), high=max(ratios))
    row = f"{part}, after / before"
    return found + [measurement(row, "step_ms", statistics.median(ratios), n=len(ratios), **more)]


def stored(run: Path) -> dict:
    """Every tensor of a training's checkpoints, and every logged number, by name."""
    found = {}
    for path in sorted(run.rglob("*.safetensors")):
        tensors = load_file(path).items()
        found |= {f"{path.relative_to(run)} {name}": x for name, x in tensors}
    for i, line in enumerate(read_metrics(run / "metrics.jsonl")):
        line.pop("seconds")
        found |= {f"line {i} {k}": torch.tensor(v, dtype=torch.float64) for k, v in line.items()}
    return found


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many values of two tensors are not the same bits."""
    one, other = (x.contiguous().view(-1, 1).view(torch.uint8) for x in (a, b))
    return int((one != other).any(dim=1).sum())


def compared(part: str, before: dict, after: dict) -> list:
    """The lines of a part: how many values there are, and how many differ."""
    if set(before) != set(after):
        sys.exit(f"{part}: only one of both has {sorted(set(before) ^ set(after))[:5]}")
    count = sum(x.numel() for x in before.values())
    found = sum(differing(x, after[name]) for name, x in before.items())
    return [measurement(part, "values", count), measurement(part, "differing_values", found)]


def main():
    """Write the results file; the exit code tells whether all bits are the same."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("commit", help="of the earlier code")
    p.add_argument("--steps", type=int, default=200, help="of F, and of G")
    p.add_argument("--preset", default="mnist-mini")
    p.add_argument("--results", default=str(ROOT / "results"), help="where the file goes")
    args = p.parse_args()
    start, lines = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        subprocess.run(["git", "clone", "-q", "--no-local", ROOT, home / "code"], check=True)
        subprocess.run(["git", "checkout", "-q", args.commit], cwd=home / "code", check=True)
        codes = {"before": home / "code", "after": ROOT}
        for name, code in codes.items():
            (home / name).mkdir()
            train(code, home / name, args.preset, args.steps)
        for part in PARTS:
            lines += compared(part, stored(home / "before" / part), stored(home / "after" / part))
            lines += costs_of(part, codes, home, args.preset)
    command = f"python tests/same_bits.py {args.commit} --steps {args.steps} --preset {args.preset}"
    config = {"before": args.commit, "steps": args.steps, "seed": 0}
    name, wall_s = f"same-bits-{args.preset}", time.perf_counter() - start
    print(save_results(Path(args.results), name, args.preset, command, config, lines, wall_s))
    return int(any(m["metric"] == "differing_values" and m["value"] for m in lines))


if __name__ == "__main__":
    sys.exit(main())
