// permute: copies each token's row of x to the rows of its experts. x is read once, its k copies are written. With k = 1
// a thread starts from the row that it writes, so that rows are written in order.
//
// WORD      what a thread moves at once: uint4 where every row starts at a multiple of 16 bytes, else the widest that fits
// TOP_K     1, 2, 4, 8: k itself; 0: any k
// UNROLL    words of a thread
// READ_ONCE 1: what is read is the first to leave the second cache
// KEEP      1: the rows fit in the second cache, and stay there for the kernel that reads them next
#include "rows.cuh"

constexpr int BATCH = TOP_K ? TOP_K : 8;

// row [num_tokens, top_k]: where each copy goes, -1: nowhere. The blocks after the first copy_blocks fill the empty rows.
extern "C" __global__ void permute(const WORD* __restrict__ x, const int* __restrict__ row,
                                   const int* __restrict__ source, WORD* __restrict__ rows, int num_tokens,
                                   int words_per_row, int top_k, int num_rows, int stride, int slices,
                                   int copy_blocks) {
  wait_for_inputs();
  const Place place(stride, slices, UNROLL);
  WORD word[UNROLL];
#if TOP_K == 1
  if (place.token >= num_rows) return;
  const int from = source[place.token];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int column = place.column + u * stride;
    word[u] = load_if<READ_ONCE>(from >= 0 && column < words_per_row, x + static_cast<int64>(from) * words_per_row + column);
  }
  WORD* const target = rows + static_cast<int64>(place.token) * words_per_row + place.column;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u)
    if (place.column + u * stride < words_per_row) store<KEEP>(target + u * stride, word[u]);
#else
  if (blockIdx.x >= copy_blocks) {
    zero_empty_rows(source, num_rows, words_per_row, rows, blockIdx.x - copy_blocks);
    return;
  }
  if (place.token >= num_tokens) return;
  const int k = TOP_K ? TOP_K : top_k;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int column = place.column + u * stride;
    word[u] = load_if<READ_ONCE>(column < words_per_row, x + static_cast<int64>(place.token) * words_per_row + column);
  }
  for (int j0 = 0; j0 < k; j0 += BATCH) {
    int to[BATCH];
    load_batch<BATCH, TOP_K != 0>(row + static_cast<int64>(place.token) * k, j0, k, -1, to);
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      if (to[j] < 0) continue;
      WORD* const target = rows + static_cast<int64>(to[j]) * words_per_row + place.column;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (place.column + u * stride < words_per_row) store<KEEP>(target + u * stride, word[u]);
    }
  }
#endif
}
