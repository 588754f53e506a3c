// What the kernels of DirectExchange share: memory that every rank of a node can write, and how to wait for it.
//
// Ranks run the same kernels in the same order. A buffer of symmetric memory takes what one kernel of each peer pushes.
// Each use of a buffer has a number, its tag: words that say "arrived" hold the tag, so nothing is ever reset. A rank
// pushes into a peer's buffer for the n-th time when the peer has given credit for the (n - 1)-th: it has read it all.
//
// ELEMENT     float, bfloat16, float16: of the caller's rows
// FP8         1: rows travel as e4m3, with a scale for each 128 values
// HIDDEN, TOP_K, MAX_TOKENS (a rank), RANKS, EXPERTS (a rank)
// ALIGNED     1: every row of the caller's tensors starts at a multiple of 16 bytes
// TAGGED      1: rows travel with the tag in every 8 bytes: twice the bytes, but nobody waits for a fence and a flag
// CHUNK       tokens that a block pushes at a time, a power of two up to 16; 1 if TAGGED
// SLICES      blocks that share such a chunk, each with its part of the rows
// UNROLL      pieces of a row that a thread has under way
#pragma once
#include "e4m3.cuh"
#include "rows.cuh"

#if FP8
using WIRE = unsigned char;
#else
using WIRE = ELEMENT;
#endif

constexpr int THREADS = 512;
constexpr int LANES = THREADS / CHUNK;              // threads that work on a token, whole warps
constexpr int WIDTH = 16 / sizeof(WIRE);            // values of a piece, the 16 bytes that a thread moves at once
constexpr int PIECES = (HIDDEN + WIDTH - 1) / WIDTH;
constexpr int SCALES = (HIDDEN + GROUP - 1) / GROUP;
constexpr int STEP = LANES * SLICES;                // from a thread's piece to its next one
constexpr int NUM_EXPERTS = RANKS * EXPERTS;

// These structs are those of exchange/direct_kernels.py.
struct Counters {
  unsigned uses;        // of the buffer, finished by this rank
  unsigned finished;    // blocks of the kernel that runs
  unsigned tickets;     // pieces of work that its blocks have taken
  unsigned tables;      // blocks that have made their part of the table, in all uses
  unsigned tiles;       // blocks that have counted their part, in all uses
};

struct Memory {
  char* of[8];                  // each rank's symmetric memory, as this rank sees it
  unsigned* failed;             // not 0: this rank has given up
  unsigned long long* report;   // on the host: [0] why, [1] rows that found no room, [2] ids of experts that are none
  long long limit;              // nanoseconds that a rank may wait for another
  int rank;
};

struct Buffer {
  Counters* counters;
  long long rows;      // [RANKS, MAX_TOKENS, PIECES] of 16 bytes, 32 if TAGGED
  long long scales;    // [RANKS, MAX_TOKENS, SCALES] of 4 bytes, 8 if TAGGED; in combine [MAX_TOKENS, TOP_K] of 8 bytes
  long long choices;   // [RANKS, MAX_TOKENS, TOP_K] of 16 bytes: expert, tag, weight, tag
  long long tokens;    // [RANKS] of 8 bytes: how many the rank has, tag
  long long arrived;   // [RANKS, MAX_TOKENS * SLICES] words: the tag
  long long credit;    // [RANKS] words: the last use that the rank has read
};

// What dispatch found out and combine needs. A slot is source rank * MAX_TOKENS + token.
struct Table {
  int* place;        // [slots, TOP_K] row among those ordered by expert; -1: not of this rank; -2: no room
  float* weight;     // [slots, TOP_K]
  int* slot;         // [max_rows] the slot that each of those rows is of
  int* offset;       // [EXPERTS + 1] the first row of each expert
  int* count;        // [EXPERTS] rows of each expert
  int* num_tokens;   // [RANKS]
  int* tiles;        // [table blocks, EXPERTS] scratch
  long long max_rows;
};

enum Phase { CREDIT = 1, TOKENS = 2, CHOICES = 3, ROWS = 4, INSIDE = 5, WEIGHTS = 6 };

// ---- words that others write ------------------------------------------------------------------------------------------

__device__ inline unsigned peek(const unsigned* word) {
  unsigned value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ inline unsigned acquire(const unsigned* word) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ inline void release(unsigned* word, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ inline void put_pair(uint2* to, unsigned value, unsigned tag) {
  asm volatile("st.volatile.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(value), "r"(tag) : "memory");
}
__device__ inline uint2 peek_pair(const uint2* from) {
  uint2 pair;
  asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" : "=r"(pair.x), "=r"(pair.y) : "l"(from) : "memory");
  return pair;
}
__device__ inline void put_tagged(uint4* to, unsigned a, unsigned b, unsigned tag) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %3, %2, %3};" ::"l"(to), "r"(a), "r"(b), "r"(tag) : "memory");
}
__device__ inline uint4 peek_tagged(const uint4* from) {
  uint4 word;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from)
               : "memory");
  return word;
}

template <typename T>
__device__ inline T* at(const Memory& memory, int rank, long long offset) {
  return reinterpret_cast<T*>(memory.of[rank] + offset);
}

__device__ inline long long now() {
  long long nanoseconds;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
}

// The first failure of a rank is the one that its host reads; from then on nothing waits any more.
__device__ inline void fail(const Memory& memory, int phase, int peer, unsigned tag) {
  if (atomicExch(memory.failed, 1u) != 0) return;
  *reinterpret_cast<volatile unsigned long long*>(memory.report) =
      static_cast<unsigned long long>(tag) << 32 | peer << 8 | phase;
  __threadfence_system();
}

// Spins until ready(). False if this rank has given up, which it does when a peer lets it wait too long.
template <typename Ready>
__device__ inline bool wait(const Memory& memory, int phase, int peer, unsigned tag, Ready ready) {
  for (long long start = 0;;) {
    for (int i = 0; i < 64; ++i)
      if (ready()) return true;
    if (peek(memory.failed)) return false;
    const long long time = now();
    if (start == 0) start = time;
    if (time - start > memory.limit) {
      fail(memory, phase, peer, tag);
      return false;
    }
  }
}

// ---- rows -------------------------------------------------------------------------------------------------------------

// Piece i of a row of the caller's; zeros beyond its end.
template <typename T>
__device__ inline uint4 load_piece(const T* row, int i) {
  constexpr int N = 16 / sizeof(T);
  if constexpr (ALIGNED) {
    return i * N < HIDDEN ? __ldg(reinterpret_cast<const uint4*>(row) + i) : uint4{};
  } else {
    Piece<T, N> piece = {};
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (i * N + n < HIDDEN) piece.value[n] = row[i * N + n];
    return *reinterpret_cast<uint4*>(&piece);
  }
}

template <typename T>
__device__ inline void store_piece(T* row, int i, uint4 piece) {
  constexpr int N = 16 / sizeof(T);
  if constexpr (ALIGNED && HIDDEN % N == 0) {
    if (i * N < HIDDEN) __stcs(reinterpret_cast<uint4*>(row) + i, piece);
  } else {
    const auto& values = *reinterpret_cast<const Piece<T, N>*>(&piece);
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (i * N + n < HIDDEN) row[i * N + n] = values.value[n];
  }
}

// Piece `index` of a rank's buffer.
__device__ inline void push(const Memory& memory, const Buffer& buffer, int rank, long long index, uint4 piece,
                            unsigned tag) {
  uint4* to = at<uint4>(memory, rank, buffer.rows);
  if constexpr (TAGGED) {
    put_tagged(to + 2 * index, piece.x, piece.y, tag);
    put_tagged(to + 2 * index + 1, piece.z, piece.w, tag);
  } else {
    to[index] = piece;
  }
}

// Piece `index` of this rank's buffer, which `from` has pushed. Unless TAGGED the caller has waited for it.
__device__ inline uint4 pushed(const Memory& memory, const Buffer& buffer, int from, long long index, unsigned tag) {
  const uint4* rows = at<uint4>(memory, memory.rank, buffer.rows);
  if constexpr (TAGGED) {
    uint4 a, b;
    wait(memory, ROWS, from, tag, [&] {
      a = peek_tagged(rows + 2 * index);
      b = peek_tagged(rows + 2 * index + 1);
      return a.y == tag && a.w == tag && b.y == tag && b.w == tag;
    });
    return {a.x, a.z, b.x, b.z};
  } else {
    return __ldcg(rows + index);
  }
}

__device__ inline float to_float(const uint2& pair) { return __uint_as_float(pair.x); }

__device__ inline uint2 wait_for_pair(const Memory& memory, int phase, int from, long long offset, long long index,
                                      unsigned tag) {
  uint2 pair = {};
  wait(memory, phase, from, tag, [&] {
    pair = peek_pair(at<uint2>(memory, memory.rank, offset) + index);
    return pair.y == tag;
  });
  return pair.y == tag ? pair : uint2{};
}

// ---- chunks -----------------------------------------------------------------------------------------------------------

__device__ inline int num_items(int num_tokens) { return (num_tokens + CHUNK - 1) / CHUNK * SLICES; }

// What a block works on at a time: a slice of CHUNK rows. Each thread has one of these tokens, and of its row the
// pieces first, first + STEP, ..
struct Item {
  int number, token, lane, first;

  __device__ explicit Item(int number) : number(number) {
    token = number / SLICES * CHUNK + static_cast<int>(threadIdx.x) / LANES;
    lane = static_cast<int>(threadIdx.x) % LANES;
    first = number % SLICES * LANES + lane;
  }
  __device__ bool leads() const { return number % SLICES == 0; }  // the slice that has a token's single numbers
};

// Tells `to` that this block has pushed item `number` of what goes from this rank to it. All threads of the block.
__device__ inline void announce(const Memory& memory, const Buffer& buffer, int to, int number, unsigned tag) {
  release(at<unsigned>(memory, to, buffer.arrived) + memory.rank * MAX_TOKENS * SLICES + number, tag);
}

__device__ inline void wait_for_item(const Memory& memory, const Buffer& buffer, int from, int number, unsigned tag) {
  const unsigned* word = at<unsigned>(memory, memory.rank, buffer.arrived) + from * MAX_TOKENS * SLICES + number;
  wait(memory, ROWS, from, tag, [&] { return acquire(word) == tag; });
}

// Which ranks hold experts of this token, as bits.
__device__ inline unsigned ranks_of(const int* expert, int token) {
  unsigned ranks = 0;
  for (int j = 0; j < TOP_K; ++j) {
    const unsigned id = static_cast<unsigned>(__ldg(expert + static_cast<long long>(token) * TOP_K + j));
    if (id < NUM_EXPERTS) ranks |= 1u << id / EXPERTS;
  }
  return ranks;
}

// Before a block pushes. All threads of the block.
__device__ inline void wait_for_credit(const Memory& memory, const Buffer& buffer, unsigned tag) {
  if (threadIdx.x < RANKS) {
    const unsigned* credit = at<unsigned>(memory, memory.rank, buffer.credit) + threadIdx.x;
    wait(memory, CREDIT, threadIdx.x, tag, [&] { return static_cast<int>(acquire(credit) - (tag - 1)) >= 0; });
  }
  __syncthreads();
}

__device__ inline void give_credit(const Memory& memory, long long credit, unsigned use) {
  for (int rank = 0; rank < RANKS; ++rank) release(at<unsigned>(memory, rank, credit) + memory.rank, use);
}

// The end of a block; true for one thread, of the last block of all. The next kernel uses the buffer anew.
__device__ inline bool finish(const Buffer& buffer, unsigned tag) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  __threadfence();
  Counters& counters = *buffer.counters;
  if (atomicAdd(&counters.finished, 1u) + 1 != gridDim.x) return false;
  counters.finished = 0;
  counters.tickets = 0;
  counters.uses = tag;
  __threadfence();
  return true;
}

// The next piece of work of this launch, the same for all threads of the block.
__device__ inline int take_ticket(const Buffer& buffer) {
  __shared__ int ticket;
  __syncthreads();
  if (threadIdx.x == 0) ticket = static_cast<int>(atomicAdd(&buffer.counters->tickets, 1u));
  __syncthreads();
  return ticket;
}
