// What the kernels of DirectExchange share: memory that every rank of a node can write, and how to wait for it.
//
// Ranks run the same kernels in the same order. A buffer of symmetric memory takes what one kernel of each peer pushes.
// Each use of a buffer has a number, its tag: words that say "arrived" hold the tag, so nothing is ever reset. A rank
// pushes into a peer's buffer for the n-th time when the peer has given credit for the (n - 1)-th: it has read it all.
//
// A buffer in the symmetric memory of rank r. Peers write it, each its own part, and the kernels of rank r read it:
//
//   rows     | from rank 0: token 0 | token 1 | .. | token MAX_TOKENS - 1 | from rank 1: token 0 | ..    PIECES of 16 bytes
//   scales   | as rows                                                                                   SCALES floats
//   choices  | as rows                              TOP_K of 16 bytes: | expert | tag | weight | tag |
//   tokens   | from rank 0 | from rank 1 | ..                            8 bytes: | number | tag |
//   arrived  | from rank 0: item 0 | item 1 | ..   | from rank 1: ..   a word: the tag, when the item's rows are there
//   credit   | of rank 0: block 0 | block 1 | ..   | of rank 1: ..   a word: the last use that the rank has read of its own buffer
//
//   a piece if TAGGED:  | 4 bytes | tag | 4 bytes | tag | 4 bytes | tag | 4 bytes | tag |, two stores of 16 bytes
//
// The order of memory operations between threads rests on these pairs, and on nothing else:
//
//   writer                                reader                                 orders
//   announce: st.release.sys              wait_for_item: ld.acquire.sys          a block's rows (and scales) before its flag
//   put_tagged, put_pair: one store       peek_tagged, peek_pair: one load       nothing: each 8 bytes hold data and its tag
//   give_credit: st.relaxed.sys           enter_to_push: ld.relaxed.sys          reads of use n before writes of use n + 1
//   meet: __threadfence, atomicAdd        meet: ld.acquire                       a table block's counts before the sums
//   end of make_table: the same           direct_dispatch: ld.acquire            the table before the copies of rows
//
// A flag is written and read by one thread of a block. __syncthreads joins the other threads to it: release and acquire
// are cumulative, so what they wrote before the barrier is visible with the flag. Counters that one kernel leaves to the
// next need no pair: a kernel begins after the one before it on the stream has ended.
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

// These structs are those of moecomm/exchange/direct/memory.py.
struct Counters {
  unsigned finished;      // blocks of the kernel that runs
  unsigned tickets;       // pieces of work that its blocks have taken
  unsigned tables;        // blocks that have made their part of the table, in all uses
  unsigned tiles;         // blocks that have counted their part, in all uses
  // A count for each block, not one for all: a block knows the tag of its use without asking the others.
  unsigned uses[BLOCKS];  // of the buffer, finished by each block
};

struct Peers {
  char* memory[8];              // each rank's symmetric memory, as this rank sees it
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

// What dispatch finds out and combine needs: the tensors of a DirectPlan. A slot is source rank * MAX_TOKENS + token.
struct PlanTable {
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

// What a rank waits for: PHASES of moecomm/exchange/direct/launch.py.
enum Phase { CREDIT = 1, TOKENS = 2, CHOICES = 3, ROWS = 4, INSIDE = 5, WEIGHTS = 6, USES = 7 };

// ---- words that others write ------------------------------------------------------------------------------------------

// All are of .sys scope where another GPU may write: .gpu scope orders nothing between GPUs.

// A load that orders nothing, of what another thread may write at the same time.
__device__ inline unsigned peek(const unsigned* word) {
  unsigned value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// What the thread reads after it sees the value is what the writer had written before its release.
__device__ inline unsigned acquire(const unsigned* word) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline void release(unsigned* word, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

// Data and tag in one store of 8 or 16 bytes, without a fence. A reader that sees the tag in an aligned 8 bytes takes the
// 4 bytes beside it for the data of the same store. PTX promises less: it lets a vector access fall into its elements.
// But the hardware keeps an aligned 8 bytes of one store together, in its caches and over NVLink: NCCL's LL protocol
// relies on the same with the same instructions (`storeLL`, `readLL`). So the tag is in every 8 bytes, not in every 16.
// Volatile, so that the compiler neither keeps an old value nor leaves out a store or splits it.
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
__device__ inline T* at(const Peers& peers, int rank, long long offset) {
  return reinterpret_cast<T*>(peers.memory[rank] + offset);
}

// Nanoseconds of a clock that all multiprocessors share.
__device__ inline long long now() {
  long long nanoseconds;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
}

// The first failure of a rank is the one that its host reads; from then on nothing waits any more.
__device__ inline void fail(const Peers& peers, int phase, int peer, unsigned tag) {
  if (atomicExch(peers.failed, 1u) != 0) return;
  // One store of 8 bytes: the host polls this word and must not see half of it.
  *reinterpret_cast<volatile unsigned long long*>(peers.report) =
      static_cast<unsigned long long>(tag) << 32 | peer << 8 | phase;
  __threadfence_system();
}

// How long one wait may last.
struct Patience {
  long long start = 0;

  // Whether this rank has given up, which it does when a peer lets it wait too long.
  __device__ bool over(const Peers& peers, int phase, int peer, unsigned tag) {
    if (peek(peers.failed)) return true;
    const long long time = now();
    // The clock is not read before the first wait in vain: most waits are over at once.
    if (start == 0) start = time;
    // A block of this rank may itself be waiting for a peer, and must be the one that names it.
    if (time - start <= (phase == INSIDE ? 2 : 1) * peers.limit) return false;
    fail(peers, phase, peer, tag);
    return true;
  }
};

// Spins until ready(). False if the rank has given up. Looks 64 times between two looks at the clock and at `failed`,
// which cost more than ready().
template <typename Ready>
__device__ inline bool wait(const Peers& peers, int phase, int peer, unsigned tag, Ready ready) {
  for (Patience patience;;) {
    for (int i = 0; i < 64; ++i)
      if (ready()) return true;
    if (patience.over(peers, phase, peer, tag)) return false;
  }
}

// The same for a whole warp, whose threads call ready() together and get the same answer.
template <typename Ready>
__device__ inline bool wait_together(const Peers& peers, int phase, int peer, unsigned tag, Ready ready) {
  for (Patience patience;;) {
    for (int i = 0; i < 64; ++i)
      if (ready()) return true;
    // Lanes read the clock at different times: one that has lost patience takes the whole warp along.
    if (__any_sync(~0u, patience.over(peers, phase, peer, tag))) return false;
  }
}

// ---- rows -------------------------------------------------------------------------------------------------------------

// Piece i of a row of the caller's; zeros beyond its end.
template <typename T>
__device__ inline uint4 load_piece(const T* row, int i) {
  constexpr int N = 16 / sizeof(T);
  if constexpr (ALIGNED) {
    // The kernel does not write what it loads by this function: __ldg may use the read-only path.
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
    // Streaming: rows are larger than the cache, and nobody in this kernel reads them again.
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
__device__ inline void push(const Peers& peers, const Buffer& buffer, int rank, long long slot, int first,
                            uint4 piece, unsigned tag) {
  const int lane = threadIdx.x % 32;
  if constexpr (TAGGED) {
    uint4* to = at<uint4>(peers, rank, buffer.rows) + (slot * PIECES + first) * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Lanes 2n and 2n + 1 store the halves of the piece of lane `from`: 32 lanes fill 512 bytes without a gap.
      const int from = half * 16 + lane / 2;
      const unsigned x = __shfl_sync(~0u, piece.x, from), y = __shfl_sync(~0u, piece.y, from);
      const unsigned z = __shfl_sync(~0u, piece.z, from), w = __shfl_sync(~0u, piece.w, from);
      if (first + from < PIECES) put_tagged(to + half * 32 + lane, lane % 2 ? z : x, lane % 2 ? w : y, tag);
    }
  } else if (first + lane < PIECES) {
    at<uint4>(peers, rank, buffer.rows)[slot * PIECES + first + lane] = piece;
  }
}

// Piece `index` of this rank's buffer, which `from` has pushed. Unless TAGGED the caller has waited for it.
__device__ inline uint4 pushed(const Peers& peers, const Buffer& buffer, int from, long long index, unsigned tag) {
  const uint4* rows = at<uint4>(peers, peers.rank, buffer.rows);
  if constexpr (TAGGED) {
    uint4 a, b;
    wait(peers, ROWS, from, tag, [&] {
      a = peek_tagged(rows + 2 * index);
      b = peek_tagged(rows + 2 * index + 1);
      return a.y == tag && a.w == tag && b.y == tag && b.w == tag;
    });
    return {a.x, a.z, b.x, b.z};
  } else {
    // Past the first cache, which may hold a line of an earlier use of the buffer.
    return __ldcg(rows + index);
  }
}

// The float of a pair of data and tag.
__device__ inline float to_float(const uint2& pair) { return __uint_as_float(pair.x); }

// The pair at `index` of an array of this rank's buffer; zeros if the rank has given up.
__device__ inline uint2 wait_for_pair(const Peers& peers, int phase, int from, long long offset, long long index,
                                      unsigned tag) {
  uint2 pair = {};
  wait(peers, phase, from, tag, [&] {
    pair = peek_pair(at<uint2>(peers, peers.rank, offset) + index);
    return pair.y == tag;
  });
  return pair.y == tag ? pair : uint2{};
}

// ---- chunks -----------------------------------------------------------------------------------------------------------

__device__ constexpr int num_items(int num_tokens) { return (num_tokens + CHUNK - 1) / CHUNK * SLICES; }

// With few items each block has its own; else blocks take tickets, because those that push begin to receive later than the
// others. TAGGED rows are few, and an atomic operation would take longer than what it balances.
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
  // The first scale that the thread copies; the next one is STEP further. Together, those of this slice's pieces: a block
  // waits for the flag of its own slice alone, so it must not copy scales that another slice brings.
  __device__ int first_scale() const {
    constexpr int EACH = LANES * WIDTH / GROUP;
    return number % SLICES * EACH + lane / EACH * EACH * SLICES + lane % EACH;
  }
};

// The words of the items that come from a rank. They are that rank's however its kernels slice rows: what it announces
// and nobody waits for can be late, and must not fall on another rank's.
__device__ inline unsigned* words_of(const Peers& peers, const Buffer& buffer, int at_rank, int from) {
  return at<unsigned>(peers, at_rank, buffer.arrived) + static_cast<long long>(from) * MAX_TOKENS * MOST_SLICES;
}

// Tells `to` that this block has pushed item `number` of what goes from this rank to it. All threads of the block.
__device__ inline void announce(const Peers& peers, const Buffer& buffer, int to, int number, unsigned tag) {
  // Pairs with the acquire of wait_for_item. The block's other threads have stored their pieces before the caller's
  // __syncthreads, so the release covers these too.
  release(words_of(peers, buffer, to, peers.rank) + number, tag);
}

__device__ inline void wait_for_item(const Peers& peers, const Buffer& buffer, int from, int number, unsigned tag) {
  // Pairs with the release of announce. The caller's __syncthreads then lets the block's other threads read the rows.
  const unsigned* word = words_of(peers, buffer, peers.rank, from) + number;
  wait(peers, ROWS, from, tag, [&] { return acquire(word) == tag; });
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
__device__ inline unsigned enter_to_push(const Peers& peers, const Buffer& buffer) {
  const unsigned* credit = at<unsigned>(peers, peers.rank, buffer.credit);
  const unsigned uses = peek(&buffer.counters->uses[blockIdx.x]);
  bool failed = peek(peers.failed);
  if (uses + 1 == 0) fail(peers, USES, peers.rank, 0);  // tag 0 is none
  // Without credit nothing is pushed: a late peer may still read. The difference, not the values, is compared, because a
  // peer may be ahead.
  for (int i = threadIdx.x; i < RANKS * BLOCKS; i += THREADS)
    failed |= !wait(peers, CREDIT, i / BLOCKS, uses + 1, [&] { return static_cast<int>(peek(credit + i) - uses) >= 0; });
  return __syncthreads_or(failed) ? 0 : uses + 1;
}

// The same for a block that only receives.
__device__ inline unsigned enter(const Peers& peers, const Buffer& buffer) {
  const unsigned failed = peek(peers.failed), uses = peek(&buffer.counters->uses[blockIdx.x]);
  if (uses + 1 == 0) fail(peers, USES, peers.rank, 0);
  return __syncthreads_or(failed) ? 0 : uses + 1;
}

// This block has read what it needs of a buffer. One thread, after `finish`. Relaxed is enough: what the block has read is
// in its registers or was stored from there, so its loads are over; and a peer's stores depend on this word.
__device__ inline void give_credit(const Peers& peers, long long credit, int block, unsigned use) {
  for (int rank = 0; rank < RANKS; ++rank)
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at<unsigned>(peers, rank, credit) + peers.rank * BLOCKS + block),
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
  // The last block resets the tickets: all blocks have taken their last one by then, and the next kernel begins later.
  if (TOOK_TICKETS && atomicAdd(&counters.finished, 1u) + 1 == BLOCKS) counters.finished = counters.tickets = 0;
  return true;
}

// The n-th piece of work of this block, the same for all its threads.
__device__ inline int next_ticket(const Buffer& buffer, int n) {
  if (!TICKETS) return n * BLOCKS + blockIdx.x;
  __shared__ int ticket;
  // Nobody may still read the ticket of the round before.
  __syncthreads();
  if (threadIdx.x == 0) ticket = static_cast<int>(atomicAdd(&buffer.counters->tickets, 1u));
  __syncthreads();
  return ticket;
}
