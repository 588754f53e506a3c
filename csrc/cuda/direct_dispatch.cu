// Rows to the ranks of their experts, one launch on every rank: each token's row once to each rank that needs it.
//
// OUTPUT  0 compact: every row stays in its slot, source rank * MAX_TOKENS + token; `table` says which are whose
//         1 expanded: a copy for each of this rank's experts, ordered by expert, source rank and token
//         2 backward of combine: rows is the gradient of what combine took. The table is that of the forward pass.
// The macros of direct.cuh, and
// TABLE_BLOCKS  unless OUTPUT is 2, the last blocks, which tell all ranks where this rank's tokens go and make the table from what they tell
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

__device__ inline void push_scale(const Memory& memory, const Buffer& buffer, int rank, long long index, float scale,
                                  unsigned tag) {
  if constexpr (TAGGED)
    put_pair(at<uint2>(memory, rank, buffer.scales) + index, __float_as_uint(scale), tag);
  else
    at<float>(memory, rank, buffer.scales)[index] = scale;
}

// Returns the tag.
__device__ inline unsigned push_rows(const Memory& memory, const Buffer& buffer, const ELEMENT* x, const int* expert,
                                     int num_tokens, int pushers) {
  unsigned tag = 0;
  const int lane = threadIdx.x % 32;
  const bool in_place = x == at<ELEMENT>(memory, memory.rank, buffer.rows) + static_cast<long long>(memory.rank) * MAX_TOKENS * HIDDEN;
  const unsigned wanted = in_place ? ~(1u << memory.rank) : ~0u;
  for (int number = blockIdx.x; number < num_items(num_tokens); number += pushers) {
    const Item item(number);
    const bool is = item.token < num_tokens;
    const unsigned ranks = is ? ranks_of(expert, item.token) & wanted : 0;
    const long long slot = static_cast<long long>(memory.rank) * MAX_TOKENS + item.token;
    const ELEMENT* row = x + static_cast<long long>(item.token) * HIDDEN;
    for (int start = item.first - item.lane; start < PIECES; start += STEP * UNROLL) {  // the same in all lanes
      uint4 piece[UNROLL];
      float scale[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int i = start + u * STEP + item.lane;
        piece[u] = wire_piece(row, i, is && i < PIECES, scale[u]);  // does not wait for `ranks`
      }
      if (tag == 0) tag = enter_to_push(memory, buffer);
      if (tag == 0) return 0;
      for (int rank = 0; rank < RANKS; ++rank) {
        if (!(ranks >> rank & 1)) continue;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const int i = start + u * STEP + item.lane;
          push(memory, buffer, rank, slot, i - lane, piece[u], tag);
          if (FP8 && i < PIECES && i % 8 == 0) push_scale(memory, buffer, rank, slot * SCALES + i / 8, scale[u], tag);
        }
      }
    }
    if (!TAGGED) {
      __syncthreads();
      if (threadIdx.x < RANKS) announce(memory, buffer, threadIdx.x, number, tag);
    }
  }
  return tag ? tag : enter(memory, buffer);
}

#if OUTPUT != 2
// How many tokens this rank has, and each one's experts and weights, to all ranks. Returns the tag.
__device__ inline unsigned push_choices(const Memory& memory, const Buffer& buffer, const Table& table,
                                        const int* expert, const float* weight, int num_tokens, int block) {
  const int num = num_tokens * TOP_K, all = TAGGED ? MAX_TOKENS * TOP_K : num;  // who waits for tags needs no number
  unsigned tag = 0;
  for (int start = block * THREADS; start < all || tag == 0; start += TABLE_BLOCKS * THREADS) {
    const int i = start + threadIdx.x;
    const int id = i < num ? expert[i] : -1;
    const float factor = i < num ? weight[i] : 0;
    if (tag == 0) {
      tag = enter_to_push(memory, buffer);
      if (tag == 0) return 0;
      if (block == 0 && threadIdx.x < RANKS)
        put_pair(at<uint2>(memory, threadIdx.x, buffer.tokens) + memory.rank, num_tokens, tag);
    }
    if (i >= all) break;
    if (i < num) table.expert[i] = id;
    if (id < -1 || id >= NUM_EXPERTS) atomicAdd(memory.report + 2, 1ull);
    const long long index = static_cast<long long>(memory.rank) * MAX_TOKENS * TOP_K + i;
    for (int rank = 0; rank < RANKS; ++rank)
      put_tagged(at<uint4>(memory, rank, buffer.choices) + index, id, __float_as_uint(factor), tag);
  }
  return tag;
}

// ---- the table --------------------------------------------------------------------------------------------------------

// All threads of a block learn how many tokens every rank has; with TAGGED, those that are none have no experts.
__device__ inline void wait_for_tokens(const Memory& memory, const Buffer& buffer, unsigned tag, Smem& smem) {
  if (threadIdx.x < RANKS) {
    const unsigned num = TAGGED ? MAX_TOKENS : wait_for_pair(memory, TOKENS, threadIdx.x, buffer.tokens, threadIdx.x, tag).x;
    smem.num_tokens[threadIdx.x] = min(num, static_cast<unsigned>(MAX_TOKENS));
  }
  __syncthreads();
}

// All table blocks have come here; false if the rank has given up. `coming` counts them, over all uses of the buffer.
__device__ inline bool meet(const Memory& memory, unsigned* coming, unsigned tag) {
  __syncthreads();
  if (TABLE_BLOCKS == 1) return true;
  bool failed = false;
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(coming, 1u);
    failed =
        !wait(memory, INSIDE, memory.rank, tag, [&] { return static_cast<int>(acquire(coming) - tag * TABLE_BLOCKS) >= 0; });
  }
  return !__syncthreads_or(failed);
}

// What a block that has given up leaves, so that nothing queued behind, the caller's work too, is led where nothing is.
// It clears all: other blocks may have got further, and what they still write is in range too.
__device__ inline void clear_table(const Table& table, int block) {
  for (int i = threadIdx.x; i < RANKS * MAX_TOKENS * TOP_K; i += THREADS) table.place[i] = -1;
  for (long long i = threadIdx.x; i < table.max_rows; i += THREADS) table.slot[i] = 0;
  if (block != 0) return;
  for (int e = threadIdx.x; e <= EXPERTS; e += THREADS) {
    table.offset[e] = 0;
    if (e < EXPERTS) table.count[e] = 0;
  }
  if (threadIdx.x < RANKS) table.num_tokens[threadIdx.x] = 0;
}

// Counts and places as `route` does: each warp has a stretch of all tokens; what came before it is counted once.
__device__ inline void make_table(const Memory& memory, const Buffer& buffer, const Table& table, int block,
                                  unsigned tag, const Smem& smem) {
  extern __shared__ int count[];  // [WARPS][EXPERTS], then [EXPERTS + 1] offsets
  int* const offset = count + WARPS * EXPERTS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int total = 0;
  for (int rank = 0; rank < RANKS; ++rank) total += smem.num_tokens[rank];
  const int groups = (total + GROUP_TOKENS - 1) / GROUP_TOKENS;
  const int groups_per_warp = (groups + TABLE_BLOCKS * WARPS - 1) / (TABLE_BLOCKS * WARPS);
  const int begin = min(total, (block * WARPS + warp) * groups_per_warp * GROUP_TOKENS);
  const int end = min(total, begin + groups_per_warp * GROUP_TOKENS);
  // The index of this lane's choice, in [slots, TOP_K], or -1.
  const auto choice = [&](int first) -> long long {
    int token = first + lane / TOP_K;
    if (lane >= GROUP_TOKENS * TOP_K || token >= end) return -1;
    int rank = 0;
    while (token >= smem.num_tokens[rank]) token -= smem.num_tokens[rank++];
    return (static_cast<long long>(rank) * MAX_TOKENS + token) * TOP_K + lane % TOP_K;
  };

  // A warp looks at BATCH groups at a time. If that is all it has, it keeps what it saw.
  constexpr int MOST_GROUPS = (RANKS * MAX_TOKENS + GROUP_TOKENS - 1) / GROUP_TOKENS;
  constexpr int MOST = (MOST_GROUPS + TABLE_BLOCKS * WARPS - 1) / (TABLE_BLOCKS * WARPS), BATCH = MOST < 4 ? MOST : 4;
  int local[BATCH];
  for (int i = threadIdx.x; i < WARPS * EXPERTS; i += THREADS) count[i] = 0;
  __syncthreads();
  for (int first = begin; first < end; first += GROUP_TOKENS * BATCH) {
    const uint4* const words = at<uint4>(memory, memory.rank, buffer.choices);
    long long i[BATCH];
    uint4 word[BATCH] = {};
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      i[b] = choice(first + b * GROUP_TOKENS);
      if (i[b] >= 0) word[b] = peek_tagged(words + i[b]);
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      local[b] = -1;
      if (i[b] < 0) continue;
      const auto came = [&] { return word[b].y == tag && word[b].w == tag; };
      if (!came()) wait(memory, CHOICES, i[b] / TOP_K / MAX_TOKENS, tag, [&] { return word[b] = peek_tagged(words + i[b]), came(); });
      const unsigned id = came() ? word[b].x : NUM_EXPERTS, mine = id - memory.rank * EXPERTS;
      if (id < NUM_EXPERTS && mine < EXPERTS) local[b] = static_cast<int>(mine);
      if (local[b] >= 0) atomicAdd(&count[warp * EXPERTS + local[b]], 1);
      table.weight[i[b]] = __uint_as_float(word[b].z);
      if (MOST > BATCH) table.place[i[b]] = local[b];  // read again below
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
    int sum = 0;
    for (int w = 0; w < WARPS; ++w) {
      const int here = count[w * EXPERTS + e];
      count[w * EXPERTS + e] = sum;
      sum += here;
    }
    if (TABLE_BLOCKS > 1)
      __stcg(table.tiles + block * EXPERTS + e, sum);
    else
      offset[e + 1] = sum;
  }
  if (!meet(memory, &buffer.counters->tiles, tag)) return clear_table(table, block);
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
    int before = 0, sum = TABLE_BLOCKS > 1 ? 0 : offset[e + 1];
    for (int b = 0; TABLE_BLOCKS > 1 && b < TABLE_BLOCKS; ++b) {
      if (b == block) before = sum;
      sum += __ldcg(table.tiles + b * EXPERTS + e);
    }
    for (int w = 0; TABLE_BLOCKS > 1 && w < WARPS; ++w) count[w * EXPERTS + e] += before;
    offset[e + 1] = sum;
    if (block == 0) table.count[e] = sum;
  }
  __syncthreads();
  if (warp == 0) {  // sums into offsets
    constexpr int EACH = (EXPERTS + 31) / 32;
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
  __syncthreads();
  if (block == 0) {
    for (int e = threadIdx.x; e <= EXPERTS; e += THREADS)
      table.offset[e] = static_cast<int>(min(static_cast<long long>(offset[e]), table.max_rows));
    if (threadIdx.x < RANKS)
      table.num_tokens[threadIdx.x] =
          TAGGED ? wait_for_pair(memory, TOKENS, threadIdx.x, buffer.tokens, threadIdx.x, tag).x : smem.num_tokens[threadIdx.x];
  }
  for (int first = begin; first < end; first += GROUP_TOKENS * BATCH) {
    long long i[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      i[b] = choice(first + b * GROUP_TOKENS);
      if (MOST > BATCH) local[b] = i[b] >= 0 ? table.place[i[b]] : -1;
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const unsigned same = __match_any_sync(~0u, local[b]);  // in order of token and choice, as lanes are
      int place = -1;
      if (local[b] >= 0) {
        const long long row = offset[local[b]] + count[warp * EXPERTS + local[b]] + __popc(same & ((1u << lane) - 1));
        place = row < table.max_rows ? static_cast<int>(row) : -2;
        if (place >= 0)
          table.slot[place] = static_cast<int>(i[b] / TOP_K);
        else
          atomicAdd(memory.report + 1, 1ull);
      }
      __syncwarp();
      if (local[b] >= 0 && lane == __ffs(same) - 1) count[warp * EXPERTS + local[b]] += __popc(same);
      __syncwarp();
      if (i[b] >= 0) table.place[i[b]] = place;
    }
  }
  // What no token has belongs to nobody.
  for (int rank = 0; rank < RANKS; ++rank) {
    const int num = smem.num_tokens[rank] * TOP_K;
    for (int i = num + block * THREADS + threadIdx.x; i < MAX_TOKENS * TOP_K; i += TABLE_BLOCKS * THREADS)
      table.place[static_cast<long long>(rank) * MAX_TOKENS * TOP_K + i] = -1;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(&buffer.counters->tables, 1u);
  }
}

#endif

// ---- receiving --------------------------------------------------------------------------------------------------------

__device__ inline float pushed_scale(const Memory& memory, const Buffer& buffer, int from, long long index,
                                     unsigned tag) {
  if constexpr (TAGGED)
    return to_float(wait_for_pair(memory, ROWS, from, buffer.scales, index, tag));
  else
    return __ldcg(at<float>(memory, memory.rank, buffer.scales) + index);
}

#if OUTPUT == 0
// One token's row, if it comes, to its slot; every warp looks for its pieces and for the token's choices at once.
__device__ inline void receive_row(const Memory& memory, const Buffer& buffer, const Item& item, int from, WIRE* rows,
                                   float* scales, unsigned tag) {
  const long long slot = static_cast<long long>(from) * MAX_TOKENS + item.token;
  const int j = threadIdx.x % 32;
  const uint4* const choices = at<uint4>(memory, memory.rank, buffer.choices) + slot * TOP_K;
  const uint4* const pieces = at<uint4>(memory, memory.rank, buffer.rows) + slot * PIECES * 2;
  bool mine = true;
  for (int start = item.first - item.lane; start < PIECES && mine; start += STEP) {
    const int i = start + item.lane;
    uint4 a = {}, b = {};
    const bool came = wait_together(memory, ROWS, from, tag, [&] {
      uint4 word = {0, tag, 0, tag};
      if (j < TOP_K) word = peek_tagged(choices + j);
      if (i < PIECES) a = peek_tagged(pieces + 2 * i), b = peek_tagged(pieces + 2 * i + 1);
      if (!__all_sync(~0u, word.y == tag && word.w == tag)) return false;
      mine = __any_sync(~0u, j < TOP_K && word.x < NUM_EXPERTS && word.x / EXPERTS == memory.rank);
      return !mine || __all_sync(~0u, i >= PIECES || (a.y == tag && a.w == tag && b.y == tag && b.w == tag));
    });
    mine &= came;
    if (mine) store_piece(rows + slot * HIDDEN, i, {a.x, a.z, b.x, b.z});
  }
#if FP8
  for (int g = mine ? item.first_scale() : SCALES; g < SCALES; g += STEP)
    scales[slot * SCALES + g] = pushed_scale(memory, buffer, from, slot * SCALES + g, tag);
#endif
}
#elif OUTPUT == 1
// Copies of one token's row to where its experts want it.
__device__ inline void receive_row(const Memory& memory, const Buffer& buffer, const Table& table, const Item& item,
                                   int from, WIRE* rows, float* scales, unsigned tag) {
  const long long slot = static_cast<long long>(from) * MAX_TOKENS + item.token;
  int place[TOP_K];
  bool any = false;
#pragma unroll
  for (int j = 0; j < TOP_K; ++j) {
    place[j] = __ldcg(table.place + slot * TOP_K + j);
    any |= place[j] != -1;
  }
  if (!any) return;
  for (int i = item.first; i < PIECES; i += STEP * UNROLL) {
    uint4 piece[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (i + u * STEP < PIECES) piece[u] = pushed(memory, buffer, from, slot * PIECES + i + u * STEP, tag);
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
    const float scale = pushed_scale(memory, buffer, from, slot * SCALES + g, tag);
#pragma unroll
    for (int j = 0; j < TOP_K; ++j)
      if (place[j] >= 0) scales[static_cast<long long>(place[j]) * SCALES + g] = scale;
  }
#endif
}
#else
// The gradient of a token's answer, to each of its rows times the weight, and into the gradient of that weight. One warp.
__device__ inline void spread_row(const Memory& memory, const Buffer& buffer, const Table& table, int from,
                                  int token, const ELEMENT* answers, ELEMENT* rows, float* grad_weight, unsigned tag) {
  const long long slot = static_cast<long long>(from) * MAX_TOKENS + token;
  const int lane = threadIdx.x % 32;
  bool any = false;
  for (int j = 0; j < TOP_K; ++j) any |= table.place[slot * TOP_K + j] != -1;
  if (!any) return;
  for (int j = 0; j < TOP_K; ++j) {
    const int place = table.place[slot * TOP_K + j];
    if (place < 0 || place >= table.max_rows) {
      if (place != -1 && lane == 0) grad_weight[slot * TOP_K + j] = 0;
      continue;
    }
    const float weight = table.weight[slot * TOP_K + j];
    const long long row = static_cast<long long>(place) * HIDDEN;
    float dot = 0;
    for (int i = lane; i < PIECES; i += 32) {
      const uint4 bits = pushed(memory, buffer, from, slot * PIECES + i, tag), other = load_piece(answers + row, i);
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
    for (int distance = 16; distance > 0; distance /= 2) dot += __shfl_xor_sync(~0u, dot, distance);
    if (lane == 0) grad_weight[slot * TOP_K + j] = dot;
  }
}
#endif

// answers, grad_weight: for OUTPUT 2 what combine took, and the gradient of table.weight. rows, scales: as the table
// orders them; with OUTPUT 0 only what came TAGGED is copied there, everything else is read where it came.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    direct_dispatch(const __grid_constant__ Memory memory, const __grid_constant__ Buffer buffer,
                    const __grid_constant__ Table table, const ELEMENT* x, const int* expert, const float* weight,
                    int num_tokens, const ELEMENT* answers, WIRE* rows, float* scales, float* grad_weight,
                    int pushers) {
#if OUTPUT == 2
  unsigned tag = blockIdx.x < pushers ? push_rows(memory, buffer, x, expert, num_tokens, pushers) : enter(memory, buffer);
  if (tag == 0) return;
  __shared__ int num_tokens_of[RANKS];
  if (threadIdx.x < RANKS) num_tokens_of[threadIdx.x] = table.num_tokens[threadIdx.x];
  __syncthreads();
  for (int n = 0;; ++n) {
    const int ticket = next_ticket(buffer, n), from = ticket % RANKS, number = ticket / RANKS;
    if (number >= num_items(MAX_TOKENS)) break;
    if (number >= num_items(num_tokens_of[from]) || number % SLICES) continue;
    if (!TAGGED) {
      if (threadIdx.x < SLICES) wait_for_item(memory, buffer, from, number + threadIdx.x, tag);
      __syncthreads();
    }
    for (int c = threadIdx.x / 32; c < CHUNK; c += WARPS) {
      const int token = number / SLICES * CHUNK + c;
      if (token < num_tokens_of[from])
        spread_row(memory, buffer, table, from, token, answers, rows, grad_weight, tag);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {  // the table is made, for whoever counts
    atomicAdd(&buffer.counters->tables, TABLE_BLOCKS);
    atomicAdd(&buffer.counters->tiles, TABLE_BLOCKS);
  }
  if (finish<TICKETS>(buffer, tag)) give_credit(memory, buffer.credit, blockIdx.x, tag);
#else
  __shared__ Smem smem;
  const int table_block = blockIdx.x - (BLOCKS - TABLE_BLOCKS);
  unsigned tag;
  if (table_block >= 0) {
    tag = push_choices(memory, buffer, table, expert, weight, num_tokens, table_block);
    if (tag == 0) return clear_table(table, table_block);
    wait_for_tokens(memory, buffer, tag, smem);
    make_table(memory, buffer, table, table_block, tag, smem);
    if (OUTPUT == 0 && !TAGGED)  // everything has come
      for (int rank = 0; rank < RANKS; ++rank)
        for (int i = table_block * THREADS + threadIdx.x; i < num_items(smem.num_tokens[rank]); i += TABLE_BLOCKS * THREADS)
          wait_for_item(memory, buffer, rank, i, tag);
  } else {
    tag = blockIdx.x < pushers ? push_rows(memory, buffer, x, expert, num_tokens, pushers) : enter(memory, buffer);
    if (tag == 0) return;
  }
#if OUTPUT == 0
  if (TAGGED && table_block < 0)
    for (int n = blockIdx.x; n < RANKS * num_items(MAX_TOKENS); n += BLOCKS - TABLE_BLOCKS)
      receive_row(memory, buffer, Item(n / RANKS), n % RANKS, rows, scales, tag);
  // Compact rows are read until combine has taken their answers, which gives the credit.
  if (finish<false>(buffer, tag) && TAGGED) give_credit(memory, buffer.credit, blockIdx.x, tag);
#else
  if (table_block < 0) wait_for_tokens(memory, buffer, tag, smem);
  bool failed = false;
  if (threadIdx.x == 0)
    failed = !wait(memory, INSIDE, memory.rank, tag,
                   [&] { return static_cast<int>(acquire(&buffer.counters->tables) - tag * TABLE_BLOCKS) >= 0; });
  if (__syncthreads_or(failed)) return;
  for (int n = 0;; ++n) {
    const int ticket = next_ticket(buffer, n), from = ticket % RANKS;
    if (ticket / RANKS >= num_items(MAX_TOKENS)) break;
    const Item item(ticket / RANKS);
    if (item.number >= num_items(smem.num_tokens[from])) continue;
    if (!TAGGED) {
      if (threadIdx.x == 0) wait_for_item(memory, buffer, from, item.number, tag);
      __syncthreads();
    }
    if (item.token < smem.num_tokens[from]) receive_row(memory, buffer, table, item, from, rows, scales, tag);
  }
  if (finish<TICKETS>(buffer, tag)) give_credit(memory, buffer.credit, blockIdx.x, tag);
#endif
#endif
}
