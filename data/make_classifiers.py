#!/usr/bin/env python3
"""Train the two digit networks that come with the course, and write their weights here.

mnist-cnn       the judge: labels samples and gives the features of FD[mnist-cnn];
                trained on the official MNIST training images
mnist-features  the teacher: its features are the perceptual distance that trains G;
                trained on the training images of mnist-mini

Usage: make_classifiers.py mnist-cnn|mnist-features [--data-root ROOT] [--steps N] [--out FOLDER]
       make_classifiers.py measure [--data-root ROOT]
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as nnf

from bitflow_edu.data import load_data
from bitflow_edu.distances import FeatureNet, FeatureNetConfig, load_feature_net
from bitflow_edu.evaluation import (
    Classifier,
    ClassifierConfig,
    accuracy,
    classifier_loss,
    load_classifier,
)
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.models import save_model
from bitflow_edu.io.results import measurement, save_results
from bitflow_edu.training import TrainConfig, train

HERE = Path(__file__).resolve().parent


def two_sizes(model, x, c, generator):
    """classifier_loss at 28x28 or 16x16, by the toss of a coin: the features then serve both."""
    if torch.rand(1, generator=generator) < 0.5:
        x = nnf.interpolate(x, size=(16, 16), mode="bilinear", antialias=True)
    return classifier_loss(model, x, c, generator)


COMMON = TrainConfig(
    batch_size=128, lr=2e-3, weight_decay=1e-2, label_dropout=0.0, ema=0.998, checkpoint_every=1000
)
JUDGE = dataclasses.replace(COMMON, steps=5000)
TEACHER = dataclasses.replace(COMMON, steps=3000, seed=1)
FULL, MINI = DataConfig("mnist", 28), DataConfig("mnist-mini", 28)
RECIPES = {  # class, its config, loss, data, training
    "mnist-cnn": (Classifier, ClassifierConfig, classifier_loss, FULL, JUDGE),
    "mnist-features": (FeatureNet, FeatureNetConfig, two_sizes, MINI, TEACHER),
}


def measure(data_root, results):
    """Accuracy of the stored networks on test images, at both sizes, into classifiers.json."""
    start, found = time.perf_counter(), []
    nets = {"mnist-cnn": load_classifier(), "mnist-features": load_feature_net()}
    for source, side in (("mnist", 28), ("mnist", 16), ("mnist-mini", 28), ("mnist-mini", 16)):
        test, size = load_data(DataConfig(source, side), "test", data_root), f"{side}x{side}"
        for name, net in nets.items():
            value, more = accuracy(net, test.x, test.labels), dict(data=source, size=size)
            found.append(measurement(name, "label_accuracy", value, n=len(test), **more))
            print(f"{name:15s} {value:.4f} of {len(test)} test images of {source} at {size}")
    recipes = {name: dataclasses.asdict(cfg) for name, (*_, cfg) in RECIPES.items()}
    names, command = ", ".join(RECIPES), "data/make_classifiers.py measure"
    seconds = time.perf_counter() - start
    save_results(results, "classifiers", names, command, recipes, found, seconds)


def main():
    """Train one network and store it, or measure those that are stored."""
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("name", choices=[*RECIPES, "measure"])
    ap.add_argument("--data-root")
    ap.add_argument("--steps", type=int)
    ap.add_argument("--out", type=Path, default=HERE)
    args = ap.parse_args()
    if args.name == "measure":
        return measure(args.data_root, HERE.parent / "results")
    kind, config, loss, data, cfg = RECIPES[args.name]
    cfg = dataclasses.replace(cfg, steps=args.steps or cfg.steps)
    torch.manual_seed(cfg.seed)
    with tempfile.TemporaryDirectory() as run:
        net = train(kind(config()), loss, load_data(data, "train", args.data_root), cfg, Path(run))
    save_model(net, args.out / args.name, dtype=torch.float16)


if __name__ == "__main__":
    main()
