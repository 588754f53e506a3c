"""The command: python -m moecomm.train --help, or torchrun -m moecomm.train for several ranks."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT
"""The exit status of a program that Ctrl-C has ended."""
DESCRIPTION = "Train a language model with Mixture-of-Experts layers on text, byte by byte."
EXAMPLES = """examples:
  python -m moecomm.train --steps 200 --out run
  python -m moecomm.train --text book.txt --config small-top-2 --out run
  torchrun --nproc-per-node 4 -m moecomm.train --expert 4 --steps 200 --out run

Without --text: the sources of Python's standard library. The same losses for any number of ranks and any split of them.
--out gets log.jsonl, loss.png, routing.png and the last checkpoint; Ctrl-C ends the run with a checkpoint, from which
--resume goes on.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="python -m moecomm.train",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="UTF-8 files, any number",
    )
    add("--config", default="small", help="name of a model in moecomm.nn.CONFIGS (default: %(default)s)")
    add("--steps", type=positive, default=200, help="(default: %(default)s)")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where log, pictures and checkpoints go",
    )
    add("--batch", type=positive, default=16, help="sequences a step, of all ranks (default: %(default)s)")
    add("--micro-batch", type=positive, default=4, help="sequences routed together (default: %(default)s)")
    add("--learning-rate", type=float, default=3e-3, help="(default: %(default)s)")
    add("--expert", type=positive, help="most ranks that share a layer's experts (default: all)")
    add("--tensor", type=positive, default=1, help="ranks that share the dense layers (default: 1)")
    add("--expert-tensor", type=positive, default=1, help="ranks that share each expert (default: 1)")
    balance = ("aux", "z", "bias", "loss-bias", "none")
    add("--balance", choices=balance, default="aux", help="how experts are kept busy alike (default: aux)")
    add(
        "--save-every",
        type=positive,
        default=100,
        metavar="STEPS",
        help="(default: %(default)s)",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, with the same settings")
    add("--seed", type=natural, default=0)
    return options


def natural(text: str, least: int = 0) -> int:
    """A whole number >= least."""
    # int() alone would take 1_000 and -1.
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= {least}")
    return int(text)


def positive(text: str) -> int:
    """A whole number >= 1."""
    return natural(text, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a lost rank, 2 for bad input, 130 after Ctrl-C."""
    return launch(parser().parse_args(arguments), "moecomm.train.run")


def launch(options: argparse.Namespace, source: str) -> int:
    """Train what `build` of the module `source` makes; the exit status."""
    # Here and not above: --help must work without torch, and come at once.
    try:
        return _launch(options, source)
    except KeyboardInterrupt:
        # Before the first step or after the last: a step in between ends with a checkpoint.
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _launch(options: argparse.Namespace, source: str) -> int:
    try:
        from moecomm.train.run import run, warn_of_lone_ranks, world

        build = import_module(source).build
        # Needed when a run ends; what is missing is said before it begins.
        for drawing in ("tqdm", "matplotlib"):
            import_module(drawing)
    except ImportError as error:
        print(f"error: {error}: pip install 'moecomm[train]'", file=sys.stderr)
        return 2
    from moecomm.errors import CommError
    from moecomm.nn import checkpoint

    warn_of_lone_ranks(os.environ)
    try:
        with world() as (comm, device):
            interrupted = run(options, comm, device, build)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CommError as error:
        # No collective works any more, so the run cannot save: what it saved before is what there is.
        path = checkpoint.last(options.out)
        advice = f"the last checkpoint is {path}" if path else "there is no checkpoint yet"
        print(f"error: a rank was lost: {error}\n{advice}", file=sys.stderr)
        return 1
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    raise SystemExit(main())
