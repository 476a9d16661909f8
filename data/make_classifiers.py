#!/usr/bin/env python3
"""Train the two digit networks that come with the course, and write their weights here.

mnist-cnn       the judge: labels samples and gives the features of FD[mnist-cnn]; official MNIST training images
mnist-features  the teacher: its features are the perceptual distance that trains G; training images of mnist-mini

Usage: make_classifiers.py mnist-cnn|mnist-features|measure [--data-root ROOT] [--steps N] [--out FOLDER]
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as nnf

from bitflow_edu.data import DataConfig, load_data
from bitflow_edu.distances import FeatureNet, FeatureNetConfig, load_feature_net
from bitflow_edu.evaluation import (
    Classifier,
    ClassifierConfig,
    accuracy,
    classifier_loss,
    load_classifier,
    measurement,
    save_results,
)
from bitflow_edu.training import TrainConfig, save_model, train


HERE = Path(__file__).resolve().parent


def two_sizes(model, x, c, generator):
    """classifier_loss at 28x28 or 16x16, by the toss of a coin: the features then serve both."""
    if torch.rand(1, generator=generator) < 0.5:
        x = nnf.interpolate(x, size=(16, 16), mode="bilinear", antialias=True)
    return classifier_loss(model, x, c, generator)


RECIPES = {
    "mnist-cnn": (
        lambda: Classifier(ClassifierConfig()),
        classifier_loss,
        DataConfig("mnist", 28),
        TrainConfig(
            steps=5000,
            batch_size=128,
            lr=2e-3,
            weight_decay=1e-2,
            label_dropout=0.0,
            ema=0.998,
            checkpoint_every=1000,
        ),
    ),
    "mnist-features": (
        lambda: FeatureNet(FeatureNetConfig()),
        two_sizes,
        DataConfig("mnist-mini", 28),
        TrainConfig(
            steps=3000,
            batch_size=128,
            lr=2e-3,
            weight_decay=1e-2,
            label_dropout=0.0,
            ema=0.998,
            seed=1,
            checkpoint_every=1000,
        ),
    ),
}


def measure(data_root, results):
    """Accuracy of the stored networks on test images, at both sizes, into results/classifiers.json."""
    start, found = time.perf_counter(), []
    nets = {"mnist-cnn": load_classifier(), "mnist-features": load_feature_net()}
    for data in (
        DataConfig("mnist", 28),
        DataConfig("mnist", 16),
        DataConfig("mnist-mini", 28),
        DataConfig("mnist-mini", 16),
    ):
        test = load_data(data, "test", data_root)
        for name, net in nets.items():
            size = f"{data.image_size}x{data.image_size}"
            found.append(
                measurement(
                    name,
                    "label_accuracy",
                    accuracy(net, test.x, test.labels),
                    n=len(test),
                    data=data.name,
                    size=size,
                )
            )
            print(
                f"{name:15s} {found[-1]['value']:.4f} of {len(test)} test images of {data.name} at {size}"
            )
    recipes = {name: dataclasses.asdict(recipe[3]) for name, recipe in RECIPES.items()}
    save_results(
        results,
        "classifiers",
        "mnist-cnn, mnist-features",
        "data/make_classifiers.py measure",
        recipes,
        found,
        time.perf_counter() - start,
    )


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
    build, loss, data, cfg = RECIPES[args.name]
    cfg = dataclasses.replace(cfg, steps=args.steps or cfg.steps)
    torch.manual_seed(cfg.seed)
    with tempfile.TemporaryDirectory() as run:
        net = train(build(), loss, load_data(data, "train", args.data_root), cfg, Path(run))
    save_model(net, args.out / args.name, dtype=torch.float16)


if __name__ == "__main__":
    main()
