// How the blocks of one launch tell each other what they counted, without a barrier and without clearing memory.
//
// A record is 16 bytes, written and read as a whole: three words and the number of the launch. Who needs a record reads
// it until it bears the number of this launch. Launches that share a `board` run one after the other; it starts as zeros.
//
// THREADS     threads of a block
// COUNT_BITS  8, 16 or 32: wide enough for the tokens of a block
#pragma once
#include "rows.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int COUNTS = 96 / COUNT_BITS;  // of one record
constexpr int RECORDS = (E + COUNTS - 1) / COUNTS;

__device__ inline uint4 read_record(const uint4* from) {
  uint4 r;
#if __CUDA_ARCH__ >= 700
  asm volatile("{ .reg .b128 t; ld.relaxed.gpu.global.b128 t, [%4]; .reg .b64 lo, hi; mov.b128 {lo, hi}, t; "
               "mov.b64 {%0, %1}, lo; mov.b64 {%2, %3}, hi; }"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(from)
               : "memory");
#endif
  return r;
}

__device__ inline void write_record(uint4* to, unsigned x, unsigned y, unsigned z, unsigned launch) {
  asm volatile("{ .reg .b128 t; .reg .b64 lo, hi; mov.b64 lo, {%1, %2}; mov.b64 hi, {%3, %4}; mov.b128 t, {lo, hi}; "
               "st.relaxed.gpu.global.b128 [%0], t; }" ::"l"(to),
               "r"(x), "r"(y), "r"(z), "r"(launch)
               : "memory");
}

// The records with the numbers first .. first + count * stride; all are on their way before the first is looked at.
template <int COUNT>
__device__ inline void await_records(const uint4* board, int first, int stride, int end, unsigned launch,
                                     uint4 (&record)[COUNT]) {
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    record[n] = make_uint4(0, 0, 0, launch);
    if (first + n * stride < end) record[n] = read_record(board + first + n * stride);
  }
#pragma unroll
  for (int n = 0; n < COUNT; ++n)
    while (record[n].w != launch) record[n] = read_record(board + first + n * stride);
}

// Publishes count[E] (shared memory) of this block: one record a thread.
__device__ inline void publish_counts(const unsigned* count, uint4* board, unsigned launch) {
  for (int v = threadIdx.x; v < RECORDS; v += THREADS) {
    unsigned word[3] = {0, 0, 0};
#pragma unroll
    for (int c = 0; c < COUNTS; ++c)
      if (v * COUNTS + c < E) word[c * COUNT_BITS / 32] |= count[v * COUNTS + c] << (c * COUNT_BITS % 32);
    write_record(board + static_cast<int64>(v) * gridDim.x + blockIdx.x, word[0], word[1], word[2], launch);
  }
}

// Adds up what all blocks published: total[E], and before[E] of the blocks that precede this one. A lane looks at
// BLOCKS_EACH blocks for each of NUMBERS records, all in flight together.
template <int NUMBERS, int BLOCKS_EACH>
__device__ inline void collect(const uint4* board, unsigned launch, int v, unsigned* total, unsigned* before) {
  constexpr int SUMS = COUNT_BITS == 32 ? 3 : 6;  // 8 bits: two counts in a word, 16 bits each
  const int lane = threadIdx.x % 32, blocks = gridDim.x;
  unsigned all[NUMBERS][SUMS] = {}, preceding[NUMBERS][SUMS] = {};
  for (int first = lane; first - lane < blocks; first += 32 * BLOCKS_EACH) {
    uint4 record[NUMBERS][BLOCKS_EACH];
#pragma unroll
    for (int r = 0; r < NUMBERS; ++r)
#pragma unroll
      for (int n = 0; n < BLOCKS_EACH; ++n) {
        record[r][n] = make_uint4(0, 0, 0, launch);
        if (v + r * WARPS < RECORDS && first + n * 32 < blocks)
          record[r][n] = read_record(board + static_cast<int64>(v + r * WARPS) * blocks + first + n * 32);
      }
#pragma unroll
    for (int r = 0; r < NUMBERS; ++r)
#pragma unroll
      for (int n = 0; n < BLOCKS_EACH; ++n) {
        while (record[r][n].w != launch)
          record[r][n] = read_record(board + static_cast<int64>(v + r * WARPS) * blocks + first + n * 32);
        const unsigned word[3] = {record[r][n].x, record[r][n].y, record[r][n].z};
        const bool precedes = first + n * 32 < static_cast<int>(blockIdx.x);
#pragma unroll
        for (int s = 0; s < SUMS; ++s) {
          unsigned part;
          if constexpr (COUNT_BITS == 8) part = word[s / 2] >> (8 * (s % 2)) & 0x00ff00ffu;
          if constexpr (COUNT_BITS == 16) part = word[s / 2] >> (16 * (s % 2)) & 0xffffu;
          if constexpr (COUNT_BITS == 32) part = word[s];
          all[r][s] += part;
          if (precedes) preceding[r][s] += part;
        }
      }
  }
#pragma unroll
  for (int r = 0; r < NUMBERS; ++r) {
#pragma unroll
    for (int s = 0; s < SUMS; ++s) {
      all[r][s] = __reduce_add_sync(0xffffffffu, all[r][s]);
      preceding[r][s] = __reduce_add_sync(0xffffffffu, preceding[r][s]);
    }
    if (lane < 2) {
      unsigned* to = lane == 0 ? total : before;
#pragma unroll
      for (int c = 0; c < COUNTS; ++c) {
        const int s = COUNT_BITS == 8 ? c / 4 * 2 + c % 2 : c, e = (v + r * WARPS) * COUNTS + c;
        unsigned value = lane == 0 ? all[r][s] : preceding[r][s];
        if (COUNT_BITS == 8) value = c / 2 % 2 ? value >> 16 : value & 0xffffu;
        if (e < E) to[e] = value;
      }
    }
  }
}

__device__ inline void collect_counts(const uint4* board, unsigned launch, unsigned* total, unsigned* before) {
  if (gridDim.x <= 32) {
    for (int v = threadIdx.x / 32; v < RECORDS; v += 3 * WARPS) collect<3, 1>(board, launch, v, total, before);
  } else {
    for (int v = threadIdx.x / 32; v < RECORDS; v += WARPS) collect<1, 5>(board, launch, v, total, before);
  }
}

// All blocks wait for each other; what they wrote to global memory before is visible after.
__device__ inline void wait_for_all(uint4* board, unsigned launch) {
  __syncthreads();
  if (gridDim.x == 1) return;
  if (threadIdx.x == 0) {
    __threadfence();
    write_record(board + blockIdx.x, 0, 0, 0, launch);
  }
  for (int block = threadIdx.x; block < gridDim.x; block += THREADS)
    while (read_record(board + block).w != launch) {
    }
  __threadfence();
  __syncthreads();
}
