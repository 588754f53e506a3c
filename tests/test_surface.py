"""What users see: the public names, their docstrings, and what an import brings along."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import ROOT

import moecomm

MODULES = ["moecomm", *(module.name for module in pkgutil.walk_packages(moecomm.__path__, "moecomm."))]


def test_the_public_names() -> None:
    names = """AllToAll AutoAllToAll Comm CommError FlatAllToAll Groups HierarchicalAllToAll Nodes Plan RoutedExchange
        Routing SharedAllToAll TensorParallelExchange Topology build_groups expert_capacity
        reduce_expert_gradient route"""
    assert moecomm.__all__ == names.split()


def test_the_version_is_the_installed_one() -> None:
    assert moecomm.__version__ == version("moecomm")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## {moecomm.__version__}" in changelog
    for command in (["--version"], ["info"]):
        job = subprocess.run([sys.executable, "-m", "moecomm", *command], capture_output=True, text=True, check=True)
        assert job.stdout.splitlines()[0].split() == ["moecomm", moecomm.__version__]


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    if name == "moecomm.transports.torch":
        pytest.importorskip("torch")
    if name == "moecomm.integrations.torchtitan":
        pytest.importorskip("torchtitan", reason="installed by make torchtitan alone")
    module = importlib.import_module(name)
    assert module.__doc__
    if name == "moecomm._core":
        return
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isclass(value):
            assert value.__doc__, f"{name}.{attribute}"
            for method, function in vars(value).items():
                if not method.startswith("_") and inspect.isfunction(function):
                    assert inspect.getdoc(getattr(value, method)), f"{name}.{attribute}.{method}"


@pytest.mark.parametrize("name", [name for name in moecomm.__all__ if inspect.isclass(getattr(moecomm, name))])
def test_no_public_parameter_is_a_flag(name: str) -> None:
    value = getattr(moecomm, name)
    for method in [
        value.__init__,
        *(m for n, m in inspect.getmembers(value, inspect.isfunction) if not n.startswith("_")),
    ]:
        if method is not object.__init__:
            for parameter in inspect.signature(method).parameters.values():
                assert parameter.annotation not in ("bool", bool), f"{name}.{method.__name__}: {parameter}"


def test_import_is_light() -> None:
    heavy = ("torch", "mpi4py", "cupy", "matplotlib", "tqdm")
    program = f"import sys, moecomm; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("missing", "transport", "extra"), [("torch", "torch", "torch"), ("mpi4py", "mpi", "mpich")])
def test_a_transport_says_which_extra_is_missing(missing: str, transport: str, extra: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import moecomm.transports.{transport}"
    job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert job.returncode != 0
    assert f"pip install 'moecomm[{extra}]'" in job.stderr


def test_what_needs_an_extra_says_which() -> None:
    """`from moecomm.nn import MoE` without torch, and kernels for CUDA tensors without cupy."""
    programs = {
        "torch": "from moecomm.nn import MoE",
        "cupy": "from moecomm.gating.kernel import Kernel, _load; _load('permute.cu', 'permute', (), 0)",
    }
    for missing, program in programs.items():
        program = f"import sys; sys.modules[{missing!r}] = None; {program}"
        job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        last = job.stderr.splitlines()[-1]
        assert job.returncode == 1 and "pip install 'moecomm[" in last and missing in last, last


def test_no_environment_variable_steers_the_library() -> None:
    """It is read to tell that a launcher has started ranks that know nothing of each other, and for nothing else."""
    readers = []
    for file in sorted((ROOT / "moecomm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.append(file.relative_to(ROOT / "moecomm").as_posix())
    assert sorted(readers) == ["serve/__main__.py", "train/__main__.py", "transports/mpi.py"]
