#!/usr/bin/env python3
"""Train F and G with the code of an earlier commit and with this one, and count what differs.

Usage: same_bits.py COMMIT [--steps 200] [--preset mnist-mini] [--results DIR]
Compares what both wrote, bit for bit: weights, moments of the optimiser, averages, and the logged
losses and norms. Writes results/same-bits-<preset>.json; ends with code 1 where a bit differs.
"""

import argparse
import os
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


def train(code: Path, out: Path, preset: str, steps: int):
    """F and G, by the code in a folder, on one thread."""
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    for part, words in PARTS.items():
        command = [sys.executable, "-m", "bitflow_edu.cli", "train", *words, "--preset", preset]
        command += ["--steps", str(steps), "--device", "cpu", "--out", part]
        subprocess.run(command, cwd=out, env=environment, check=True, capture_output=True)


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
        for name, code in (("before", home / "code"), ("after", ROOT)):
            (home / name).mkdir()
            train(code, home / name, args.preset, args.steps)
        for part in PARTS:
            lines += compared(part, stored(home / "before" / part), stored(home / "after" / part))
    command = f"python tests/same_bits.py {args.commit} --steps {args.steps} --preset {args.preset}"
    config = {"before": args.commit, "steps": args.steps, "seed": 0}
    name, wall_s = f"same-bits-{args.preset}", time.perf_counter() - start
    print(save_results(Path(args.results), name, args.preset, command, config, lines, wall_s))
    return int(any(m["metric"] == "differing_values" and m["value"] for m in lines))


if __name__ == "__main__":
    sys.exit(main())
