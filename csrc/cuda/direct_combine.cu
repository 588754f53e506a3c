// The experts' answers back to their tokens, one launch on every rank: for each token one row from each rank it went to.
//
// INPUT   0 compact: one answer in each slot, weighted and summed by the caller
//         1 expanded: an answer for each expert, ordered as the table says
// WEIGH   1: each answer of a token times its weight; 0: their plain sum, the backward of dispatch
// RETURN  1: a number for each choice comes back too, the gradient of its weight
// The macros of direct.cuh, with FP8 0. Sums are float32, in order of choice inside a rank and then of rank, and what
// travels is rounded to ELEMENT: the result is the same bits each time.
#include "direct.cuh"

using P = Piece<ELEMENT, WIDTH>;
constexpr int OTHERS = RANKS > 1 ? RANKS - 1 : 1;

// Adds what this rank has for a slot, of pieces i + u * STEP. Always in order of choice, by fmaf, whatever the order in
// which the rows arrived: the same bits each time.
__device__ inline void add_answers(const ELEMENT* rows, long long stride, const PlanTable& table, long long slot, int i,
                                   float (&sum)[UNROLL][WIDTH]) {
  constexpr int ANSWERS = INPUT == 0 ? 1 : TOP_K, BATCH = ANSWERS < 8 ? ANSWERS : 8;
  // Eight answers at a time: as many loads in flight as registers allow.
  for (int j0 = 0; j0 < ANSWERS; j0 += BATCH) {
    long long place[BATCH];
    float weight[BATCH];
    uint4 piece[BATCH][UNROLL];
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      const bool is = j0 + j < ANSWERS;
      place[j] = INPUT == 0 ? slot : is ? table.place[slot * TOP_K + j0 + j] : -1;
      // The caller may have passed fewer rows than dispatch returned: missing ones count as zeros (count_missing).
      if (INPUT == 1 && place[j] >= table.max_rows) place[j] = -1;
      weight[j] = WEIGH && is ? table.weight[slot * TOP_K + j0 + j] : 1;
    }
    // All loads before the first sum, so that they overlap.
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        piece[j][u] = place[j] >= 0 && i + u * STEP < PIECES ? load_piece(rows + place[j] * stride, i + u * STEP) : uint4{};
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      if (place[j] < 0) continue;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
#pragma unroll
        for (int n = 0; n < WIDTH; ++n)
          sum[u][n] = fmaf(weight[j], to_float(reinterpret_cast<const P*>(&piece[j][u])->value[n]), sum[u][n]);
    }
  }
}

// Answers that this rank should have for a slot, and was not given. Threads of the slice that leads.
__device__ inline void count_missing(const Peers& peers, const PlanTable& table, long long slot, const Item& item) {
  if (INPUT == 1 && item.leads() && item.lane < TOP_K && table.place[slot * TOP_K + item.lane] >= table.max_rows)
    atomicAdd(peers.report + 1, 1ull);
}

// Sums for the tokens of other ranks, pushed to them. Returns the tag, 0 if the rank has given up.
__device__ inline unsigned push_answers(const Peers& peers, const Buffer& buffer, const PlanTable& table,
                                        const ELEMENT* rows, long long stride, const float* numbers, int pushers) {
  const int lane = threadIdx.x % 32;
  unsigned tag = 0;
  int most = 0;
  for (int rank = 0; rank < RANKS; ++rank)
    if (rank != peers.rank) most = max(most, num_items(table.num_tokens[rank]));
  // Neighbouring blocks push to different ranks, and each rank begins with the one after it: no rank's links are flooded.
  for (int n = blockIdx.x; n < num_items(MAX_TOKENS) * OTHERS; n += pushers) {
    const int to = (peers.rank + 1 + n % OTHERS) % RANKS;
    const Item item(n / OTHERS);
    // Nothing is left for any rank. A block's first item is gone through in any case: with it the block gets its tag.
    if (item.number >= most && tag != 0) break;
    const bool is = item.token < MAX_TOKENS;
    const long long slot = static_cast<long long>(to) * MAX_TOKENS + (is ? item.token : 0);
    const long long home = static_cast<long long>(peers.rank) * MAX_TOKENS + item.token;
    bool any = false;
#pragma unroll
    for (int j = 0; j < TOP_K; ++j) any |= table.place[slot * TOP_K + j] != -1;
    // Lanes beyond the row's end stay in the loop: push exchanges pieces between all lanes of a warp.
    for (int start = item.first - item.lane; start < PIECES; start += STEP * UNROLL) {  // the same in all lanes
      const int i = start + item.lane;
      float sum[UNROLL][WIDTH] = {};
      add_answers(rows, stride, table, slot, i, sum);
      // The first sums are under way before the wait for credit.
      if (tag == 0) tag = enter_to_push(peers, buffer);
      if (tag == 0) return 0;
      if (!is || !any) continue;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        // What travels is rounded to ELEMENT, half the bytes of float32.
        const P piece = from_floats<P>(sum[u]);
        push(peers, buffer, to, home, i + u * STEP - lane, *reinterpret_cast<const uint4*>(&piece), tag);
      }
    }
    if (is) count_missing(peers, table, slot, item);
    // Gradients of weights take the place of scales, with a tag each: they are too few for a flag of their own.
    if (RETURN && is && item.leads() && item.lane < TOP_K && table.place[slot * TOP_K + item.lane] != -1)
      put_pair(at<uint2>(peers, to, buffer.scales) + static_cast<long long>(item.token) * TOP_K + item.lane,
               __float_as_uint(numbers[slot * TOP_K + item.lane]), tag);
    // Every thread has stored its pieces before one announces them.
    if (!TAGGED) {
      __syncthreads();
      if (threadIdx.x == 0) announce(peers, buffer, to, item.number, tag);
    }
  }
  return tag ? tag : enter(peers, buffer);
}

// The answer of a token of this rank: what came from other ranks, and what this rank's own experts answered.
__device__ inline void sum_answers(const Peers& peers, const Buffer& buffer, const PlanTable& table, const ELEMENT* rows,
                                   long long stride, const int* expert, const Item& item, const float* numbers,
                                   ELEMENT* y, float* returned, unsigned tag) {
  const long long home = static_cast<long long>(peers.rank) * MAX_TOKENS + item.token;
  const unsigned ranks = ranks_of(expert, item.token);
  count_missing(peers, table, home, item);
  for (int i = item.first; i < PIECES; i += STEP * UNROLL) {
    // Loads from all ranks first; only ranks that have experts of the token have pushed a row.
    uint4 piece[RANKS][UNROLL];
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank)
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const long long slot = static_cast<long long>(rank) * MAX_TOKENS + item.token;
        if (rank != peers.rank && ranks >> rank & 1 && i + u * STEP < PIECES)
          piece[rank][u] = pushed(peers, buffer, rank, slot * PIECES + i + u * STEP, tag);
      }
    float sum[UNROLL][WIDTH] = {};
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
      if (!(ranks >> rank & 1)) continue;
      // This rank's own part does not travel and is not rounded, but keeps its turn in the order of ranks.
      if (rank == peers.rank) {
        add_answers(rows, stride, table, home, i, sum);
        continue;
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
#pragma unroll
        for (int n = 0; n < WIDTH; ++n) sum[u][n] += to_float(reinterpret_cast<const P*>(&piece[rank][u])->value[n]);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const P result = from_floats<P>(sum[u]);
      if (i + u * STEP < PIECES)
        store_piece(y + static_cast<long long>(item.token) * HIDDEN, i + u * STEP, *reinterpret_cast<const uint4*>(&result));
    }
  }
  if (RETURN && item.leads() && item.lane < TOP_K) {
    const long long j = static_cast<long long>(item.token) * TOP_K + item.lane;
    const unsigned id = static_cast<unsigned>(expert[j]);
    // A choice that was dropped, or names no expert, gets a gradient of 0.
    float number = 0;
    if (id < NUM_EXPERTS && id / EXPERTS == peers.rank)
      number = numbers[home * TOP_K + item.lane];
    else if (id < NUM_EXPERTS)
      number = to_float(wait_for_pair(peers, WEIGHTS, id / EXPERTS, buffer.scales, j, tag));
    returned[j] = number;
  }
}

// rows, with `stride` elements from one to the next; expert [num_tokens, TOP_K] as dispatch took it.
// done: the counters of dispatch's buffer and the offset of its credits, if its rows are in there and are free now.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    direct_combine(const __grid_constant__ Peers peers, const __grid_constant__ Buffer buffer,
                   const __grid_constant__ PlanTable table, const ELEMENT* rows, long long stride, const int* expert,
                   const float* numbers, int num_tokens, ELEMENT* y, float* returned, int pushers,
                   const Counters* done, long long done_credit) {
  const bool pushes = RANKS > 1 && blockIdx.x < pushers;
  const unsigned tag =
      pushes ? push_answers(peers, buffer, table, rows, stride, numbers, pushers) : enter(peers, buffer);
  if (tag == 0) return;
  for (int n = 0;; ++n) {
    const int number = next_ticket(buffer, n);
    if (number >= num_items(num_tokens)) break;
    const Item item(number);
    if (!TAGGED) {
      // A thread for each rank: the waits overlap. Every rank announces every item, with rows or without.
      if (threadIdx.x < RANKS && threadIdx.x != peers.rank) wait_for_item(peers, buffer, threadIdx.x, number, tag);
      __syncthreads();
    }
    if (item.token < num_tokens)
      sum_answers(peers, buffer, table, rows, stride, expert, item, numbers, y, returned, tag);
  }
  if (!finish<TICKETS>(buffer, tag)) return;
  give_credit(peers, buffer.credit, blockIdx.x, tag);
  // The caller's answers were made from the compact rows of `done` by work before this kernel: these rows have been read.
  if (done) give_credit(peers, done_credit, blockIdx.x, done->uses[blockIdx.x]);
}
