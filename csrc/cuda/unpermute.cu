// unpermute: y[t] = residual[t] + sum over j = 0, 1, .. of weight[t, j] * rows[row[t, j]], summed in float32 in this order
// and rounded once. Without weights it is the backward of permute.
//
// ELEMENT   float, bfloat16, float16
// WIDTH     elements that a thread moves at once: 16 bytes' worth, or 1 where rows do not start at multiples of 16 bytes
// TOP_K     1, 2, 4, 8: k itself; 0: any k
// UNROLL    pieces of a thread
// READ_ONCE 1: what is read is the first to leave the second cache
#include "rows.cuh"

using P = Piece<ELEMENT, WIDTH>;
constexpr int BATCH = TOP_K ? TOP_K : 8;

// weight, residual: null for none. rows that are not read, -1 in row, may hold anything.
extern "C" __global__ void unpermute(const P* __restrict__ rows, const int* __restrict__ row,
                                     const float* __restrict__ weight, const P* __restrict__ residual,
                                     P* __restrict__ y, int num_tokens, int pieces_per_row, int top_k, int stride,
                                     int slices) {
  wait_for_inputs();
  const Place place(stride, slices, UNROLL);
  if (place.token >= num_tokens) return;
  const int k = TOP_K ? TOP_K : top_k;
  const int64 first = static_cast<int64>(place.token) * pieces_per_row + place.column;
  float sum[UNROLL][WIDTH] = {};
  for (int j0 = 0; j0 < k; j0 += BATCH) {
    int from[BATCH];
    float factor[BATCH];
    P piece[BATCH][UNROLL];
    load_batch<BATCH, TOP_K != 0>(row + static_cast<int64>(place.token) * k, j0, k, -1, from);
    if (weight) load_batch<BATCH, TOP_K != 0>(weight + static_cast<int64>(place.token) * k, j0, k, 0.0f, factor);
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        piece[j][u] = load_if<READ_ONCE>(from[j] >= 0 && place.column + u * stride < pieces_per_row,
                              rows + static_cast<int64>(from[j]) * pieces_per_row + place.column + u * stride);
    if (residual && j0 == 0)
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const P start = load_if<READ_ONCE>(place.column + u * stride < pieces_per_row, residual + first + u * stride);
#pragma unroll
        for (int n = 0; n < WIDTH; ++n) sum[u][n] = to_float(start.value[n]);
      }
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      if (from[j] < 0) continue;
      const float w = weight ? factor[j] : 1.0f;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
#pragma unroll
        for (int n = 0; n < WIDTH; ++n) sum[u][n] = fmaf(w, to_float(piece[j][u].value[n]), sum[u][n]);
    }
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u)
    if (place.column + u * stride < pieces_per_row) store<false>(y + first + u * stride, from_floats<P>(sum[u]));
}
