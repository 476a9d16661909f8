#!/usr/bin/env python3
"""Copy trained models to where the lessons load them from.

Usage:
    make_weights.py RUN --to NAME --results FILE
        a pair (RUN/forward, RUN/reverse), as `bitflow demo` and `bitflow reproduce` leave it,
        to NAME/, in bfloat16, with a card made from the results file that was measured on it
    make_weights.py RUN --to NAME --results FILE --small
        the same with matrices as 8-bit integers, in half the room: for pictures, not for numbers
    make_weights.py RUN --to NAME
        a flow alone, as `bitflow train forward` leaves it, to NAME/, in float16
"""

import argparse
from pathlib import Path

import torch

from bitflow_edu.cli.describe import load_any
from bitflow_edu.io.models import save_model
from bitflow_edu.io.results import load_result
from bitflow_edu.lab.hub import Pair, save_pretrained
from bitflow_edu.lab.model_card import model_card

HERE = Path(__file__).resolve().parent


def main():
    """A pair, or a flow alone."""
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("run", type=Path)
    ap.add_argument("--to", required=True, help="folder name below data/")
    ap.add_argument("--results", type=Path, help="results file of the pair, for its card")
    ap.add_argument("--small", action="store_true", help="a pair's matrices as 8-bit integers")
    args = ap.parse_args()
    folder = HERE / args.to
    if (args.run / "forward").is_dir():
        if not args.results:
            ap.error("a pair needs --results, for its model card")
        pair = Pair(*(load_any(args.run / name, "cpu") for name in ("forward", "reverse")))
        card = model_card(load_result(args.results.stem, args.results.parent), pair)
        save_pretrained(pair, folder, torch.bfloat16, card, overwrite=True)
        if args.small:
            for part in ("forward", "reverse"):
                save_model(getattr(pair, part), folder / part, dtype=torch.int8)
    else:
        save_model(load_any(args.run, "cpu"), folder, dtype=torch.float16)
    for path in folder.rglob("model.safetensors"):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
