"""The command: python -m moecomm.distill --help, or torchrun -m moecomm.distill for several ranks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moecomm.train import __main__ as train

DESCRIPTION = "Train a student with fewer layers on text and on the answers of a trained teacher (Mixture-of-Students)."
EXAMPLES = """examples:
  python -m moecomm.train --steps 400 --out teacher
  python -m moecomm.distill --teacher teacher --layers 3 --schedule staged --stop 250 --steps 400 --out student

All other options, the log and the pictures are those of moecomm.train. Both are split alike over the same ranks.
"""


def parser() -> argparse.ArgumentParser:
    """The options: those of moecomm.train, and the teacher's."""
    options = train.parser()
    options.prog = "python -m moecomm.distill"
    options.description = DESCRIPTION
    options.epilog = EXAMPLES
    # Without a name the student has its teacher's config.
    options.set_defaults(config=None)
    # A group of its own, below the options that both commands have.
    add = options.add_argument_group("distillation").add_argument
    add(
        "--teacher",
        type=Path,
        required=True,
        metavar="DIR",
        help="--out of the run that trained it",
    )
    add(
        "--layers", type=train.positive, help="of the student, which is else as its teacher (default: 7/8; or --config)"
    )
    add(
        "--start", choices=("random", "teacher"), default="random", help="the student's first weights (default: random)"
    )
    add("--schedule", choices=("none", "full", "staged", "linear"), default="full", help="when the teacher is heard")
    add("--stop", type=train.positive, metavar="STEP", help="from which on it is not: of staged and linear")
    add("--alpha", type=float, default=1.0, help="weight of its loss (default: 1)")
    add("--temperature", type=float, default=1.0, help="(default: 1)")
    add("--cache", type=Path, metavar="DIR", help="keep the teacher's answers there, for other students and later runs")
    add("--cache-top", type=train.positive, metavar="N", help="logits kept of each token (default: all)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a lost rank, 2 for bad input, 130 after Ctrl-C."""
    return train.launch(parser().parse_args(arguments), "moecomm.distill.trainer")


if __name__ == "__main__":
    raise SystemExit(main())
