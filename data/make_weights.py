#!/usr/bin/env python3
"""Copy the trained models of a demo into mnist-mini/, in bfloat16: the chapters load them from there.

Usage: make_weights.py RUN      (RUN holds forward/ and reverse/, as `bitflow demo` leaves them)
"""
import argparse
from pathlib import Path

import torch

from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.tarflow import TARFlow
from bitflow_edu.training import load_model, save_model


def main():
    """Load each model, store it smaller, print its size."""
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("run", type=Path)
    ap.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "mnist-mini")
    args = ap.parse_args()
    for name, kind in (("forward", TARFlow), ("reverse", ReverseModel)):
        folder = args.out / name
        save_model(load_model(args.run / name, kind), folder, dtype=torch.bfloat16)
        print(f"{folder}: {(folder / 'model.safetensors').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
