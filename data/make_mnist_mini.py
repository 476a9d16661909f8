#!/usr/bin/env python3
"""Make mnist-mini.npz: of the official MNIST, the first 1,000 train and 200 test images of a digit.

Usage: make_mnist_mini.py MNIST_ROOT [--out mnist-mini.npz]

MNIST_ROOT holds MNIST/raw, as torchvision lays it out.
"""

import argparse
from pathlib import Path

import numpy as np
from torchvision.datasets import MNIST


def class_balanced(labels, per_class):
    """Indices of the first `per_class` images of every class, in the official order."""
    chosen = [np.flatnonzero(labels == digit)[:per_class] for digit in range(10)]
    return np.sort(np.concatenate(chosen))


def split(root, train, per_class):
    """Pixels (N, 28, 28) uint8, labels (N,) uint8, official indices (N,) of a balanced split."""
    official = MNIST(root, train=train, download=False)
    images, labels = official.data.numpy(), official.targets.numpy()
    index = class_balanced(labels, per_class)
    return images[index], labels[index].astype(np.uint8), index.astype(np.int32)


def main():
    """Write the archive and print what is in it."""
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("root", type=Path)
    ap.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "mnist-mini.npz")
    args = ap.parse_args()
    arrays = {}
    for name, train, per_class in (("train", True, 1000), ("test", False, 200)):
        images, labels, index = split(args.root, train, per_class)
        arrays |= {f"{name}_images": images, f"{name}_labels": labels, f"{name}_index": index}
    np.savez_compressed(args.out, **arrays)
    counts = f"{len(arrays['train_labels'])} train and {len(arrays['test_labels'])} test images"
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, {counts}")


if __name__ == "__main__":
    main()
