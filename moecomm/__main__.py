"""The command line: python -m moecomm --help."""

from moecomm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
