"""CUDA kernels: compiled at run time by NVRTC through cupy, launched on torch's current stream.

A kernel is specialised for its shape and options by macros, so a new combination costs a compilation of a few seconds.
The result is kept in cupy's cache on disk and, loaded, for the life of the process. Nothing here waits for the device,
and all memory comes from torch.

A kernel that calls wait_for_inputs (rows.cuh) starts while the one before it on the stream ends, from compute
capability 9.0 on: programmatic dependent launch, as the CUDA programming guide calls it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

Macros = tuple[tuple[str, object], ...]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, with the one value that is used here."""

    _fields_ = [("id", ctypes.c_int), ("value", ctypes.c_int * 17)]


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


_STARTS_EARLY = _Attribute(6, (ctypes.c_int * 17)(0, 1))
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed."""


def source_folder() -> Path:
    """Where the folders cuda and gating with the sources are: in an installed package, or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


@cache
def read_source(name: str) -> str:
    """The text of csrc/cuda/<name>, the project's own #include files written out, so that a cache sees them change."""
    included: set[Path] = set()

    def text(path: Path) -> str:
        # Each file once, as with #pragma once.
        if path in included:
            return ""
        included.add(path)

        def text_of_include(match: re.Match[str]) -> str:
            return text((path.parent / match[1]).resolve())

        written_out = re.sub(r'^#include "(.+)"$', text_of_include, path.read_text(), flags=re.M)
        return written_out.replace("#pragma once\n", "")

    return text((source_folder() / "cuda" / name).resolve())


def compiler_options(macros: Macros) -> tuple[str, ...]:
    """The options of NVRTC for these macros. Sources contract a * b + c only where they say so."""
    defines = [f"-D{name}={value}" for name, value in macros]
    # Diagnostic 177: a constant or function that these macros leave unused.
    return ("-std=c++17", "--fmad=false", "-diag-suppress=177", *defines)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@cache
def libcuda() -> ctypes.CDLL:
    """The CUDA driver, for the calls that cupy has no functions for."""
    return ctypes.CDLL("libcuda.so.1")


@cache
def load_cupy() -> ModuleType:
    """cupy. Raises ImportError, which says what to install, where it is missing."""
    try:
        import cupy
    except ImportError as error:
        install = "pip install 'moecomm[cuda13]' or 'moecomm[cuda12]'"
        raise ImportError(f"moecomm's kernels for CUDA tensors need cupy ({error}): {install}") from error
    return cupy


@cache
def _load(source: str, name: str, macros: Macros, device: int) -> tuple[int, bool, Any]:
    """The driver's handle of a kernel, whether it may start early, and the module that must live as long."""
    cupy = load_cupy()
    import torch
    from cupy_backends.cuda.api import driver

    # Loading allocates device memory, which would end the capture with an error that does not name the kernel.
    if torch.cuda.is_current_stream_capturing():
        described = " ".join(f"{key}={value}" for key, value in macros)
        raise RuntimeError(
            f"{name} ({source}: {described}) is not loaded, and a kernel cannot be loaded while a CUDA graph is "
            "captured: run the operation once before the capture, or load its kernels (moecomm.gating.cuda.compile, "
            "DirectExchange.load)"
        )
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=read_source(source), options=compiler_options(macros), backend="nvrtc")
        function = int(module.get_function(name).kernel.ptr)
        # A block may ask for all the dynamic shared memory that the kernel's static one leaves: attributes 97 of the
        # device (cudaDevAttrMaxSharedMemoryPerBlockOptin), 1 and 8 of the function (static and most dynamic bytes).
        static_bytes = driver.funcGetAttribute(1, function)
        most = cupy.cuda.runtime.deviceGetAttribute(97, device) - static_bytes
        driver.funcSetAttribute(function, 8, most)
    waits = "wait_for_inputs();" in read_source(source)
    starts_early = waits and torch.cuda.get_device_capability(device)[0] >= 9
    return function, starts_early, module


@dataclass(frozen=True)
class Kernel:
    """One function of csrc/cuda/<source>, compiled with these macros: Kernel("permute.cu", "permute", (("TOP_K", 8),)).

    Loading happens at the first call, or by `load`, once for each device.
    """

    source: str
    name: str
    macros: Macros = ()

    def load(self) -> None:
        """Compile and load for the current device. Raises RuntimeError while a CUDA graph is captured."""
        self._loaded()

    def _loaded(self) -> tuple[int, bool]:
        import torch

        return _load(self.source, self.name, self.macros, torch.cuda.current_device())[:2]

    def __call__(self, grid: int, block: int, args: Sequence[Any], shared_bytes: int = 0) -> None:
        """Launch on torch's current stream, with `shared_bytes` of dynamic shared memory.

        args  a tensor: its address; None: a null pointer; int: 64 bits, right for every integer parameter up to that;
              float: 32 bits; a ctypes object, a struct say: itself
        """
        import torch

        function, starts_early = self._loaded()
        _enter_context()
        # The driver reads each argument through a pointer: `values` must live until the call returns.
        values = [_argument(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = torch.cuda.current_stream().cuda_stream
        # One attribute if the kernel may start early, else none.
        config = _Config(
            (grid, 1, 1), (block, 1, 1), shared_bytes, stream, ctypes.pointer(_STARTS_EARLY), int(starts_early)
        )
        error = libcuda().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
        if error:
            raise RuntimeError(f"{self.name}: cuLaunchKernelEx failed with CUresult {error}; expected 0")


def _enter_context() -> None:
    """A thread that autograd made may have a current device and no driver context yet."""
    from cupy_backends.cuda.api import driver

    if driver.ctxGetCurrent() == 0:
        import cupy
        import torch

        cupy.cuda.Device(torch.cuda.current_device()).use()


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, int):
        return ctypes.c_longlong(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, (ctypes._SimpleCData, ctypes.Structure)):
        return value
    return ctypes.c_void_p(value.data_ptr())
