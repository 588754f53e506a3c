"""How fast this GPU's memory can go: a kernel that reads some streams and writes others, all contiguous."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

THREADS = 256

SOURCE = """
extern "C" __global__ void stream(const uint4* from, uint4* to, long long num) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= num) return;
  uint4 word[READS ? READS : 1], sum = {};
#pragma unroll
  for (int r = 0; r < READS; ++r) word[r] = __ldg(from + r * num + i);
#pragma unroll
  for (int r = 0; r < READS; ++r) sum.x ^= word[r].x, sum.y ^= word[r].y, sum.z ^= word[r].z, sum.w ^= word[r].w;
#pragma unroll
  for (int w = 0; w < WRITES; ++w) __stcs(to + w * num + i, sum);
  if (!WRITES && sum.x == 1 && sum.y == 2 && sum.z == 3 && sum.w == 4) *to = sum;
}
"""


@cache
def kernel(reads: int, writes: int) -> Any:
    import cupy

    options = ("-std=c++17", f"-DREADS={reads}", f"-DWRITES={writes}")
    return cupy.RawModule(code=SOURCE, options=options, backend="nvrtc").get_function("stream")


def stream(source: torch.Tensor, target: torch.Tensor, reads: int, writes: int, num_bytes: int) -> None:
    """Read `reads` times num_bytes of source, write `writes` times num_bytes of target, on torch's current stream."""
    import cupy
    import numpy as np

    num = num_bytes // 16
    here = cupy.cuda.Stream.from_external(torch.cuda.current_stream())
    with here:
        arguments = (np.uint64(source.data_ptr()), np.uint64(target.data_ptr()), np.int64(num))
        kernel(reads, writes)((-(-num // THREADS),), (THREADS,), arguments)
