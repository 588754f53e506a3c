// permute into float8 e4m3: each 128 values of a row are divided by a scale of their own, amax / 448, and rounded.
//
// ELEMENT   float, bfloat16, float16
// ALIGNED   1: every row starts at a multiple of 16 bytes; 0: anywhere
// TOP_K     1, 2, 4, 8: k itself; 0: any k
#include "e4m3.cuh"
#include "rows.cuh"

constexpr int BATCH = TOP_K ? TOP_K : 8;
constexpr int WIDTH = ALIGNED ? 16 / sizeof(ELEMENT) : 4;  // values of a thread
constexpr int LANES = GROUP / WIDTH;
using P = Piece<ELEMENT, WIDTH>;
using Q = Piece<unsigned char, WIDTH>;

// scales [num_rows, groups of a row]. The blocks after the first copy_blocks fill the empty rows: zeros, scale 1.
extern "C" __global__ void permute_fp8(const ELEMENT* __restrict__ x, const int* __restrict__ row,
                                       const int* __restrict__ source, unsigned char* __restrict__ rows,
                                       float* __restrict__ scales, int num_tokens, int num_values, int top_k,
                                       int num_rows, int copy_blocks) {
  wait_for_inputs();
  const int groups = (num_values + GROUP - 1) / GROUP;
  if (blockIdx.x >= copy_blocks) {
    fill_empty_rows(source, num_rows, blockIdx.x - copy_blocks, [&](int64 empty, int lane) {
      for (int i = lane; i < num_values; i += 32) rows[empty * num_values + i] = 0;
      for (int i = lane; i < groups; i += 32) scales[empty * groups + i] = 1.0f;
    });
    return;
  }
  const int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int lane = threadIdx.x % LANES;
  const int token = static_cast<int>(i / LANES / groups);
  const int group = static_cast<int>(i / LANES - static_cast<int64>(token) * groups);
  const int start = group * GROUP + lane * WIDTH;
  const int num = token < num_tokens ? min(WIDTH, max(0, num_values - start)) : 0;

  // Threads beyond the last token have num = 0 and stay: the shuffles below need every lane of the warp.
  P piece = {};
  const ELEMENT* from = x + static_cast<int64>(token) * num_values + start;
  if (ALIGNED && num) piece = load_if<true>(true, reinterpret_cast<const P*>(from));
#pragma unroll
  for (int n = 0; n < WIDTH; ++n)
    if (!ALIGNED && n < num) piece.value[n] = from[n];

  float amax = 0;
#pragma unroll
  for (int n = 0; n < WIDTH; ++n) amax = fmaxf(amax, fabsf(to_float(piece.value[n])));
  // LANES neighbouring lanes hold one group of 128 values.
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2)
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, distance));
  const float scale = scale_of(amax);
  Q quantised;
#pragma unroll
  for (int n = 0; n < WIDTH; ++n) quantised.value[n] = to_e4m3(to_float(piece.value[n]) / scale);

  // The shuffles are done.
  if (token >= num_tokens) return;
  const int k = TOP_K ? TOP_K : top_k;
  for (int j0 = 0; j0 < k; j0 += BATCH) {
    int to[BATCH];
    load_batch<BATCH, TOP_K != 0>(row + static_cast<int64>(token) * k, j0, k, -1, to);
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      if (to[j] < 0) continue;
      unsigned char* place = rows + static_cast<int64>(to[j]) * num_values + start;
      if (ALIGNED && num) *reinterpret_cast<Q*>(place) = quantised;
#pragma unroll
      for (int n = 0; n < WIDTH; ++n)
        if (!ALIGNED && n < num) place[n] = quantised.value[n];
      if (lane == 0) scales[static_cast<int64>(to[j]) * groups + group] = scale;
    }
  }
}
