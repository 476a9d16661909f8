"""Words of the lessons that say which row of a table is ahead: the table must say the same.

The lessons print each difference with its interval; the sentences around them are typed. A table
that is made anew with another outcome makes a case here fail, and names the sentence to rewrite.
"""

import json
import re
from pathlib import Path

import pytest

from bitflow_edu.io.results import load_result
from bitflow_edu.lab.ablations import ahead

LESSONS = Path(__file__).resolve().parent.parent / "nbs"
FD, TRAIN, LABELS, RECALL = "fd[mnist-cnn]", "fd_train[mnist-cnn]", "label_accuracy", "recall"
ERROR, LOSS, PRECISION = "inverse_mse", "test_nll", "precision"
SCORE = "exact + score denoising"
PARTS = ("clip", "RMSNorm", "SwiGLU", "rotary", "QK-norm", "improved")
WAYS = OURS, DISTILLED, NAIVE = "hidden-alignment, MSE", "hidden-distillation, MSE", "naive, MSE"
WHOLE, WHOLE_DISTILLED, WHOLE_NAIVE = (
    s.replace("MSE", "whole loss") for s in (OURS, DISTILLED, NAIVE)
)
MANY = "hidden-alignment, 64 tokens", "hidden-distillation, 64 tokens", "naive, 64 tokens"
LONGER, WHOLE_G = "F with G's time, exact + score denoising", "F, then G by the whole loss"
OTHER_DEPTHS = "near the noise", "near the image", "all, weight 0.1"
CLIPPED, FINE = "clip + normalise", ", a tenth of the noise"
DIGITS, THIRD = "MSE + digits", "MSE + digits, a third of the weight"
THRICE = "MSE + digits, three times the weight"
W, AFTER = "in training", "at inference"
PAIRED = "normalizing-flow-matching"
IN_ONE_STEP = ("flow-matching", PAIRED, "reflow", "mean-flow", "improved-mean-flow", "consistency")
IN_ONE_STEP += ("gan",)

# lesson, its words, table, (metrics, first, sign, second): ">" first is ahead, "?" undecided
SAID = [
    (
        "09_improved_tarflow",
        "no newer part, nor all together, can be told from the original by the samples",
        "parts",
        *(((FD, LABELS), part, "?", "original") for part in PARTS),
    ),
    (
        "09_improved_tarflow",
        "in test loss the clip, and all together, are a little behind",
        "parts",
        *(((LOSS,), "original", ">", row) for row in ("clip", "improved")),
    ),
    (
        "09_improved_tarflow",
        "Deep–shallow is ahead of the original in FD to test images",
        "parts",
        ((FD, RECALL), "deep–shallow", ">", "original"),
        ((TRAIN, LABELS, LOSS), "deep–shallow", "?", "original"),
        ((FD, TRAIN, LABELS, LOSS, RECALL), "original", ">", "deep next to the data"),
    ),
    (
        "11_inverse_strategies",
        "Not looking at the states at all is worst, looking only near the noise is a little worse",
        "depth",
        ((ERROR,), "all depths", ">", "none (naive)"),
        ((ERROR,), "all depths", ">", "near the noise"),
        ((ERROR,), "near the noise", ">", "none (naive)"),
        ((ERROR,), "near the image", "?", "all depths"),
        ((ERROR,), "all, weight 0.1", "?", "all depths"),
    ),
    (
        "11_inverse_strategies",
        "at this size alignment makes a better *inverse*, and not better samples",
        "depth",
        *(((FD, LABELS), row, "?", "all depths") for row in OTHER_DEPTHS),
        ((FD, LABELS), "none (naive)", ">", "all depths"),
    ),
    (
        "11_inverse_strategies",
        "*Normalising* is ahead, by a few per cent, in the distances",
        "norm-control",
        ((FD, TRAIN), "normalise", ">", "none"),
        ((ERROR,), f"normalise{FINE}", ">", f"none{FINE}"),
    ),
    (
        "11_inverse_strategies",
        "behind against training images, by a fifth of that distance, and undecided against test",
        "norm-control",
        ((TRAIN,), "none", ">", "clip"),
        ((TRAIN,), "none", ">", CLIPPED),
        ((FD,), "none", "?", "clip"),
    ),
    (
        "11_inverse_strategies",
        "With a tenth of the noise nothing in these metrics is decided about it. In FD a tenth of",
        "norm-control",
        ((FD, TRAIN, ERROR), f"clip{FINE}", "?", f"none{FINE}"),
    ),
    (
        "11_inverse_strategies",
        "**Early, depth terms pay.** At the small budget both strategies that look at the states "
        "are far ahead of naive distillation, in the distance and in the error of the inverse, and "
        "a little ahead in the labels.",
        "strategies-500",
        ((FD, ERROR, LABELS), OURS, ">", NAIVE),
        ((FD, ERROR, LABELS), DISTILLED, ">", NAIVE),
    ),
    (
        "11_inverse_strategies",
        "All three are still far behind the exact inverse in distance.",
        "strategies-500",
        *(((FD,), SCORE, ">", row) for row in (OURS, DISTILLED, NAIVE)),
    ),
    (
        "11_inverse_strategies",
        "hidden distillation is behind naive distillation, and behind alignment",
        "strategies",
        ((FD,), NAIVE, ">", DISTILLED),
        ((FD,), OURS, ">", DISTILLED),
        ((FD,), WHOLE, ">", WHOLE_DISTILLED),
        ((FD,), WHOLE_NAIVE, ">", WHOLE_DISTILLED),
        ((TRAIN,), WHOLE_NAIVE, "?", WHOLE_DISTILLED),
    ),
    (
        "11_inverse_strategies",
        "In the labels naive distillation is ahead, too.",
        "strategies",
        ((FD, LABELS), NAIVE, ">", OURS),
        ((TRAIN,), NAIVE, "?", OURS),
    ),
    (
        "11_inverse_strategies",
        "What remains of alignment's lead, by squared error, is in the error of the inverse.",
        "strategies",
        ((ERROR,), OURS, ">", NAIVE),
        ((FD, LABELS), NAIVE, ">", OURS),
        ((TRAIN, RECALL), OURS, "?", NAIVE),
        ((ERROR, TRAIN, RECALL), WHOLE, ">", WHOLE_NAIVE),
        ((LABELS,), WHOLE_NAIVE, ">", WHOLE),
    ),
    (
        "11_inverse_strategies",
        "is ahead of the exact inverse with its score step. Its lead over either row",
        "strategies",
        ((FD,), WHOLE, ">", SCORE),
        ((FD,), WHOLE, ">", OURS),
        ((ERROR,), OURS, ">", WHOLE),
        ((TRAIN,), WHOLE, ">", WHOLE_NAIVE),
        ((TRAIN,), WHOLE, ">", NAIVE),
        ((FD,), WHOLE, "?", WHOLE_NAIVE),
        ((FD,), WHOLE, "?", NAIVE),
    ),
    (
        "11_inverse_strategies",
        "between naive and hidden distillation, but neither step is decided",
        "strategies",
        ((FD,), NAIVE, "?", SCORE),
        ((FD,), SCORE, "?", DISTILLED),
        ((FD,), DISTILLED, ">", "exact, noise left in"),
    ),
    (
        "11_inverse_strategies",
        "on another processor, which rounds in another way and so trains another $F$ and $G$; "
        "there this lead is decided",
        "budget",
        ((FD,), "F, then G by MSE", ">", f"F alone, {SCORE}"),
    ),
    (
        "11_inverse_strategies",
        "only in labels the $G$ with the whole loss is ahead",
        "budget",
        ((FD, TRAIN, RECALL), LONGER, ">", WHOLE_G),
        ((FD, TRAIN, RECALL), LONGER, ">", "F, then G by MSE"),
        ((LABELS,), WHOLE_G, ">", LONGER),
    ),
    (
        "11_inverse_strategies",
        "**there hidden alignment is ahead of both other ways**",
        "tokens-700",
        *(((FD, TRAIN, LABELS), MANY[0], ">", other) for other in MANY[1:]),
        ((FD, TRAIN, LABELS), MANY[1], "?", MANY[2]),
        ((FD,), "exact, 64 tokens", ">", MANY[0]),
    ),
    (
        "12_learned_denoising",
        "To leave the noise in costs distance",
        "denoising",
        *(((FD,), row, ">", "no denoising") for row in ("score denoising", "learned denoising")),
    ),
    (
        "12_learned_denoising",
        "shows here in the squared error, which is 2% smaller, and barely in precision and recall; "
        "in FD and labels the two are undecided",
        "denoising",
        ((FD, LABELS), "score denoising", "?", "learned denoising"),
        ((ERROR, RECALL, PRECISION), "learned denoising", ">", "score denoising"),
    ),
    (
        "13_distances",
        "at every power they bring the FD down, labels are better at two powers of three",
        "distances",
        *(
            ((FD,), f"MSE + digits{power}", ">", alone)
            for power, alone in ((", power 0", "MSE"), (", power 0.5", "MSE, power 0.5"))
        ),
        ((FD, LABELS), DIGITS, ">", "MSE, power 1"),
        ((LABELS,), "MSE + digits, power 0", ">", "MSE"),
        ((LABELS,), "MSE + digits, power 0.5", "?", "MSE, power 0.5"),
        ((ERROR,), "MSE, power 1", ">", DIGITS),
    ),
    (
        "13_distances",
        "no weight and no power is decidedly ahead in FD, and the error of the inverse grows with",
        "distances",
        ((FD,), DIGITS, "?", THIRD),
        ((FD,), DIGITS, "?", THRICE),
        *(((FD,), DIGITS, "?", f"MSE + digits, power {power}") for power in (0, 0.5)),
        ((ERROR,), THIRD, ">", DIGITS),
        ((ERROR,), DIGITS, ">", THRICE),
    ),
    (
        "14_guidance",
        "it is a little behind guidance at inference in distance, and not decided in labels",
        "guidance",
        ((FD,), AFTER, ">", W),
        ((LABELS,), AFTER, "?", W),
    ),
    (
        "14_guidance",
        "training images cannot tell 0.1 from 0 for this $G$. At 0 the distances to test images "
        "are undecided; to training images guidance at inference stays ahead",
        "guidance",
        ((TRAIN,), f"{W}, w = 0.1", "?", f"{W}, w = 0"),
        ((TRAIN,), AFTER, ">", f"{W}, w = 0"),
        ((FD,), AFTER, "?", f"{W}, w = 0"),
    ),
    (
        "14_guidance",
        "Against no guidance, the labels are better, by both ways, and recall, the variety, is "
        "worse",
        "guidance",
        *(((RECALL,), "no guidance", ">", row) for row in (W, AFTER)),
        *(((LABELS, TRAIN), row, ">", "no guidance") for row in (W, AFTER)),
        ((FD,), AFTER, "?", "no guidance"),
        ((FD,), "no guidance", ">", W),
    ),
    (
        "14_guidance",
        "no difference in distance that could be told from none, more labels for one pass, and "
        "more variety for the exact inverse",
        "guidance",
        ((RECALL,), SCORE, ">", W),
        ((FD,), W, "?", SCORE),
        ((LABELS,), W, ">", SCORE),
    ),
    (
        "14_guidance",
        "At the chosen scales it and the linear rule are undecided in distance; it has more labels",
        "forward-guidance",
        ((FD, TRAIN), "annealed", "?", "linear"),
        ((LABELS,), "annealed", ">", "linear"),
        ((RECALL,), "linear", ">", "annealed"),
        ((FD,), "linear", ">", "variance-aware"),
    ),
    (
        "14_guidance",
        "Guided by the annealed rule the exact inverse and one pass guided in training are "
        "undecided in labels and in distance to test images",
        "guidance+forward-guidance",
        ((LABELS, FD), "annealed", "?", W),
        ((TRAIN,), "annealed", ">", W),
    ),
    (
        "14_guidance",
        "The fixed branch is far behind in distance at this length; in labels it is undecided.",
        "guidance",
        ((LABELS,), W, "?", f"{W}, detached"),
        ((FD,), W, ">", f"{W}, detached"),
        ((FD,), f"{W}, w as a token", ">", W),
        ((TRAIN,), f"{W}, w as a token", "?", W),
        ((FD, LABELS), f"{W}, own scale for denoising", "?", W),
    ),
    (
        "18_neighbours",
        "The first list above names whom `one-pass` leads by an interval that leaves out 0",
        "neighbours",
        *(((FD,), row, ">", f"{n}-1") for row in ("one-pass", "one-pass-mse") for n in IN_ONE_STEP),
    ),
    (
        "18_neighbours",
        "Noise that knows its image helps in one step, where bent paths cost most; with more steps",
        "neighbours",
        ((FD,), f"{PAIRED}-1", ">", "flow-matching-1"),
        ((FD,), f"{PAIRED}-2", "?", "flow-matching-2"),
        *(((FD,), f"flow-matching-{n}", ">", f"{PAIRED}-{n}") for n in (4, 8, 50)),
    ),
    (
        "18_neighbours",
        "The GAN draws good digits, but few kinds of them (its recall)",
        "neighbours",
        ((RECALL,), "one-pass", ">", "gan-1"),
    ),
    (
        "measured",
        "With guidance on both sides one pass has no lead in distance, by whichever rule",
        "guidance+forward-guidance",
        *(((FD,), W, "?", row) for row in (SCORE, "annealed", "variance-aware")),
        ((LABELS,), W, ">", SCORE),
        ((LABELS,), W, "?", "annealed"),
        ((RECALL,), SCORE, ">", W),
    ),
    (
        "11_inverse_strategies",
        "only more layers bring $G$ nearer",
        "recipes",
        ((ERROR,), "twice the layers", ">", "MSE"),
        ((ERROR,), "twice the rate", "?", "MSE"),
        *(((ERROR,), "MSE", ">", f"half the {what}") for what in ("rate", "batch")),
        ((ERROR,), "MSE", ">", "half the layers, 1.5 times the width"),
    ),
    (
        "index",
        "Guided on both sides no lead is shown",
        "guidance+forward-guidance",
        *(((FD,), W, "?", row) for row in (SCORE, "annealed", "variance-aware")),
    ),
    (
        "measured",
        "after {early_steps} it is the other way round",
        "strategies-500",
        ((FD,), DISTILLED, ">", NAIVE),
    ),
    (
        "measured",
        "so at this size $G$ buys speed, and neither distance nor variety",
        "budget",
        ((FD, RECALL), LONGER, ">", WHOLE_G),
    ),
    (
        "measured",
        "leans to cost a little against guidance at inference",
        "guidance",
        ((FD,), AFTER, ">", W),
    ),
    (
        "measured",
        "the published order of the first two rows does not appear",
        "strategies",
        ((FD,), NAIVE, ">", OURS),
    ),
    (
        "measured",
        "and a less exact inverse at the same power",
        "distances",
        ((FD,), DIGITS, ">", "MSE, power 1"),
        ((ERROR,), "MSE, power 1", ">", DIGITS),
    ),
]


def text_of(lesson):
    """All that stands in the cells of a notebook, blanks made alike."""
    cells = json.loads((LESSONS / f"{lesson}.ipynb").read_text(encoding="utf-8"))["cells"]
    words = "\n".join("".join(cell["source"]) for cell in cells).replace("\\\n", " ")
    return re.sub(r"\s+", " ", words)


def table_of(name):
    """A table of `mnist-mini`; a number behind its name: so many steps of G. `a+b`: two tables of
    the same F and noise, as one."""
    if "+" in name:
        tables = [table_of(one) for one in name.split("+")]
        return {"name": name, "measurements": [m for t in tables for m in t["measurements"]]}
    if name == "neighbours":
        return load_result("neighbours-mnist-mini")
    table, _, steps = name.rpartition("-") if name[-1].isdigit() else (name, "", "")
    return load_result(f"ablate-{table}-mnist-mini" + (steps and f"-{steps}-steps"))


def sign_of(table, metric, first, second):
    """ ">" where the first row is ahead by an interval without 0, "<" the second, "?" neither."""
    signs = {f"“{first}” is ahead": ">", f"“{second}” is ahead": "<", "“": "?"}
    said = ahead(table, first, second, metric)
    return next(sign for words, sign in signs.items() if said.startswith(words))


CASES = [pytest.param(*case[:3], case[3:], id=f"{case[0][:2]}-{case[1][:40]}") for case in SAID]


@pytest.mark.parametrize("lesson, words, name, verdicts", CASES)
def test_a_sentence_says_what_its_table_says(lesson, words, name, verdicts):
    assert words.lower() in text_of(lesson).lower(), "rewritten: look at its verdicts"
    table = table_of(name)
    for metrics, first, sign, second in verdicts:
        for metric in metrics:
            assert sign_of(table, metric, first, second) == sign, (metric, first, second)


def test_a_verdict_needs_an_interval_without_0():
    """The other way round the sign turns, and undecided stays undecided."""
    table = table_of("tokens-700")
    first, second, third = MANY
    assert sign_of(table, FD, first, second) == ">" and sign_of(table, FD, second, first) == "<"
    assert sign_of(table, LABELS, first, second) == ">", "where more is better"
    assert sign_of(table, FD, second, third) == sign_of(table, FD, third, second) == "?"
