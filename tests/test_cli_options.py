"""Words to a command, and a command to words."""

import shlex

from bitflow_edu.cli.options import Evaluate, command_line, parse

SMOKE = "--preset mnist-mini-smoke"


def test_the_command_line_in_a_results_file_holds_the_fields():
    words = "--config p.yaml --num-samples 30 --forward runs/f --train-forward.betas 0.9 0.99"
    args = parse(["evaluate", *SMOKE.split(), *words.split()])
    assert isinstance(args, Evaluate) and str(args.forward) == "runs/f"
    assert parse(shlex.split(command_line(args))[1:]) == args
