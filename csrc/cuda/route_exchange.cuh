// How the blocks of one launch tell each other what they counted.
//
// All blocks of a launch run at once. They write their counts to the board, in words of 16 bytes that also hold the
// launch's tag, and wait for each other; then each adds up what it needs. A word with that tag is there: so nobody waits
// until all that a block wrote is visible. Launches that share a board run one after the other; it starts as zeros and
// is never cleared: its counters, and with them the tags, go on from launch to launch. A few blocks can instead be a
// cluster (sm_90), and write into each other's shared memory.
//
// The board, in words of 16 bytes:
//
//   [0, 2)               Header      arrivals, arrivals_before, aux
//   [2, 2 + 2 B)         Losses      of each of B blocks: two equal words (-, z, problems, tag)
//   [2 + 2 B, ...)       counts      [passes, B, VECTORS]: (counts, counts, counts, tag)
//
// The tag is the complement of the number of arrivals before the launch. Each launch adds some, so no word of an earlier
// launch has it (until 2^32 arrivals later, and each launch writes every word that it reads).
//
// What is ordered, and by what:
//
//   counts and losses    by nothing else than their tags. A word is loaded and stored as 16 bytes that cannot tear
//                        (ld / st .b128, sm_70 and later), so whoever sees the tag sees the numbers beside it.
//                        Relaxed is enough: no other memory depends on them.
//   header.arrivals      relaxed. wait_for_all<true> puts a fence.acq_rel before its arrival and after its wait; the two
//                        fences and the counter between them order all that any block wrote before (keys, places).
//   header.aux           relaxed: the sum and the number of blocks are in the one word that the atomic returns.
//   the rest of header   read at the start and written by the last block at the end of a launch; launches are ordered
//                        by the stream.
//
// In a cluster: cluster_arrive (release) and cluster_wait (acquire) order the making of barriers before words are sent
// to them; `send` completes bytes on the receiver's barrier and `await` (acquire) waits for them, so the words are there.
//
// THREADS     threads of a block
// CLUSTER     blocks of a cluster; 0: no clusters, the board is used
// COUNT_BITS  8, 16 or 32: wide enough for the tokens of a block
#pragma once
#include "route_select.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int COUNTS = 32 / COUNT_BITS;         // of 4 bytes
constexpr int SUMS = COUNT_BITS == 32 ? 3 : 6;  // numbers of 4 bytes that hold a word's counts summed over blocks
// The 16-byte words of a block, with 12 bytes of counts each. An even number: memory is written 32 bytes at a time, and
// what has been written in part must be fetched first.
constexpr int VECTORS = (E + 6 * COUNTS - 1) / (6 * COUNTS) * 2;
constexpr int SPREAD = VECTORS <= 32 ? 1 << log2_up(VECTORS) : 32;  // lanes that share a row
constexpr int ROWS_AT_ONCE = VECTORS <= 32 ? THREADS / SPREAD : WARPS;

constexpr int PART = 2 * WARPS * VECTORS * SUMS <= 16384 ? 2 * WARPS * VECTORS * SUMS : 0;  // words; 0: add at once

// body(i) for every i < N, shared out among the threads. How many rounds that takes is known to the compiler.
template <int N, typename Body>
__device__ inline void share_out(Body body) {
#pragma unroll 4
  for (int first = 0; first < N; first += THREADS)
    if (first + THREADS <= N || first + static_cast<int>(threadIdx.x) < N) body(first + static_cast<int>(threadIdx.x));
}

struct Header {
  unsigned arrivals, arrivals_before;  // at the barriers of all launches; when this launch began
  unsigned long long aux;              // what blocks have added, in units of 2^-40, times 4096, + their number
};

struct Losses {
  uint4 of_block, unused;
};

// One load of 16 bytes. As a pair of 8-byte loads it could see half of a word of this launch, and half of an older one.
__device__ inline uint4 load_word(const uint4* from) {
  unsigned long long low, high;
  asm volatile("{ .reg .b128 word; ld.relaxed.gpu.global.b128 word, [%2]; mov.b128 {%0, %1}, word; }"
               : "=l"(low), "=l"(high)
               : "l"(from)
               : "memory");
  return make_uint4(low, low >> 32, high, high >> 32);
}

__device__ inline void store_word(uint4* to, uint4 word) {
  const unsigned long long low = static_cast<unsigned long long>(word.y) << 32 | word.x;
  const unsigned long long high = static_cast<unsigned long long>(word.w) << 32 | word.z;
  asm volatile("{ .reg .b128 word; mov.b128 word, {%1, %2}; st.relaxed.gpu.global.b128 [%0], word; }" ::"l"(to), "l"(low),
               "l"(high)
               : "memory");
}

struct Board {
  Header* header;
  Losses* losses;  // [blocks]
  uint4* counts;   // [passes, blocks, VECTORS]
  unsigned before, tag, barriers = 0;

  __device__ explicit Board(uint4* board)
      : header(reinterpret_cast<Header*>(board)), losses(reinterpret_cast<Losses*>(board + 2)),
        counts(board + 2 + 2 * gridDim.x) {
    // Loaded once, here: the last block writes the next launch's number into it.
    before = *reinterpret_cast<volatile unsigned*>(&header->arrivals_before);
    tag = ~before;  // 0 after 4 billion arrivals
  }

  // Waits for the word.
  __device__ uint4 read(const uint4* from) const {
    uint4 word;
    do word = load_word(from);
    while (word.w != tag);
    return word;
  }

  // All blocks wait for each other. FENCED: whatever they wrote before is visible after.
  template <bool FENCED>
  __device__ void wait_for_all() {
    ++barriers;
    // The block's writes are before thread 0 in the barrier's order, and its fence passes them on: fences are cumulative.
    __syncthreads();
    if (threadIdx.x == 0) {
      if (FENCED) asm volatile("fence.acq_rel.gpu;" ::: "memory");
      asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(&header->arrivals) : "memory");
      unsigned seen;
      do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(&header->arrivals) : "memory");
      // As a difference: the counter goes round after 2^32 arrivals.
      while (static_cast<int>(seen - before - barriers * gridDim.x) < 0);
      if (FENCED) asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }
    __syncthreads();
  }

  // Adds a block's share of the aux loss, at most 1024, as an integer: the sum does not depend on the order. The result
  // is what the earlier ones had added. For one thread.
  __device__ unsigned long long add_aux(unsigned long long share) const { return atomicAdd(&header->aux, share); }

  __device__ static unsigned long long aux_share(float aux) {
    return (aux >= 0.0f && aux <= 1024.0f ? __float2ull_rn(aux * 1099511627776.0f) << 12 : 0) + 1;
  }

  // For the last block, when all have read the header; all_barriers: how often a launch waits for all.
  __device__ void close(unsigned all_barriers) const {
    header->arrivals_before = before + all_barriers * gridDim.x;
    header->aux = 0;
  }

  template <typename Count>
  __device__ void publish(int pass, Count count) const {
    uint4* const row = counts + (static_cast<int64>(pass) * gridDim.x + blockIdx.x) * VECTORS;
    share_out<VECTORS>([&](int v) {
      unsigned word[3] = {};
#pragma unroll
      for (int c = 0; c < 3 * COUNTS; ++c) {
        const int e = v * 3 * COUNTS + c;
        if (e < E) word[c / COUNTS] |= count(e) << (c * COUNT_BITS % 32);
      }
      store_word(row + v, make_uint4(word[0], word[1], word[2], tag));
    });
  }

  // Into shared memory: total[E], and preceding[E] of the blocks before this one. part: PART words.
  __device__ void collect(int pass, unsigned* total, unsigned* preceding, unsigned* part) const {
    constexpr int AT_ONCE = 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = gridDim.x;
    const uint4* const rows = counts + static_cast<int64>(pass) * blocks * VECTORS;
    // Sum s of word v is of this expert. 8-bit counts are added two at a time, in the halves of a number: for a sum
    // over 256 blocks 16 bits are enough, and its second expert is two further.
    const auto expert = [](int s, int v) { return v * 3 * COUNTS + (COUNT_BITS == 8 ? s / 2 * 4 + s % 2 : s); };
    // Without room for each warp's sums they are added here, by atomics.
    if (!PART) {
      share_out<E>([&](int e) { total[e] = preceding[e] = 0; });
      __syncthreads();
    }
    // Lanes go along the words of a block's row, groups of SPREAD lanes along the rows: neighbours read neighbours.
    for (int v = lane % SPREAD; v - lane % SPREAD < VECTORS; v += SPREAD) {
      unsigned all[SUMS] = {}, earlier[SUMS] = {};
      for (int first = threadIdx.x / SPREAD; first < blocks; first += ROWS_AT_ONCE * AT_ONCE) {
        // All loads are under way before the first is looked at: a round trip to the second cache is paid once.
        uint4 row[AT_ONCE];
        const auto place = [&](int n) { return rows + static_cast<int64>(first + n * ROWS_AT_ONCE) * VECTORS + v; };
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
          row[n] = make_uint4(0, 0, 0, tag);
          if (first + n * ROWS_AT_ONCE < blocks && v < VECTORS) row[n] = load_word(place(n));
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
          while (row[n].w != tag) row[n] = load_word(place(n));
          const unsigned word[3] = {row[n].x, row[n].y, row[n].z};
          const bool precedes = first + n * ROWS_AT_ONCE < static_cast<int>(blockIdx.x);
#pragma unroll
          for (int s = 0; s < SUMS; ++s) {
            unsigned value;
            if constexpr (COUNT_BITS == 8) value = word[s / 2] >> (8 * (s % 2)) & 0x00ff00ffu;  // two counts
            if constexpr (COUNT_BITS == 16) value = word[s / 2] >> (16 * (s % 2)) & 0xffffu;
            if constexpr (COUNT_BITS == 32) value = word[s];
            all[s] += value;
            if (precedes) earlier[s] += value;
          }
        }
      }
#pragma unroll
      for (int step = 16; step >= SPREAD; step /= 2)
#pragma unroll
        for (int s = 0; s < SUMS; ++s) {
          all[s] += __shfl_xor_sync(0xffffffffu, all[s], step);
          earlier[s] += __shfl_xor_sync(0xffffffffu, earlier[s], step);
        }
      if (lane >= SPREAD || v >= VECTORS) continue;
#pragma unroll
      for (int s = 0; s < SUMS; ++s)
        if (!PART) {  // COUNT_BITS is 16 or 32, or E beyond 512
          const int e = expert(s, v);
          if (e < E) atomicAdd(total + e, COUNT_BITS == 8 ? all[s] & 0xffffu : all[s]);
          if (e < E) atomicAdd(preceding + e, COUNT_BITS == 8 ? earlier[s] & 0xffffu : earlier[s]);
          if (COUNT_BITS == 8 && e + 2 < E) atomicAdd(total + e + 2, all[s] >> 16);
          if (COUNT_BITS == 8 && e + 2 < E) atomicAdd(preceding + e + 2, earlier[s] >> 16);
        } else {
          part[(2 * warp * SUMS + s) * VECTORS + v] = all[s];
          part[((2 * warp + 1) * SUMS + s) * VECTORS + v] = earlier[s];
        }
    }
    if (!PART) return;
    __syncthreads();
    // part[WARPS][2][SUMS][VECTORS]: of each warp the sums of all blocks, then of the blocks before this one.
    share_out<2 * SUMS * VECTORS>([&](int i) {
      unsigned sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += part[w * 2 * SUMS * VECTORS + i];
      unsigned* const to = i < SUMS * VECTORS ? total : preceding;
      const int e = expert(i / VECTORS % SUMS, i % VECTORS);
      if (e < E) to[e] = COUNT_BITS == 8 ? sum & 0xffffu : sum;
      if (COUNT_BITS == 8 && e + 2 < E) to[e + 2] = sum >> 16;
    });
  }
};

// ---- in a cluster --------------------------------------------------------------------------------------------------

constexpr int PACKED = (E + 7) / 8;  // 16-byte words that hold E counts of 16 bits

#if CLUSTER && __CUDA_ARCH__ >= 900

__device__ inline unsigned shared_place(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Makes `arrived` ready to be awaited once, after `bytes` have been sent to this block. For one thread.
__device__ inline void expect(unsigned long long* arrived, int bytes) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1; fence.mbarrier_init.release.cluster; "
               "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_place(arrived)),
               "r"(bytes)
               : "memory");
}

// Sends a word into the shared memory of block `rank` of the cluster, to the addresses that `to` and `arrived` have here.
__device__ inline void send(int rank, const uint4* to, uint4 word, const unsigned long long* arrived) {
  asm volatile("{ .reg .b32 there, bell; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 bell, %1, %2; "
               "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%3, %4, %5, %6}, [bell]; }" ::"r"(
                   shared_place(to)),
               "r"(shared_place(arrived)), "r"(rank), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}

__device__ inline void await(const unsigned long long* arrived) {
  // Phase 0 is the only one: a barrier is used once in a launch.
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0; @!done bra again; }" ::"r"(
          shared_place(arrived))
      : "memory");
}

#else

__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {}
__device__ inline void expect(unsigned long long*, int) {}
__device__ inline void send(int, uint4*, uint4, unsigned long long*) {}
__device__ inline void await(unsigned long long*) {}

#endif

// Hands this block's counts to every block of the cluster: words [CLUSTER, PACKED] there.
template <typename Count>
__device__ inline void share_counts(Count count, int rank, uint4* words, unsigned long long* arrived) {
  share_out<CLUSTER * PACKED>([&](int i) {
    const int first = i % PACKED * 8;
    unsigned word[4] = {};
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (first + c < E) word[c / 2] |= count(first + c) << (c % 2 * 16);
    send(i / PACKED, words + rank * PACKED + i % PACKED, make_uint4(word[0], word[1], word[2], word[3]), arrived);
  });
}

__device__ inline void add_shared_counts(const uint4* words, int rank, unsigned* total, unsigned* before) {
  share_out<E>([&](int e) {
    unsigned all = 0, preceding = 0;
#pragma unroll
    for (int block = 0; block < CLUSTER; ++block) {
      const unsigned count = reinterpret_cast<const unsigned short*>(words + block * PACKED)[e];
      all += count;
      if (block < rank) preceding += count;
    }
    total[e] = all;
    before[e] = preceding;
  });
}
