// Rows to the ranks of their experts, one launch on every rank: each token's row once to each rank that needs it.
//
// OUTPUT  0 compact: every row stays in its slot, source rank * MAX_TOKENS + token; `table` says which are whose
//         1 expanded: a copy for each of this rank's experts, ordered by expert, source rank and token
//         2 backward of combine: rows is the gradient of what combine took. The table is that of the forward pass.
// The macros of direct.cuh, and
// TABLE_BLOCKS  unless OUTPUT is 2, the last blocks: they tell all ranks where this rank's tokens go, and make the table
//               from what all ranks tell
//
// The roles of blocks, OUTPUT 0 and 1. All run at the same time; a block that has pushed goes on to receive:
//
//   0 .. pushers - 1                    push_rows, then receive
//   pushers .. BLOCKS - TABLE_BLOCKS - 1           receive
//   the last TABLE_BLOCKS               push_choices, make_table, then receive (OUTPUT 1)
#include "direct.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int GROUP_TOKENS = 32 / TOP_K;  // tokens that a warp sorts at a time

struct Smem {
  int num_tokens[RANKS];  // of each rank
};

// ---- sending ----------------------------------------------------------------------------------------------------------

// Piece i of x's row as it travels. With FP8 eight neighbouring lanes share a scale.
__device__ inline uint4 wire_piece(const ELEMENT* row, int i, bool wanted, float& scale) {
#if FP8
  // A lane's piece is 16 values of e4m3, a group 128 values: the largest value is found over eight lanes by shuffles, in
  // which all lanes take part, also those beyond the end of the row.
  constexpr int N = 16 / sizeof(ELEMENT), PARTS = 16 / N;
  Piece<ELEMENT, N> part[PARTS] = {};
#pragma unroll
  for (int p = 0; p < PARTS; ++p)
    if (wanted) *reinterpret_cast<uint4*>(&part[p]) = load_piece(row, i * PARTS + p);
  float amax = 0;
#pragma unroll
  for (int n = 0; n < 16; ++n) amax = fmaxf(amax, fabsf(to_float(part[n / N].value[n % N])));
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2)
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, distance));
  scale = scale_of(amax);
  const Divisor divided(scale);
  Piece<unsigned short, 8> piece;
#pragma unroll
  for (int n = 0; n < 16; n += 2)
    piece.value[n / 2] = to_e4m3(divided(to_float(part[n / N].value[n % N])), divided(to_float(part[n / N].value[n % N + 1])));
  return *reinterpret_cast<uint4*>(&piece);
#else
  return wanted ? load_piece(row, i) : uint4{};
#endif
}

__device__ inline void push_scale(const Peers& peers, const Buffer& buffer, int rank, long long index, float scale,
                                  unsigned tag) {
  if constexpr (TAGGED)
    put_pair(at<uint2>(peers, rank, buffer.scales) + index, __float_as_uint(scale), tag);
  else
    at<float>(peers, rank, buffer.scales)[index] = scale;
}

// Returns the tag.
__device__ inline unsigned push_rows(const Peers& peers, const Buffer& buffer, const ELEMENT* x, const int* expert,
                                     int num_tokens, int pushers) {
  unsigned tag = 0;
  const int lane = threadIdx.x % 32;
  // If the caller has written its tokens where they would be pushed to (DirectExchange.tokens), this rank's own are there.
  const bool in_place = x == at<ELEMENT>(peers, peers.rank, buffer.rows) + static_cast<long long>(peers.rank) * MAX_TOKENS * HIDDEN;
  const unsigned wanted = in_place ? ~(1u << peers.rank) : ~0u;
  for (int number = blockIdx.x; number < num_items(num_tokens); number += pushers) {
    const Item item(number);
    const bool is = item.token < num_tokens;
    const unsigned ranks = is ? ranks_of(expert, item.token) & wanted : 0;
    const long long slot = static_cast<long long>(peers.rank) * MAX_TOKENS + item.token;
    const ELEMENT* row = x + static_cast<long long>(item.token) * HIDDEN;
    // The same steps in all lanes, which exchange pieces and scales.
    for (int start = item.first - item.lane; start < PIECES; start += STEP * UNROLL) {
      uint4 piece[UNROLL];
      float scale[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int i = start + u * STEP + item.lane;
        // Loads the row whether or not a rank needs it: the load does not wait for `ranks`, which is itself a load.
        piece[u] = wire_piece(row, i, is && i < PIECES, scale[u]);
      }
      // The first loads are under way before the wait for credit.
      if (tag == 0) tag = enter_to_push(peers, buffer);
      if (tag == 0) return 0;
      for (int rank = 0; rank < RANKS; ++rank) {
        if (!(ranks >> rank & 1)) continue;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const int i = start + u * STEP + item.lane;
          push(peers, buffer, rank, slot, i - lane, piece[u], tag);
          if (FP8 && i < PIECES && i % 8 == 0) push_scale(peers, buffer, rank, slot * SCALES + i / 8, scale[u], tag);
        }
      }
    }
    // All threads have stored their pieces before the release. Ranks without a row of this item are told too: they wait
    // for items, not for rows.
    if (!TAGGED) {
      __syncthreads();
      if (threadIdx.x < RANKS) announce(peers, buffer, threadIdx.x, number, tag);
    }
  }
  return tag ? tag : enter(peers, buffer);
}

#if OUTPUT != 2
// How many tokens this rank has, and each one's experts and weights, to all ranks. Returns the tag.
__device__ inline unsigned push_choices(const Peers& peers, const Buffer& buffer, const PlanTable& table,
                                        const int* expert, const float* weight, int num_tokens, int block) {
  // With TAGGED a receiver waits for the tags of all slots and needs no number of tokens: slots without one are sent too.
  const int num = num_tokens * TOP_K, all = TAGGED ? MAX_TOKENS * TOP_K : num;
  unsigned tag = 0;
  for (int start = block * THREADS; start < all || tag == 0; start += TABLE_BLOCKS * THREADS) {
    const int i = start + threadIdx.x;
    const int id = i < num ? expert[i] : -1;
    const float factor = i < num ? weight[i] : 0;
    if (tag == 0) {
      tag = enter_to_push(peers, buffer);
      if (tag == 0) return 0;
      // The number first: receivers without tags cannot begin before they have it.
      if (block == 0 && threadIdx.x < RANKS)
        put_pair(at<uint2>(peers, threadIdx.x, buffer.tokens) + peers.rank, num_tokens, tag);
    }
    if (i >= all) break;
    // A copy, by which combine finds the ranks of a token after the caller has reused its tensor.
    if (i < num) table.expert[i] = id;
    if (id < -1 || id >= NUM_EXPERTS) atomicAdd(peers.report + 2, 1ull);
    const long long index = static_cast<long long>(peers.rank) * MAX_TOKENS * TOP_K + i;
    for (int rank = 0; rank < RANKS; ++rank)
      put_tagged(at<uint4>(peers, rank, buffer.choices) + index, id, __float_as_uint(factor), tag);
  }
  return tag;
}

// ---- the table --------------------------------------------------------------------------------------------------------
//
// The table blocks sort the choices of all ranks by expert, as `route` does: in the order of source rank, token, choice.
// Here 2 ranks with 2 and 3 tokens, TOP_K 2, experts a and b on this rank, two warps; "." is another rank's expert:
//
//   tokens               rank 0   | rank 1          all in a row, without gaps between the ranks
//   choices              a.  ab   | .b   .b  a.
//   stretches            ---- warp 0 --  - warp 1 -  one for each warp of all table blocks
//   1. count_choices     a 2, b 2        a 1, b 1   count[warp][expert], by atomic operations: the order does not matter
//   2. sum_over_warps    a 0, b 0        a 2, b 2   count[warp][expert] of the warps before; the block's total to `tiles`
//   3. sum_over_blocks                              plus the totals of the table blocks before; the sum of all in offset
//   4. scan                                         offset: a 0, b 3; 6 rows in all
//   5. place_choices     0   1 3    4     5  2      row = offset + count + choices of the same expert on lanes before

// A warp looks at BATCH groups of tokens at a time. If that is all it has (MOST groups), it keeps what it saw.
constexpr int MOST_GROUPS = (RANKS * MAX_TOKENS + GROUP_TOKENS - 1) / GROUP_TOKENS;
constexpr int MOST = (MOST_GROUPS + TABLE_BLOCKS * WARPS - 1) / (TABLE_BLOCKS * WARPS);
constexpr int BATCH = MOST < 4 ? MOST : 4;

// All threads of a block learn how many tokens every rank has. With TAGGED nobody waits for these numbers: every slot
// gets choices, and in slots without a token they name no expert.
__device__ inline void wait_for_tokens(const Peers& peers, const Buffer& buffer, unsigned tag, Smem& smem) {
  if (threadIdx.x < RANKS) {
    const unsigned num = TAGGED ? MAX_TOKENS : wait_for_pair(peers, TOKENS, threadIdx.x, buffer.tokens, threadIdx.x, tag).x;
    // A number that is out of range would lead the loops below out of the buffer.
    smem.num_tokens[threadIdx.x] = min(num, static_cast<unsigned>(MAX_TOKENS));
  }
  __syncthreads();
}

// All table blocks have come here; false if the rank has given up. `coming` counts them, over all uses of the buffer.
__device__ inline bool meet(const Peers& peers, unsigned* coming, unsigned tag) {
  __syncthreads();
  if (TABLE_BLOCKS == 1) return true;
  bool failed = false;
  if (threadIdx.x == 0) {
    // The fence makes the block's totals visible before its count, and pairs with the acquire: whoever sees the last
    // count may read the totals of all blocks.
    __threadfence();
    atomicAdd(coming, 1u);
    failed =
        !wait(peers, INSIDE, peers.rank, tag, [&] { return static_cast<int>(acquire(coming) - tag * TABLE_BLOCKS) >= 0; });
  }
  return !__syncthreads_or(failed);
}

// What a block that has given up leaves: a table without rows. Work that is queued behind this kernel, the caller's too,
// still runs, and must not read or write outside its tensors. Each block clears all: other blocks may have got further,
// and what they still write is in range too.
__device__ inline void clear_table(const PlanTable& table, int block) {
  for (int i = threadIdx.x; i < RANKS * MAX_TOKENS * TOP_K; i += THREADS) table.place[i] = -1;
  for (long long i = threadIdx.x; i < table.max_rows; i += THREADS) table.slot[i] = 0;
  if (block != 0) return;
  for (int e = threadIdx.x; e <= EXPERTS; e += THREADS) {
    table.offset[e] = 0;
    if (e < EXPERTS) table.count[e] = 0;
  }
  if (threadIdx.x < RANKS) table.num_tokens[threadIdx.x] = 0;
}

// The tokens begin .. end - 1 that a warp sorts, counted over all ranks without gaps.
struct Stretch {
  int begin, end;

  __device__ Stretch(const Smem& smem, int block) {
    int total = 0;
    for (int rank = 0; rank < RANKS; ++rank) total += smem.num_tokens[rank];
    const int groups = (total + GROUP_TOKENS - 1) / GROUP_TOKENS;
    const int groups_per_warp = (groups + TABLE_BLOCKS * WARPS - 1) / (TABLE_BLOCKS * WARPS);
    const int warp = threadIdx.x / 32;
    begin = min(total, (block * WARPS + warp) * groups_per_warp * GROUP_TOKENS);
    end = min(total, begin + groups_per_warp * GROUP_TOKENS);
  }

  // The index of this lane's choice, in [slots, TOP_K], or -1, in the group of tokens that begins with `first`. Lanes are
  // in the order of token and choice.
  __device__ long long choice(const Smem& smem, int first) const {
    const int lane = threadIdx.x % 32;
    int token = first + lane / TOP_K;
    if (lane >= GROUP_TOKENS * TOP_K || token >= end) return -1;
    int rank = 0;
    while (token >= smem.num_tokens[rank]) token -= smem.num_tokens[rank++];
    return (static_cast<long long>(rank) * MAX_TOKENS + token) * TOP_K + lane % TOP_K;
  }
};

// Step 1. Waits for the choices, copies their weights, and counts those of this rank's experts. `local`: the expert on
// this rank of each choice that the lane saw last, or -1.
__device__ inline void count_choices(const Peers& peers, const Buffer& buffer, const PlanTable& table,
                                     const Stretch& stretch, unsigned tag, const Smem& smem, int* count,
                                     int (&local)[BATCH]) {
  const int warp = threadIdx.x / 32;
  for (int first = stretch.begin; first < stretch.end; first += GROUP_TOKENS * BATCH) {
    const uint4* const words = at<uint4>(peers, peers.rank, buffer.choices);
    long long i[BATCH];
    uint4 word[BATCH] = {};
    // A first look at the whole batch, so that its loads overlap; only what has not come is waited for, one by one.
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      i[b] = stretch.choice(smem, first + b * GROUP_TOKENS);
      if (i[b] >= 0) word[b] = peek_tagged(words + i[b]);
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      local[b] = -1;
      if (i[b] < 0) continue;
      // Expert and weight are in different 8 bytes, each with its own tag: one may come before the other.
      const auto came = [&] { return word[b].y == tag && word[b].w == tag; };
      const auto look = [&] { return word[b] = peek_tagged(words + i[b]), came(); };
      if (!came()) wait(peers, CHOICES, i[b] / TOP_K / MAX_TOKENS, tag, look);
      // What has not come when the rank gives up names no expert. Unsigned: ids below this rank's become large too.
      const unsigned id = came() ? word[b].x : NUM_EXPERTS, own = id - peers.rank * EXPERTS;
      if (id < NUM_EXPERTS && own < EXPERTS) local[b] = static_cast<int>(own);
      if (local[b] >= 0) atomicAdd(&count[warp * EXPERTS + local[b]], 1);
      table.weight[i[b]] = __uint_as_float(word[b].z);
      // `local` has room for one batch: place_choices reads the rest again, from where it will write the rows.
      if (MOST > BATCH) table.place[i[b]] = local[b];
    }
  }
}

// Step 2. Turns a block's counts into those of the warps before, and hands its totals to the other table blocks.
__device__ inline void sum_over_warps(const PlanTable& table, int block, int* count, int* offset) {
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
    int sum = 0;
    for (int w = 0; w < WARPS; ++w) {
      const int number = count[w * EXPERTS + e];
      count[w * EXPERTS + e] = sum;
      sum += number;
    }
    // Into the second cache, where the other blocks read it.
    if (TABLE_BLOCKS > 1)
      __stcg(table.tiles + block * EXPERTS + e, sum);
    else
      offset[e + 1] = sum;
  }
}

// Step 3. Adds the totals of the table blocks before to the counts, and all totals into offset[e + 1].
__device__ inline void sum_over_blocks(const PlanTable& table, int block, int* count, int* offset) {
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
    int before = 0, sum = TABLE_BLOCKS > 1 ? 0 : offset[e + 1];
    for (int b = 0; TABLE_BLOCKS > 1 && b < TABLE_BLOCKS; ++b) {
      if (b == block) before = sum;
      sum += __ldcg(table.tiles + b * EXPERTS + e);
    }
    for (int w = 0; TABLE_BLOCKS > 1 && w < WARPS; ++w) count[w * EXPERTS + e] += before;
    offset[e + 1] = sum;
    // All blocks know the totals; one writes them down.
    if (block == 0) table.count[e] = sum;
  }
}

// Step 4. offset[e + 1], the rows of expert e, becomes the sum of the rows up to e. One warp: each lane adds EACH
// neighbouring experts, and the lanes' sums are added by shuffles.
__device__ inline void scan(int* offset) {
  constexpr int EACH = (EXPERTS + 31) / 32;
  const int lane = threadIdx.x % 32;
  int sum = 0;
  for (int n = 0; n < EACH; ++n)
    if (lane * EACH + n < EXPERTS) sum += offset[lane * EACH + n + 1];
  int before = sum;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, before, distance);
    if (lane >= distance) before += other;
  }
  before -= sum;
  if (lane == 0) offset[0] = 0;
  for (int n = 0; n < EACH; ++n)
    if (lane * EACH + n < EXPERTS) offset[lane * EACH + n + 1] = before += offset[lane * EACH + n + 1];
}

// Step 5. The row of each choice, and the slot of each row. Within a group lanes with the same expert take neighbouring
// rows in the order of lanes, so a table is the same each time.
__device__ inline void place_choices(const Peers& peers, const PlanTable& table, const Stretch& stretch,
                                     const Smem& smem, int* count, const int* offset, int (&local)[BATCH]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int first = stretch.begin; first < stretch.end; first += GROUP_TOKENS * BATCH) {
    long long i[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      i[b] = stretch.choice(smem, first + b * GROUP_TOKENS);
      if (MOST > BATCH) local[b] = i[b] >= 0 ? table.place[i[b]] : -1;
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const unsigned same = __match_any_sync(~0u, local[b]);  // in order of token and choice, as lanes are
      int place = -1;
      if (local[b] >= 0) {
        const long long row = offset[local[b]] + count[warp * EXPERTS + local[b]] + __popc(same & ((1u << lane) - 1));
        // A row without room is counted for the host's `check`, and every later kernel passes it over.
        place = row < table.max_rows ? static_cast<int>(row) : -2;
        if (place >= 0)
          table.slot[place] = static_cast<int>(i[b] / TOP_K);
        else
          atomicAdd(peers.report + 1, 1ull);
      }
      // All lanes have read the count before one of them moves it on, and see the new one in the next group.
      __syncwarp();
      if (local[b] >= 0 && lane == __ffs(same) - 1) count[warp * EXPERTS + local[b]] += __popc(same);
      __syncwarp();
      if (i[b] >= 0) table.place[i[b]] = place;
    }
  }
}

// Offsets and numbers of tokens, for the caller. One block.
__device__ inline void write_numbers(const Peers& peers, const Buffer& buffer, const PlanTable& table, unsigned tag,
                                     const Smem& smem, const int* offset) {
  for (int e = threadIdx.x; e <= EXPERTS; e += THREADS)
    table.offset[e] = static_cast<int>(min(static_cast<long long>(offset[e]), table.max_rows));
  // With TAGGED nobody has waited for the numbers of tokens so far.
  if (threadIdx.x < RANKS)
    table.num_tokens[threadIdx.x] =
        TAGGED ? wait_for_pair(peers, TOKENS, threadIdx.x, buffer.tokens, threadIdx.x, tag).x : smem.num_tokens[threadIdx.x];
}

// Slots without a token have no rows. Memory of a plan is not zeroed first, so someone must say so.
__device__ inline void clear_empty_slots(const PlanTable& table, int block, const Smem& smem) {
  for (int rank = 0; rank < RANKS; ++rank) {
    const int num = smem.num_tokens[rank] * TOP_K;
    for (int i = num + block * THREADS + threadIdx.x; i < MAX_TOKENS * TOP_K; i += TABLE_BLOCKS * THREADS)
      table.place[static_cast<long long>(rank) * MAX_TOKENS * TOP_K + i] = -1;
  }
}

// This block's part of the table.
__device__ inline void make_table(const Peers& peers, const Buffer& buffer, const PlanTable& table, int block,
                                  unsigned tag, const Smem& smem) {
  extern __shared__ int count[];  // [WARPS][EXPERTS], then [EXPERTS + 1] offsets
  int* const offset = count + WARPS * EXPERTS;
  const Stretch stretch(smem, block);
  int local[BATCH];
  for (int i = threadIdx.x; i < WARPS * EXPERTS; i += THREADS) count[i] = 0;
  __syncthreads();
  count_choices(peers, buffer, table, stretch, tag, smem, count, local);
  __syncthreads();
  sum_over_warps(table, block, count, offset);
  if (!meet(peers, &buffer.counters->tiles, tag)) return clear_table(table, block);
  sum_over_blocks(table, block, count, offset);
  __syncthreads();
  if (threadIdx.x / 32 == 0) scan(offset);
  __syncthreads();
  if (block == 0) write_numbers(peers, buffer, table, tag, smem, offset);
  place_choices(peers, table, stretch, smem, count, offset, local);
  clear_empty_slots(table, block, smem);
  // The whole block's part is written before it is counted. The fence pairs with the acquire of the blocks that copy rows
  // to where the table says.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(&buffer.counters->tables, 1u);
  }
}

#endif

// ---- receiving --------------------------------------------------------------------------------------------------------

__device__ inline float pushed_scale(const Peers& peers, const Buffer& buffer, int from, long long index,
                                     unsigned tag) {
  if constexpr (TAGGED)
    return to_float(wait_for_pair(peers, ROWS, from, buffer.scales, index, tag));
  else
    return __ldcg(at<float>(peers, peers.rank, buffer.scales) + index);
}

#if OUTPUT == 0
// One token's row, if it comes, to its slot; every warp looks for its pieces and for the token's choices at once.
__device__ inline void receive_row(const Peers& peers, const Buffer& buffer, const Item& item, int from, WIRE* rows,
                                   float* scales, unsigned tag) {
  const long long slot = static_cast<long long>(from) * MAX_TOKENS + item.token;
  const int j = threadIdx.x % 32;
  const uint4* const choices = at<uint4>(peers, peers.rank, buffer.choices) + slot * TOP_K;
  const uint4* const pieces = at<uint4>(peers, peers.rank, buffer.rows) + slot * PIECES * 2;
  // Whether this rank has an expert of the token. Until the choices are there, it may: pieces and choices are looked at
  // together, because waiting first for one and then for the other would take longer.
  bool mine = true;
  for (int start = item.first - item.lane; start < PIECES && mine; start += STEP) {
    const int i = start + item.lane;
    uint4 a = {}, b = {};
    const bool came = wait_together(peers, ROWS, from, tag, [&] {
      uint4 word = {0, tag, 0, tag};
      if (j < TOP_K) word = peek_tagged(choices + j);
      if (i < PIECES) a = peek_tagged(pieces + 2 * i), b = peek_tagged(pieces + 2 * i + 1);
      if (!__all_sync(~0u, word.y == tag && word.w == tag)) return false;
      mine = __any_sync(~0u, j < TOP_K && word.x < NUM_EXPERTS && word.x / EXPERTS == peers.rank);
      return !mine || __all_sync(~0u, i >= PIECES || (a.y == tag && a.w == tag && b.y == tag && b.w == tag));
    });
    mine &= came;
    if (mine) store_piece(rows + slot * HIDDEN, i, {a.x, a.z, b.x, b.z});
  }
#if FP8
  for (int g = mine ? item.first_scale() : SCALES; g < SCALES; g += STEP)
    scales[slot * SCALES + g] = pushed_scale(peers, buffer, from, slot * SCALES + g, tag);
#endif
}
#elif OUTPUT == 1
// Copies of one token's row to where its experts want it.
__device__ inline void receive_row(const Peers& peers, const Buffer& buffer, const PlanTable& table, const Item& item,
                                   int from, WIRE* rows, float* scales, unsigned tag) {
  const long long slot = static_cast<long long>(from) * MAX_TOKENS + item.token;
  int place[TOP_K];
  bool any = false;
#pragma unroll
  for (int j = 0; j < TOP_K; ++j) {
    // Past the first cache: table blocks, on other multiprocessors, have just written it.
    place[j] = __ldcg(table.place + slot * TOP_K + j);
    any |= place[j] != -1;
  }
  if (!any) return;
  for (int i = item.first; i < PIECES; i += STEP * UNROLL) {
    uint4 piece[UNROLL];
#pragma unroll
    // Loaded once, stored for each expert.
    for (int u = 0; u < UNROLL; ++u)
      if (i + u * STEP < PIECES) piece[u] = pushed(peers, buffer, from, slot * PIECES + i + u * STEP, tag);
#pragma unroll
    for (int j = 0; j < TOP_K; ++j) {
      if (place[j] < 0) continue;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (i + u * STEP < PIECES) store_piece(rows + static_cast<long long>(place[j]) * HIDDEN, i + u * STEP, piece[u]);
    }
  }
#if FP8
  for (int g = item.first_scale(); g < SCALES; g += STEP) {
    const float scale = pushed_scale(peers, buffer, from, slot * SCALES + g, tag);
#pragma unroll
    for (int j = 0; j < TOP_K; ++j)
      if (place[j] >= 0) scales[static_cast<long long>(place[j]) * SCALES + g] = scale;
  }
#endif
}
#else
// The gradient of a token's answer, to each of its rows times the weight, and into the gradient of that weight. One warp.
__device__ inline void spread_row(const Peers& peers, const Buffer& buffer, const PlanTable& table, int from,
                                  int token, const ELEMENT* answers, ELEMENT* rows, float* grad_weight, unsigned tag) {
  const long long slot = static_cast<long long>(from) * MAX_TOKENS + token;
  const int lane = threadIdx.x % 32;
  bool any = false;
  for (int j = 0; j < TOP_K; ++j) any |= table.place[slot * TOP_K + j] != -1;
  if (!any) return;
  for (int j = 0; j < TOP_K; ++j) {
    const int place = table.place[slot * TOP_K + j];
    // A row that found no room, or whose answer is missing: its weight has had no effect, so its gradient is 0.
    if (place < 0 || place >= table.max_rows) {
      if (place != -1 && lane == 0) grad_weight[slot * TOP_K + j] = 0;
      continue;
    }
    const float weight = table.weight[slot * TOP_K + j];
    const long long row = static_cast<long long>(place) * HIDDEN;
    // One pass over the gradient gives both products: with the weight, and with the answer.
    float dot = 0;
    for (int i = lane; i < PIECES; i += 32) {
      const uint4 bits = pushed(peers, buffer, from, slot * PIECES + i, tag), other = load_piece(answers + row, i);
      const auto& grad = *reinterpret_cast<const Piece<ELEMENT, WIDTH>*>(&bits);
      const auto& answer = *reinterpret_cast<const Piece<ELEMENT, WIDTH>*>(&other);
      float product[WIDTH];
#pragma unroll
      for (int n = 0; n < WIDTH; ++n) {
        dot = fmaf(to_float(grad.value[n]), to_float(answer.value[n]), dot);
        product[n] = weight * to_float(grad.value[n]);
      }
      const auto result = from_floats<Piece<ELEMENT, WIDTH>>(product);
      store_piece(rows + row, i, *reinterpret_cast<const uint4*>(&result));
    }
    // Lanes in a fixed order: the same bits each time.
    for (int distance = 16; distance > 0; distance /= 2) dot += __shfl_xor_sync(~0u, dot, distance);
    if (lane == 0) grad_weight[slot * TOP_K + j] = dot;
  }
}
#endif

// answers, grad_weight: for OUTPUT 2 what combine took, and the gradient of table.weight. rows, scales: as the table
// orders them; with OUTPUT 0 only what came TAGGED is copied there, everything else is read where it came.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    direct_dispatch(const __grid_constant__ Peers peers, const __grid_constant__ Buffer buffer,
                    const __grid_constant__ PlanTable table, const ELEMENT* x, const int* expert, const float* weight,
                    int num_tokens, const ELEMENT* answers, WIRE* rows, float* scales, float* grad_weight,
                    int pushers) {
#if OUTPUT == 2
  unsigned tag = blockIdx.x < pushers ? push_rows(peers, buffer, x, expert, num_tokens, pushers) : enter(peers, buffer);
  if (tag == 0) return;
  // The backward pass needs no choices: how many tokens each rank has, and where rows are, is in the forward pass's table.
  __shared__ int num_tokens_of[RANKS];
  if (threadIdx.x < RANKS) num_tokens_of[threadIdx.x] = table.num_tokens[threadIdx.x];
  __syncthreads();
  for (int n = 0;; ++n) {
    const int ticket = next_ticket(buffer, n), from = ticket % RANKS, number = ticket / RANKS;
    if (number >= num_items(MAX_TOKENS)) break;
    // A warp works on whole rows, so the slices of a chunk are received together, with the first of them.
    if (number >= num_items(num_tokens_of[from]) || number % SLICES) continue;
    if (!TAGGED) {
      if (threadIdx.x < SLICES) wait_for_item(peers, buffer, from, number + threadIdx.x, tag);
      __syncthreads();
    }
    for (int c = threadIdx.x / 32; c < CHUNK; c += WARPS) {
      const int token = number / SLICES * CHUNK + c;
      if (token < num_tokens_of[from])
        spread_row(peers, buffer, table, from, token, answers, rows, grad_weight, tag);
    }
  }
  // The counters of table blocks run over all uses of the buffer: this use has none, and must count as if it had.
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    atomicAdd(&buffer.counters->tables, TABLE_BLOCKS);
    atomicAdd(&buffer.counters->tiles, TABLE_BLOCKS);
  }
  if (finish<TICKETS>(buffer, tag)) give_credit(peers, buffer.credit, blockIdx.x, tag);
#else
  __shared__ Smem smem;
  const int table_block = blockIdx.x - (BLOCKS - TABLE_BLOCKS);
  unsigned tag;
  if (table_block >= 0) {
    tag = push_choices(peers, buffer, table, expert, weight, num_tokens, table_block);
    if (tag == 0) return clear_table(table, table_block);
    wait_for_tokens(peers, buffer, tag, smem);
    make_table(peers, buffer, table, table_block, tag, smem);
    // Compact rows without tags are read by the caller where they arrive: the kernel must not end before they are there.
    if (OUTPUT == 0 && !TAGGED)
      for (int rank = 0; rank < RANKS; ++rank)
        for (int i = table_block * THREADS + threadIdx.x; i < num_items(smem.num_tokens[rank]); i += TABLE_BLOCKS * THREADS)
          wait_for_item(peers, buffer, rank, i, tag);
  } else {
    tag = blockIdx.x < pushers ? push_rows(peers, buffer, x, expert, num_tokens, pushers) : enter(peers, buffer);
    if (tag == 0) return;
  }
#if OUTPUT == 0
  if (TAGGED && table_block < 0)
    for (int n = blockIdx.x; n < RANKS * num_items(MAX_TOKENS); n += BLOCKS - TABLE_BLOCKS)
      receive_row(peers, buffer, Item(n / RANKS), n % RANKS, rows, scales, tag);
  // Compact rows without tags are read until combine has taken their answers, which gives the credit. With tags they have
  // been copied out.
  if (finish<false>(buffer, tag) && TAGGED) give_credit(peers, buffer.credit, blockIdx.x, tag);
#else
  if (table_block < 0) wait_for_tokens(peers, buffer, tag, smem);
  // The acquire pairs with the fence at the end of make_table: behind it the table of all blocks is visible.
  bool failed = false;
  if (threadIdx.x == 0)
    failed = !wait(peers, INSIDE, peers.rank, tag,
                   [&] { return static_cast<int>(acquire(&buffer.counters->tables) - tag * TABLE_BLOCKS) >= 0; });
  if (__syncthreads_or(failed)) return;
  for (int n = 0;; ++n) {
    const int ticket = next_ticket(buffer, n), from = ticket % RANKS;
    if (ticket / RANKS >= num_items(MAX_TOKENS)) break;
    const Item item(ticket / RANKS);
    if (item.number >= num_items(smem.num_tokens[from])) continue;
    // One thread waits, and the barrier makes what it acquired visible to the block.
    if (!TAGGED) {
      if (threadIdx.x == 0) wait_for_item(peers, buffer, from, item.number, tag);
      __syncthreads();
    }
    if (item.token < smem.num_tokens[from]) receive_row(peers, buffer, table, item, from, rows, scales, tag);
  }
  if (finish<TICKETS>(buffer, tag)) give_credit(peers, buffer.credit, blockIdx.x, tag);
#endif
#endif
}
