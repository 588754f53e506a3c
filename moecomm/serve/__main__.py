"""The command: python -m moecomm.serve --help, or torchrun -m moecomm.serve for several ranks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moecomm.train.__main__ import INTERRUPTED, natural, positive

EXAMPLES = """examples:
  python -m moecomm.serve --checkpoint run --prompt "import "
  python -m moecomm.serve --checkpoint run --prompt "def " --temperature 0.8 --top-p 0.95 --seed 1
  torchrun --nproc-per-node 2 -m moecomm.serve --checkpoint run --prompt "import "
  python -m moecomm.serve --config small --random --sequences 2 --context 128

--checkpoint: what python -m moecomm.train wrote. All ranks share one model; rank 0 prints its text as it comes.
--random: how long a step takes with random weights.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="python -m moecomm.serve",
        description="Continue a text with a model that moecomm.train made, or measure steps of a random one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="a run of moecomm.train, or one of its checkpoints")
    add("--prompt", metavar="TEXT", help="what the text begins with")
    add("--max-new", type=positive, default=200, help="tokens, bytes of these models (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token (default: %(default)s)")
    add("--top-k", type=positive, metavar="K", help="draw from the K likeliest tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="from the likeliest that have P together (default: 1)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="end behind one of these texts")
    add("--seed", type=natural, default=0)
    add("--random", action="store_true", help="random weights of --config, and no text")
    add("--config", default="small", help="with --random: name of a model in moecomm.nn.CONFIGS (default: small)")
    add("--sequences", type=positive, default=1, help="with --random (default: 1)")
    add("--context", type=positive, default=128, help="with --random: positions at the last step (default: 128)")
    add("--steps", type=positive, default=20, help="with --random: how many are timed (default: %(default)s)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 for a lost rank, 2 for bad input, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    if options.random == (options.checkpoint is not None) or (options.prompt is None) != options.random:
        print("error: give --checkpoint and --prompt, or --random", file=sys.stderr)
        return 2
    # Here and not above: --help must work without torch, and come at once.
    try:
        return _main(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(options: argparse.Namespace) -> int:
    try:
        from moecomm.serve.run import run
        from moecomm.train.run import warn_of_lone_ranks, world
    except ImportError as error:
        print(f"error: {error}: pip install 'moecomm[torch]'", file=sys.stderr)
        return 2
    from moecomm.errors import CommError

    warn_of_lone_ranks(os.environ, "moecomm.serve")
    try:
        with world() as (comm, device):
            interrupted = run(options, comm, device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CommError as error:
        print(f"error: a rank was lost: {error}", file=sys.stderr)
        return 1
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    raise SystemExit(main())
