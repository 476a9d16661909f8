#!/usr/bin/env python3
"""Train the two digit networks that come with the course, and write their weights here.

mnist-cnn       the judge: labels samples and gives the features of FD[mnist-cnn]; official MNIST training images
mnist-features  the teacher: its features are the perceptual distance that trains G; training images of mnist-mini

Usage: make_classifiers.py mnist-cnn|mnist-features [--data-root ROOT] [--steps N] [--out FOLDER]
"""
import argparse
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as nnf

from bitflow_edu.data import DataConfig, load_data
from bitflow_edu.distances import FeatureNet, FeatureNetConfig
from bitflow_edu.evaluation import Classifier, ClassifierConfig, accuracy, classifier_loss
from bitflow_edu.training import TrainConfig, save_model, train



def two_sizes(model, x, c, generator):
    """classifier_loss at 28x28 or 16x16, by the toss of a coin: the features then serve both."""
    if torch.rand(1, generator=generator) < 0.5:
        x = nnf.interpolate(x, size=(16, 16), mode="bilinear", antialias=True)
    return classifier_loss(model, x, c, generator)


RECIPES = {
    "mnist-cnn": (lambda: Classifier(ClassifierConfig()), classifier_loss, DataConfig("mnist", 28), TrainConfig(
        steps=5000, batch_size=128, lr=2e-3, weight_decay=1e-2, label_dropout=0.0, ema=0.998, checkpoint_every=1000)),
    "mnist-features": (lambda: FeatureNet(FeatureNetConfig()), two_sizes, DataConfig("mnist-mini", 28), TrainConfig(
        steps=3000, batch_size=128, lr=2e-3, weight_decay=1e-2, label_dropout=0.0, ema=0.998, seed=1, checkpoint_every=1000)),
}


def main():
    """Train one network, print its accuracy on test images at both sizes, store it."""
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("name", choices=RECIPES)
    ap.add_argument("--data-root")
    ap.add_argument("--steps", type=int)
    ap.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    args = ap.parse_args()
    build, loss, data, cfg = RECIPES[args.name]
    if args.steps:
        cfg = TrainConfig(**{**vars(cfg), "steps": args.steps})
    torch.manual_seed(cfg.seed)
    run = Path(tempfile.mkdtemp())
    net = train(build(), loss, load_data(data, "train", args.data_root), cfg, run)
    for name, size in sorted({(data.name, 28), (data.name, 16), ("mnist-mini", 16)}):
        test = load_data(DataConfig(name, size), "test", args.data_root)
        print(f"{args.name}: accuracy on {len(test)} test images of {name} at {size}x{size}: {accuracy(net, test.x, test.labels):.4f}")
    save_model(net, args.out / args.name, dtype=torch.float16)
    shutil.rmtree(run)


if __name__ == "__main__":
    main()
