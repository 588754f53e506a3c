// The backward of unpermute in one launch: grad_rows[row[t, j]] = weight[t, j] * grad_y[t] and
// grad_weight[t, j] = grad_y[t] . rows[row[t, j]]. grad_y and rows are read once.
//
// ELEMENT, WIDTH, TOP_K   as in unpermute.cu
// THREADS                 of a block, which works on one token
#include "rows.cuh"

using P = Piece<ELEMENT, WIDTH>;
constexpr int BATCH = TOP_K ? TOP_K : 8;
constexpr int WARPS = THREADS / 32;

// The blocks after the first num_tokens fill the empty rows of grad_rows. A dropped assignment's weight has gradient 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    unpermute_backward(const P* __restrict__ grad_y, const P* __restrict__ rows, const int* __restrict__ row,
                       const float* __restrict__ weight, const int* __restrict__ source, P* __restrict__ grad_rows,
                       float* __restrict__ grad_weight, int num_tokens, int pieces_per_row, int top_k, int num_rows) {
  wait_for_inputs();
  if (blockIdx.x >= num_tokens) {
    zero_empty_rows(source, num_rows, pieces_per_row, grad_rows, blockIdx.x - num_tokens);
    return;
  }
  // A dot product of each choice in the batch: lanes add theirs by shuffles, warps through this memory.
  __shared__ float part[WARPS][BATCH];
  const int k = TOP_K ? TOP_K : top_k;
  const int64 token = blockIdx.x;
  for (int j0 = 0; j0 < k; j0 += BATCH) {
    int place[BATCH];
    float factor[BATCH], dot[BATCH] = {};
    load_batch<BATCH, TOP_K != 0>(row + token * k, j0, k, -1, place);
    load_batch<BATCH, TOP_K != 0>(weight + token * k, j0, k, 0.0f, factor);
    for (int i = threadIdx.x; i < pieces_per_row; i += THREADS) {
      P piece[BATCH];
      const P grad = load_if<false>(true, grad_y + token * pieces_per_row + i);
      // The loads of all choices are under way before the first is used.
#pragma unroll
      for (int j = 0; j < BATCH; ++j)
        piece[j] = load_if<false>(place[j] >= 0, rows + static_cast<int64>(place[j]) * pieces_per_row + i);
#pragma unroll
      for (int j = 0; j < BATCH; ++j) {
        if (place[j] < 0) continue;
        float product[WIDTH];
#pragma unroll
        for (int n = 0; n < WIDTH; ++n) {
          dot[j] = fmaf(to_float(grad.value[n]), to_float(piece[j].value[n]), dot[j]);
          product[n] = to_float(grad.value[n]) * factor[j];
        }
        store<false>(grad_rows + static_cast<int64>(place[j]) * pieces_per_row + i, from_floats<P>(product));
      }
    }
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) dot[j] += __shfl_xor_sync(~0u, dot[j], distance);
      // All lanes have the sum: lane j writes that of choice j, so the stores go to different lanes.
      if (threadIdx.x % 32 == j) part[threadIdx.x / 32][j] = dot[j];
    }
    __syncthreads();
    if (threadIdx.x < BATCH && j0 + threadIdx.x < k) {
      float sum = 0;
      for (int warp = 0; warp < WARPS; ++warp) sum += part[warp][threadIdx.x];
      grad_weight[token * k + j0 + threadIdx.x] = sum;
    }
    // Before the next batch writes into part.
    __syncthreads();
  }
}
