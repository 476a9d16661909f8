#!/usr/bin/env python3
"""Copy trained models to where the chapters load them from.

Usage: make_weights.py RUN                a pair, as `bitflow demo` leaves it (RUN/forward, RUN/reverse), to mnist-mini/, in bfloat16
       make_weights.py RUN --to NAME      a flow alone, as `bitflow train forward` leaves it, to NAME/, in float32
"""
import argparse
from pathlib import Path

import torch

from bitflow_edu.cli import load_any
from bitflow_edu.training import save_model

HERE = Path(__file__).resolve().parent


def store(run, folder, dtype):
    """Load a model, store it, print its size."""
    save_model(load_any(run, "cpu"), folder, dtype=dtype)
    print(f"{folder}: {(folder / 'model.safetensors').stat().st_size:,} bytes")


def main():
    """A pair, or a flow alone."""
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("run", type=Path)
    ap.add_argument("--to", help="folder name below data/, for a flow alone")
    args = ap.parse_args()
    if args.to:
        return store(args.run, HERE / args.to, None)
    for name in ("forward", "reverse"):
        store(args.run / name, HERE / "mnist-mini" / name, torch.bfloat16)


if __name__ == "__main__":
    main()
