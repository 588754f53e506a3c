"""The command line: `topology` and `plan` look ahead, `info` says what this machine has.

Nothing here is needed to use the library.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from moecomm.cli import machine, plan, topology

EXAMPLES = """examples:
  python -m moecomm topology --world-size 128 --tensor 8 --expert 128
  python -m moecomm plan --ranks 128 --experts 128 --tensor 1,8
  python -m moecomm info
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m moecomm",
        description="Moves Mixture-of-Experts tokens to their experts and back.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="command")
    for name, command in (("topology", topology), ("plan", plan), ("info", machine)):
        of_command = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{name}: {command.SUMMARY}.",
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(of_command)
        of_command.set_defaults(run=command.run, parser=of_command)
    options = parser.parse_args(arguments)
    try:
        if hasattr(options, "run"):
            options.run(options)
        else:
            parser.print_help()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; what is left goes nowhere, or Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
