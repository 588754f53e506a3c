"""Rows of numpy, torch and cupy arrays, told apart by their own type.

Neither torch nor cupy is imported before its arrays come: who has made one has imported it already.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from moecomm._core import copy_blocks as copy_host_blocks

Array: TypeAlias = Any
"""A numpy array, a torch tensor or a cupy array. A function that makes one makes it like its argument."""

Counts: TypeAlias = NDArray[np.int64]


NAMES: dict[Any, str] = {}
"""Of dtypes; numpy takes 2 us to make one anew."""


class ArrayLike(Protocol):
    """What the three kinds of arrays have in common, as far as a type checker needs to know it."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


Rows = TypeVar("Rows", bound=ArrayLike)
"""An array [num_rows, ...] of any kind: what a collective takes is what it returns."""


def is_torch(array: object) -> bool:
    if type(array) is np.ndarray:
        return False
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_cupy(array: object) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def on_host(array: Array) -> bool:
    return isinstance(array, np.ndarray) or (is_torch(array) and array.device.type == "cpu")


def as_rows(array: Array, name: str) -> Array:
    """The array itself, or a contiguous copy of it. TypeError or ValueError if it has no rows that can be moved."""
    if type(array) is np.ndarray and array.ndim and array.flags.c_contiguous and not array.dtype.hasobject:
        return array  # nearly all arrays are such: this is on the path of every call
    of_torch = is_torch(array)
    if (array.ndim if of_torch else num_axes(array, name)) == 0:
        raise ValueError(f"{name} has no rows: its shape is ()")
    if isinstance(array, np.ndarray):
        return _host_rows(array, name)
    if not of_torch:
        return array if array.flags.c_contiguous else array.copy(order="C")
    import torch

    if array.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, which a collective would lose; pass {name}.detach()")
    if array.layout != torch.strided:
        raise TypeError(f"{name} is a {array.layout} tensor, expected a dense one")
    return array.resolve_conj().resolve_neg().contiguous()


def _host_rows(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.hasobject:
        raise TypeError(f"{name} has dtype {array.dtype}: Python objects, not bytes that could be moved")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; pass {name}.data or {name}.filled()")
    # A subclass, such as np.memmap, becomes a plain array too.
    return np.ascontiguousarray(array)


def num_axes(array: Array, name: str) -> int:
    """TypeError if it is no array of a kind that we know."""
    if not isinstance(array, np.ndarray) and not is_torch(array) and not is_cupy(array):
        raise TypeError(f"{name} is a {type(array).__name__}, expected a numpy array or a torch tensor")
    return int(array.ndim)


def empty_rows(num_rows: int, like: Array) -> Array:
    """[num_rows, ...], uninitialised."""
    shape = (num_rows, *like.shape[1:])
    if is_torch(like):
        return like.detach().new_empty(shape)
    return np.empty(shape, like.dtype, like=like)  # a cupy array for a cupy array


def zeros(shape: int | tuple[int, ...], dtype: str, like: Array) -> Array:
    """An array of the kind of `like`, where that is."""
    if isinstance(like, np.ndarray):
        return np.zeros(shape, dtype)
    import torch

    return torch.zeros(shape, dtype=getattr(torch, dtype), device=like.device)


def row_bytes(rows: Array) -> int:
    return int(rows.itemsize * math.prod(rows.shape[1:]))


def dtype_name(array: Array) -> str:
    dtype = array.dtype
    if dtype not in NAMES:
        NAMES[dtype] = str(dtype).removeprefix("torch.")
    return NAMES[dtype]


def as_bytes(rows: Array) -> Array:
    """The memory of contiguous rows as one-dimensional uint8: numpy for host arrays, else of the same library."""
    if not is_torch(rows):
        return rows.reshape(-1).view(np.uint8)
    import torch

    flat = rows.detach().reshape(-1).view(torch.uint8)
    return flat.numpy() if rows.device.type == "cpu" else flat


def sum_dtype(rows: Array) -> Any:
    """The dtype in which numbers like these are summed: float64 for float64, else float32."""
    if not is_torch(rows):
        return np.float64 if rows.dtype == np.float64 else np.float32
    import torch

    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def as_dtype(array: Array, dtype: Any) -> Array:
    """The array itself where it has that dtype."""
    return array.to(dtype) if is_torch(array) else array.astype(dtype, copy=False)


def mark_written(out: Array) -> None:
    """Let torch know that the tensor is about to be overwritten: it may have saved it for a backward pass."""
    import torch

    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires grad, which a collective would lose")
    torch.autograd.graph.increment_version(out)


def overlap(a: Array, b: Array) -> bool:
    """Whether two contiguous arrays of one kind and device share memory."""
    if not is_torch(a):
        return bool(np.may_share_memory(a, b))
    end_of_a = a.data_ptr() + a.nbytes
    end_of_b = b.data_ptr() + b.nbytes
    return bool(a.data_ptr() < end_of_b and b.data_ptr() < end_of_a)


def copy_rows(dst: Array, src: Array) -> None:
    as_bytes(dst)[:] = as_bytes(src)


def copy_blocks(dst: Array, src: Array, order: Array, sizes: Array | None = None) -> None:
    """dst [n, ...] = the blocks of src [n, ...], one behind the other, in the order `order` [N].

    Block i of src has sizes[i] rows, or one row where sizes is None. order and sizes are numpy arrays; of rows on a
    device they may be tensors there.
    """
    if on_host(src):
        copy_host_blocks(as_bytes(dst), as_bytes(src), order, sizes, row_bytes(src))
    elif is_cupy(src):
        import cupy

        src.take(cupy.asarray(order if sizes is None else _row_index(order, sizes)), axis=0, out=dst)
    else:
        _copy_blocks_on_device(dst, src, order, sizes)


def _row_index(order: Counts, sizes: Counts) -> Counts:
    """For each row of the result, which row of the source it is."""
    source_starts = (np.cumsum(sizes) - sizes)[order]
    counts = sizes[order]
    result_starts = np.cumsum(counts) - counts
    # Inside a block the index grows by 1 as the place in the result does: only the distance of the two differs.
    distances = np.repeat(source_starts - result_starts, counts)
    return distances + np.arange(counts.sum(), dtype=np.int64)


def _copy_blocks_on_device(dst: Array, src: Array, order: Array, sizes: Array | None) -> None:
    """One gather of rows by their index. The index is made on the device: only what each block has goes there."""
    import torch

    index = torch.as_tensor(order, device=src.device)
    if sizes is not None:
        sizes = torch.as_tensor(sizes, device=src.device)
        counts = sizes[index]
        # As in _row_index.
        distances = (sizes.cumsum(0) - sizes)[index] - (counts.cumsum(0) - counts)
        rows = torch.arange(len(dst), device=src.device)
        index = distances.repeat_interleave(counts, output_size=len(dst)) + rows
    word = _widest_word(src, dst)
    torch.index_select(_as_words(src, word), 0, index, out=_as_words(dst, word))


def _widest_word(src: Array, dst: Array) -> Any:
    """The widest integer type that divides a row and both addresses: one fast kernel for every dtype."""
    import torch

    ends = row_bytes(src) | src.data_ptr() | dst.data_ptr()
    return next(t for t in (torch.int64, torch.int32, torch.int16, torch.uint8) if ends % t.itemsize == 0)


def _as_words(rows: Array, word: Any) -> Array:
    words = row_bytes(rows) // word.itemsize
    flat = rows.detach().reshape(-1)
    return flat.view(word).reshape(rows.shape[0], words) if flat.dtype != word else flat.reshape(rows.shape[0], words)
