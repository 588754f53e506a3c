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
// BLOCKS      of a kernel; THREADS of a block
// CHUNK       tokens that a block pushes at a time, a power of two up to THREADS / 32; 1 if TAGGED
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

constexpr int LANES = THREADS / CHUNK;              // threads that work on a token, whole warps
constexpr int WIDTH = 16 / sizeof(WIRE);            // values of a piece, the 16 bytes that a thread moves at once
constexpr int PIECES = (HIDDEN + WIDTH - 1) / WIDTH;
constexpr int SCALES = (HIDDEN + GROUP - 1) / GROUP;
constexpr int STEP = LANES * SLICES;                // from a thread's piece to its next one
constexpr int NUM_EXPERTS = RANKS * EXPERTS;
constexpr int MOST_SLICES = 16;                     // for which Shape.layout has room
static_assert(SLICES <= MOST_SLICES && (SLICES - 1) * LANES < PIECES, "a slice has no room, or no piece");

// These structs are those of exchange/direct_kernels.py.
struct Counters {
  unsigned finished;      // blocks of the kernel that runs
  unsigned tickets;       // pieces of work that its blocks have taken
  unsigned tables;        // blocks that have made their part of the table, in all uses
  unsigned tiles;         // blocks that have counted their part, in all uses
  unsigned uses[BLOCKS];  // of the buffer, finished by each block
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
  long long arrived;   // [RANKS, MAX_TOKENS * MOST_SLICES] words: the tag, by item
  long long credit;    // [RANKS, BLOCKS] words: the last use that the rank's block has read
};

// What dispatch found out and combine needs. A slot is source rank * MAX_TOKENS + token.
struct Table {
  int* place;        // [slots, TOP_K] row among those ordered by expert; -1: not of this rank; -2: no room
  float* weight;     // [slots, TOP_K]
  int* slot;         // [max_rows] the slot that each of those rows is of
  int* offset;       // [EXPERTS + 1] the first row of each expert, at most max_rows
  int* count;        // [EXPERTS] rows of each expert
  int* num_tokens;   // [RANKS]
  int* expert;       // [num_tokens, TOP_K] this rank's choices: a copy, the caller may change its own
  int* tiles;        // [table blocks, EXPERTS] scratch
  long long max_rows;  // that there is room for; in combine and its backward, that the caller has given
};

enum Phase { CREDIT = 1, TOKENS = 2, CHOICES = 3, ROWS = 4, INSIDE = 5, WEIGHTS = 6, USES = 7 };

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

// How long one wait may last.
struct Patience {
  long long start = 0;

  // Whether this rank has given up, which it does when a peer lets it wait too long.
  __device__ bool over(const Memory& memory, int phase, int peer, unsigned tag) {
    if (peek(memory.failed)) return true;
    const long long time = now();
    if (start == 0) start = time;
    if (time - start <= (phase == INSIDE ? 2 : 1) * memory.limit) return false;  // its own blocks may wait for a peer
    fail(memory, phase, peer, tag);
    return true;
  }
};

// Spins until ready(). False if the rank has given up.
template <typename Ready>
__device__ inline bool wait(const Memory& memory, int phase, int peer, unsigned tag, Ready ready) {
  for (Patience patience;;) {
    for (int i = 0; i < 64; ++i)
      if (ready()) return true;
    if (patience.over(memory, phase, peer, tag)) return false;
  }
}

// The same for a whole warp, whose threads call ready() together and get the same answer.
template <typename Ready>
__device__ inline bool wait_together(const Memory& memory, int phase, int peer, unsigned tag, Ready ready) {
  for (Patience patience;;) {
    for (int i = 0; i < 64; ++i)
      if (ready()) return true;
    if (__any_sync(~0u, patience.over(memory, phase, peer, tag))) return false;
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

// Pieces first .. first + 31 of the row in a slot of a rank's buffer, one from each lane; a whole warp. TAGGED ones
// change lanes, so that what a warp stores at a time is in one stretch.
__device__ inline void push(const Memory& memory, const Buffer& buffer, int rank, long long slot, int first,
                            uint4 piece, unsigned tag) {
  const int lane = threadIdx.x % 32;
  if constexpr (TAGGED) {
    uint4* to = at<uint4>(memory, rank, buffer.rows) + (slot * PIECES + first) * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int from = half * 16 + lane / 2;
      const unsigned x = __shfl_sync(~0u, piece.x, from), y = __shfl_sync(~0u, piece.y, from);
      const unsigned z = __shfl_sync(~0u, piece.z, from), w = __shfl_sync(~0u, piece.w, from);
      if (first + from < PIECES) put_tagged(to + half * 32 + lane, lane % 2 ? z : x, lane % 2 ? w : y, tag);
    }
  } else if (first + lane < PIECES) {
    at<uint4>(memory, rank, buffer.rows)[slot * PIECES + first + lane] = piece;
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

__device__ constexpr int num_items(int num_tokens) { return (num_tokens + CHUNK - 1) / CHUNK * SLICES; }

// With few items each block has its own; else blocks take tickets.
constexpr bool TICKETS = !TAGGED && num_items(MAX_TOKENS) > 2 * BLOCKS;

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
  // The first scale that the thread copies; the next one is STEP further. Together, those of this slice's pieces.
  __device__ int first_scale() const {
    constexpr int EACH = LANES * WIDTH / GROUP;
    return number % SLICES * EACH + lane / EACH * EACH * SLICES + lane % EACH;
  }
};

// The words of the items that come from a rank. They are that rank's however its kernels slice rows: what it announces
// and nobody waits for can be late, and must not fall on another rank's.
__device__ inline unsigned* words_of(const Memory& memory, const Buffer& buffer, int at_rank, int from) {
  return at<unsigned>(memory, at_rank, buffer.arrived) + static_cast<long long>(from) * MAX_TOKENS * MOST_SLICES;
}

// Tells `to` that this block has pushed item `number` of what goes from this rank to it. All threads of the block.
__device__ inline void announce(const Memory& memory, const Buffer& buffer, int to, int number, unsigned tag) {
  release(words_of(memory, buffer, to, memory.rank) + number, tag);
}

__device__ inline void wait_for_item(const Memory& memory, const Buffer& buffer, int from, int number, unsigned tag) {
  const unsigned* word = words_of(memory, buffer, memory.rank, from) + number;
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

// The tag of this use, once peers have given credit for the last one; 0 if the rank has given up. All threads of the
// block, after they have started the loads of what they will push: all these loads are under way at the same time. (What
// is pushed depends on the credit, so it cannot go ahead of it, acquire or not.)
__device__ inline unsigned enter_to_push(const Memory& memory, const Buffer& buffer) {
  const unsigned* credit = at<unsigned>(memory, memory.rank, buffer.credit);
  const unsigned uses = peek(&buffer.counters->uses[blockIdx.x]);
  bool failed = peek(memory.failed);
  if (uses + 1 == 0) fail(memory, USES, memory.rank, 0);  // tag 0 is none
  for (int i = threadIdx.x; i < RANKS * BLOCKS; i += THREADS)  // without credit nothing is pushed: a late peer may read
    failed |= !wait(memory, CREDIT, i / BLOCKS, uses + 1, [&] { return static_cast<int>(peek(credit + i) - uses) >= 0; });
  return __syncthreads_or(failed) ? 0 : uses + 1;
}

// The same for a block that only receives.
__device__ inline unsigned enter(const Memory& memory, const Buffer& buffer) {
  const unsigned failed = peek(memory.failed), uses = peek(&buffer.counters->uses[blockIdx.x]);
  if (uses + 1 == 0) fail(memory, USES, memory.rank, 0);
  return __syncthreads_or(failed) ? 0 : uses + 1;
}

// This block has read what it needs of a buffer. One thread.
__device__ inline void give_credit(const Memory& memory, long long credit, int block, unsigned use) {
  for (int rank = 0; rank < RANKS; ++rank)
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at<unsigned>(memory, rank, credit) + memory.rank * BLOCKS + block),
                 "r"(use)
                 : "memory");
}

// The end of a block; true for one of its threads. What the block has read is in its registers: no fence is needed
// before others may write there.
template <bool TOOK_TICKETS>
__device__ inline bool finish(const Buffer& buffer, unsigned tag) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  Counters& counters = *buffer.counters;
  counters.uses[blockIdx.x] = tag;
  if (TOOK_TICKETS && atomicAdd(&counters.finished, 1u) + 1 == BLOCKS) counters.finished = counters.tickets = 0;
  return true;
}

// The n-th piece of work of this block, the same for all its threads.
__device__ inline int next_ticket(const Buffer& buffer, int n) {
  if (!TICKETS) return n * BLOCKS + blockIdx.x;
  __shared__ int ticket;
  __syncthreads();
  if (threadIdx.x == 0) ticket = static_cast<int>(atomicAdd(&buffer.counters->tickets, 1u));
  __syncthreads();
  return ticket;
}
