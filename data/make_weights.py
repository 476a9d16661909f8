#!/usr/bin/env python3
"""Copy trained models to where the chapters load them from.

Usage: make_weights.py RUN [--to NAME]    a pair (RUN/forward, RUN/reverse), as `bitflow demo` and `bitflow reproduce` leave it, to NAME/, in bfloat16;
                                          NAME is mnist-mini unless another is given
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
    ap.add_argument("--to", default="mnist-mini", help="folder name below data/")
    args = ap.parse_args()
    if not (args.run / "forward").is_dir():
        return store(args.run, HERE / args.to, None)
    for name in ("forward", "reverse"):
        store(args.run / name, HERE / args.to / name, torch.bfloat16)


if __name__ == "__main__":
    main()
