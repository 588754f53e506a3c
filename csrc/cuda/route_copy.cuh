// Rows of x on their way through shared memory to the rows of their experts, while and after the block decides.
//
// BULK  1: the copy engine moves whole rows (sm_90; rows are multiples of 16 bytes); 0: threads move WORDs
// SLOTS  rows of x that a block holds at once, for BULK
#pragma once
#include "rows.cuh"

using Word = WORD;

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

#if BULK && __CUDA_ARCH__ >= 900

// Warps whose first lane moves rows: copier c has tokens c, c + COPIERS, ...
constexpr int COPIERS = SLOTS < 8 ? (SLOTS < WARPS ? SLOTS : WARPS) : (WARPS < 8 ? WARPS : 8);
constexpr int DEPTH = SLOTS / COPIERS;          // rows that a copier has under way

struct Copier {
  const unsigned char* x;       // the block's first row
  unsigned char* ring;          // SLOTS rows
  unsigned long long* arrived;  // SLOTS barriers
  int tokens, row_bytes;

  __device__ static bool works() { return threadIdx.x % 32 == 0 && threadIdx.x / 32 < COPIERS; }
  __device__ int number() const { return threadIdx.x / 32; }

  __device__ void prepare() const {
    if (!works()) return;
    for (int d = 0; d < DEPTH; ++d)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrived + number() * DEPTH + d)));
    // The copy engine (the async proxy) sees the barriers that this thread has made, before it signals them.
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
  }

  // Starts to load this copier's n-th row.
  __device__ void load(int n) const {
    const int token = number() + n * COPIERS, slot = number() * DEPTH + n % DEPTH;
    if (token >= tokens) return;
    const unsigned barrier = shared_address(arrived + slot);
    // The barrier turns to its next phase when so many bytes have arrived. They are announced before the engine starts.
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(row_bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(ring + static_cast<int64>(slot) * row_bytes)),
                 "l"(x + static_cast<int64>(token) * row_bytes), "r"(row_bytes), "r"(barrier)
                 : "memory");
  }

  __device__ void start() const {
    if (works())
      for (int n = 0; n < DEPTH; ++n) load(n);
  }

  // row[token * K + j] says where each copy goes, -1: nowhere.
  __device__ void finish(const unsigned* row, unsigned char* rows) const {
    if (!works()) return;
    for (int n = 0; number() + n * COPIERS < tokens; ++n) {
      const int token = number() + n * COPIERS, slot = number() * DEPTH + n % DEPTH;
      const unsigned from = shared_address(ring + static_cast<int64>(slot) * row_bytes);
      // Acquire, the default: the row is in the slot. Each use of a slot is one phase, so phases alternate.
      asm volatile(
          "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(
              shared_address(arrived + slot)),
          "r"(n / DEPTH & 1)
          : "memory");
      // The engine reads what the engine wrote: no fence between generic and async accesses is needed. `row` is read by
      // the thread itself, after a barrier of the block.
      for (int j = 0; j < K; ++j) {
        const int to = static_cast<int>(row[token * K + j]);
        if (to >= 0)
          asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                           rows + static_cast<int64>(to) * row_bytes),
                       "r"(from), "r"(row_bytes)
                       : "memory");
      }
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      // The slot of the row before is free once its stores have read it.
      if (DEPTH == 1) {
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        load(n + 1);
      } else if (n > 0) {
        asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        load(n - 1 + DEPTH);
      }
    }
    // A block's shared memory is given away when it ends: the engine must have read it. Its writes end with the kernel.
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
};

#else

struct Copier {
  const unsigned char* x;
  unsigned char* ring;
  unsigned long long* arrived;
  int tokens, row_bytes;

  __device__ void prepare() const {}
  __device__ void start() const {}

  __device__ void finish(const unsigned* row, unsigned char* rows) const {
    for (int token = threadIdx.x / 32; token < tokens; token += THREADS / 32) {
      const Word* const from = reinterpret_cast<const Word*>(x + static_cast<int64>(token) * row_bytes);
      for (int i = threadIdx.x % 32; i < row_bytes / static_cast<int>(sizeof(Word)); i += 32) {
        const Word word = from[i];
        for (int j = 0; j < K; ++j) {
          const int to = static_cast<int>(row[token * K + j]);
          if (to >= 0) reinterpret_cast<Word*>(rows + static_cast<int64>(to) * row_bytes)[i] = word;
        }
      }
    }
  }
};

#endif

__device__ inline void zero_row(unsigned char* row, int row_bytes) {  // by one warp
  for (int i = threadIdx.x % 32; i < row_bytes / static_cast<int>(sizeof(Word)); i += 32)
    reinterpret_cast<Word*>(row)[i] = Word{};
}
