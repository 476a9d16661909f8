#!/usr/bin/env python3
"""How silent the alarms of `bitflow_edu.watching` are where nothing is wrong: writes results/watching.json.

Usage: survey_alarms.py RUNS [RUNS …] [--data-root DATA] [--results DIR]
RUNS are folders of trainings (searched for metrics.jsonl); DATA holds CIFAR-10, which is left out without it.
"""

import argparse
import time
from pathlib import Path

import torch

from bitflow_edu.data import BitflowError, DataConfig, described, load_data
from bitflow_edu.evaluation import measurement, save_results
from bitflow_edu.hub import load_pretrained
from bitflow_edu.pipeline import draw, noise_for
from bitflow_edu.training import read_metrics
from bitflow_edu.watching import (
    EXCURSION,
    GROUPS,
    LEAST,
    SPREADS,
    WINDOW,
    alike,
    check_samples,
    reference_of,
    restlessness,
    watch_labels,
)


def kind_of(path: str) -> str:
    """Flows of chapter 02 are known for their temper."""
    return (
        "NICE"
        if "nice" in path
        else "Glow and RealNVP"
        if "glow" in path or "realnvp" in path
        else "F and G"
    )


def trainings(folders: list) -> dict:
    """Kind → the metrics of each training that has at least 30 lines; copies of a run count once."""
    found = {}
    for path in sorted(p for folder in folders for p in Path(folder).rglob("metrics.jsonl")):
        try:
            lines = read_metrics(path)
        except BitflowError:
            continue
        if len(lines) >= 30 and "grad_norm" in lines[0]:
            found.setdefault(kind_of(str(path)), {})[str(lines[-1]["loss"])] = lines
    return found


def of_trainings(kind: str, runs: list) -> list:
    """How far the lines of healthy trainings stray."""
    restless = [restlessness(lines) for lines in runs]
    most = lambda key, digits: round(max(r[key] for r in restless), digits)
    found = [
        measurement(kind, "trainings", len(runs)),
        measurement(kind, "lines", sum(map(len, runs))),
        measurement(kind, "largest_loss_excursion", most("loss", 2), "spreads"),
        measurement(kind, "largest_gradient_excursion", most("log_grad_norm", 2), "spreads"),
        measurement(kind, "lines_past_limit", sum(r["above"] for r in restless)),
    ]
    return found + (
        [measurement(kind, "largest_z_gain", most("z_gain", 4), "loss spreads")]
        if kind == "F and G"
        else []
    )


def of_groups(row: str, reference, groups) -> list:
    """How many groups of images set off an alarm."""
    alarms = [check_samples(x, reference.labels, reference) for x in groups]
    return [
        measurement(row, "groups", len(alarms)),
        measurement(row, "groups_with_alarm", sum(map(bool, alarms))),
    ]


def of_digits() -> list:
    """Real digits, and samples of the pair that comes with the course."""
    (train, test), g = (
        (load_data(DataConfig(), split) for split in ("train", "test")),
        torch.Generator().manual_seed(0),
    )
    (F, G), labels = load_pretrained("mnist-mini"), watch_labels(train.labels)
    clean, noisy = (
        reference_of(train, labels, F.cfg.patch_size),
        reference_of(train, labels, F.cfg.patch_size, F.cfg.noise_std),
    )
    samples = lambda row, n: [
        draw(row, F, G, noise_for(F.cfg, len(labels), seed), labels) for seed in range(n)
    ]
    return [
        *of_groups(
            "100 test digits", clean, [test[alike(labels, test.labels, g)].x for _ in range(200)]
        ),
        *of_groups("100 samples of G", clean, samples("one-pass", 50)),
        *of_groups("100 samples of F, against noisy digits", noisy, samples("exact", 10)),
    ]


def of_photographs(root: Path) -> list:
    """Real photographs."""
    (train, test), g = (
        (load_data(DataConfig("cifar10", 32, 3), split, root) for split in ("train", "test")),
        torch.Generator().manual_seed(0),
    )
    labels = watch_labels(train.labels)
    name = (
        "CIFAR-10 (JPEG copy)"
        if "copy" in described(DataConfig("cifar10", 32, 3), root)
        else "CIFAR-10"
    )
    return of_groups(
        f"100 test images of {name}",
        reference_of(train, labels, 4),
        [test[alike(labels, test.labels, g)].x for _ in range(100)],
    )


def main():
    """Measure, print, store."""
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("runs", nargs="+", type=Path)
    ap.add_argument("--data-root", type=Path)
    ap.add_argument("--results", type=Path, default=Path("results"))
    args, start = ap.parse_args(), time.perf_counter()
    found = [
        m
        for kind, runs in sorted(trainings(args.runs).items())
        for m in of_trainings(kind, list(runs.values()))
    ]
    found += of_digits() + (of_photographs(args.data_root) if args.data_root else [])
    config = {
        "window": WINDOW,
        "least": LEAST,
        "excursion": EXCURSION,
        "spreads": SPREADS,
        "groups": GROUPS,
    }
    command = "python tests/survey_alarms.py RUNS" + (" --data-root DATA" if args.data_root else "")
    print(
        save_results(
            args.results, "watching", "", command, config, found, time.perf_counter() - start
        )
    )


if __name__ == "__main__":
    main()
