"""The command line: `topology` and `plan` look ahead, `info` says what this machine has.

The library does not need it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from moecomm import __version__
from moecomm.cli import machine, plan, topology

EXAMPLES = """examples:
  python -m moecomm topology --ranks 128 --tensor 8 --expert 128
  python -m moecomm plan --ranks 128 --experts 128 --tensor 1,8
  python -m moecomm info
"""


class Parser(argparse.ArgumentParser):
    """Says an error in one line: the usage above it would be what a reader sees. --help has the usage."""

    def error(self, message: str) -> NoReturn:
        """Print it and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = Parser(
        prog="python -m moecomm",
        description="Moves Mixture-of-Experts tokens to their experts and back.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moecomm {__version__}")
    # Without a command the help is printed, as for --help.
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="command")
    for name, command in (("topology", topology), ("plan", plan), ("info", machine)):
        subparser = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{name}: {command.SUMMARY}.",
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(subparser)
        # The subparser, so that `run` can refuse values in the words in which argparse does.
        subparser.set_defaults(run=command.run, parser=subparser)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has read enough. Python would write what is left at its exit, and fail again, unless it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
