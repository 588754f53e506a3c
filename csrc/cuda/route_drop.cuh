// Which assignments an overloaded expert keeps when the largest keys stay.
#pragma once
#include "rows.cuh"

// key[n] are an expert's keys in order of their flat index. place[i] becomes the slot of assignment i, or -1: the
// `capacity` largest keys are kept, of equal ones the first, and slots follow the order of the index. For a whole block.
__device__ inline void keep_largest(const unsigned* key, int n, int capacity, int* place) {
  __shared__ unsigned histogram[256], chosen[2];
  __shared__ int warp_sum[2][WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned prefix = 0, wanted = capacity;  // of the keys that begin with prefix, the wanted-th largest is the threshold
  // Radix selection, 8 bits of the key at a time from the top: four passes whatever the number of keys.
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += THREADS) histogram[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS)
      if (shift == 24 || key[i] >> (shift + 8) == prefix) atomicAdd(&histogram[key[i] >> shift & 255], 1u);
    __syncthreads();
    // At most 256 steps of one thread. At least `wanted` keys begin with prefix, so digit stays above -1.
    if (threadIdx.x == 0) {
      int digit = 255;
      for (; histogram[digit] < wanted; --digit) wanted -= histogram[digit];
      chosen[0] = prefix << 8 | digit;
      chosen[1] = wanted;
    }
    __syncthreads();
    prefix = chosen[0];
    wanted = chosen[1];
  }
  // prefix is now the threshold itself, and `wanted` of the keys equal to it stay: the first ones in order of the index.
  // The keys are walked in that order, THREADS at a time, with two prefix sums: over ties, then over what is kept.
  int ties = 0, kept = 0;  // so far
  for (int start = 0; start < n; start += THREADS) {
    const int i = start + threadIdx.x;
    const bool tie = i < n && key[i] == prefix;
    const unsigned below = (1u << lane) - 1;
    const unsigned tied = __ballot_sync(0xffffffffu, tie);
    if (lane == 0) warp_sum[0][warp] = __popc(tied);
    __syncthreads();
    int rank = ties + __popc(tied & below);
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) rank += warp_sum[0][w];
      ties += warp_sum[0][w];
    }
    const bool keep = i < n && (key[i] > prefix || (tie && rank < static_cast<int>(wanted)));
    const unsigned staying = __ballot_sync(0xffffffffu, keep);
    // The second sum has memory of its own: some warp may still read the first.
    if (lane == 0) warp_sum[1][warp] = __popc(staying);
    __syncthreads();
    int slot = kept + __popc(staying & below);
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) slot += warp_sum[1][w];
      kept += warp_sum[1][w];
    }
    if (i < n) place[i] = keep ? slot : -1;
    // Before the next round writes into warp_sum[0].
    __syncthreads();
  }
}
