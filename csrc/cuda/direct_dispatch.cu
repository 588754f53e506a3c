// Rows to the ranks of their experts, one launch on every rank: each token's row once to each rank that needs it.
//
// OUTPUT  0 compact: every row stays in its slot, source rank * MAX_TOKENS + token; `table` says which are whose
//         1 expanded: a copy for each of this rank's experts, ordered by expert, source rank and token
//         2 backward of combine: rows is the gradient of what combine took. The table is that of the forward pass.
// The macros of direct.cuh, and
// TABLE_BLOCKS  the last blocks, which tell all ranks where this rank's tokens go and make the table from what they tell
#include "direct.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int GROUP_TOKENS = 32 / TOP_K;  // tokens that a warp sorts at a time

struct Smem {
  int num_tokens[RANKS + 1];  // of each rank, and then where each begins among all
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
  Piece<unsigned char, 16> piece;
#pragma unroll
  for (int n = 0; n < 16; ++n) piece.value[n] = to_e4m3(to_float(part[n / N].value[n % N]) / scale);
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

__device__ inline void push_rows(const Memory& memory, const Buffer& buffer, const ELEMENT* x, const int* expert,
                                 int num_tokens, int pushers, unsigned tag) {
  wait_for_credit(memory, buffer, tag);
  for (int number = blockIdx.x; number < num_items(num_tokens); number += pushers) {
    const Item item(number);
    const unsigned ranks = item.token < num_tokens ? ranks_of(expert, item.token) : 0;
    const long long slot = static_cast<long long>(memory.rank) * MAX_TOKENS + item.token;
    const ELEMENT* row = x + static_cast<long long>(item.token) * HIDDEN;
    for (int start = item.first - item.lane; start < PIECES; start += STEP * UNROLL) {  // the same in all lanes
      uint4 piece[UNROLL];
      float scale[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int i = start + u * STEP + item.lane;
        piece[u] = wire_piece(row, i, ranks && i < PIECES, scale[u]);
      }
      for (int rank = 0; rank < RANKS; ++rank) {
        if (!(ranks >> rank & 1)) continue;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const int i = start + u * STEP + item.lane;
          if (i < PIECES) push(memory, buffer, rank, slot * PIECES + i, piece[u], tag);
          if (FP8 && i < PIECES && i % 8 == 0) push_scale(memory, buffer, rank, slot * SCALES + i / 8, scale[u], tag);
        }
      }
    }
    if (!TAGGED) {
      __syncthreads();
      if (threadIdx.x < RANKS) announce(memory, buffer, threadIdx.x, number, tag);
    }
  }
}

#if OUTPUT != 2
// How many tokens this rank has, and each one's experts and weights, to all ranks.
__device__ inline void push_choices(const Memory& memory, const Buffer& buffer, const int* expert, const float* weight,
                                    int num_tokens, int block, unsigned tag) {
  wait_for_credit(memory, buffer, tag);
  if (block == 0 && threadIdx.x < RANKS)
    put_pair(at<uint2>(memory, threadIdx.x, buffer.tokens) + memory.rank, num_tokens, tag);
  for (int i = block * THREADS + threadIdx.x; i < num_tokens * TOP_K; i += TABLE_BLOCKS * THREADS) {
    const int id = expert[i];
    if (id < -1 || id >= NUM_EXPERTS) atomicAdd(memory.report + 2, 1ull);
    const long long index = static_cast<long long>(memory.rank) * MAX_TOKENS * TOP_K + i;
    for (int rank = 0; rank < RANKS; ++rank)
      put_tagged(at<uint4>(memory, rank, buffer.choices) + index, id, __float_as_uint(weight[i]), tag);
  }
}

// ---- the table --------------------------------------------------------------------------------------------------------

// All threads of a block learn how many tokens every rank has.
__device__ inline void wait_for_tokens(const Memory& memory, const Buffer& buffer, unsigned tag, Smem& smem) {
  if (threadIdx.x < RANKS) {
    const unsigned num = wait_for_pair(memory, TOKENS, threadIdx.x, buffer.tokens, threadIdx.x, tag).x;
    smem.num_tokens[threadIdx.x] = min(num, static_cast<unsigned>(MAX_TOKENS));
  }
  __syncthreads();
}

// All table blocks have come here. `coming` counts them, over all uses of the buffer.
__device__ inline void meet(const Memory& memory, unsigned* coming, unsigned tag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(coming, 1u);
    if (TABLE_BLOCKS > 1)
      wait(memory, INSIDE, memory.rank, tag, [&] { return static_cast<int>(acquire(coming) - tag * TABLE_BLOCKS) >= 0; });
  }
  __syncthreads();
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

  for (int i = threadIdx.x; i < WARPS * EXPERTS; i += THREADS) count[i] = 0;
  __syncthreads();
  for (int first = begin; first < end; first += GROUP_TOKENS) {
    const long long i = choice(first);
    if (i < 0) continue;
    uint4 word = {};
    const uint4* from = at<uint4>(memory, memory.rank, buffer.choices) + i;
    const bool came = wait(memory, CHOICES, i / TOP_K / MAX_TOKENS, tag, [&] {
      word = peek_tagged(from);
      return word.y == tag && word.w == tag;
    });
    const unsigned local = word.x - memory.rank * EXPERTS;
    const bool mine = came && word.x < NUM_EXPERTS && local < EXPERTS;
    table.weight[i] = __uint_as_float(word.z);
    table.place[i] = mine ? static_cast<int>(local) : -1;  // read again below
    if (mine) atomicAdd(&count[warp * EXPERTS + local], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
    int sum = 0;
    for (int w = 0; w < WARPS; ++w) {
      const int here = count[w * EXPERTS + e];
      count[w * EXPERTS + e] = sum;
      sum += here;
    }
    __stcg(table.tiles + block * EXPERTS + e, sum);
  }
  meet(memory, &buffer.counters->tiles, tag);
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
    int before = 0, sum = 0;
    for (int b = 0; b < TABLE_BLOCKS; ++b) {
      if (b == block) before = sum;
      sum += __ldcg(table.tiles + b * EXPERTS + e);
    }
    for (int w = 0; w < WARPS; ++w) count[w * EXPERTS + e] += before;
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
    for (int e = threadIdx.x; e <= EXPERTS; e += THREADS) table.offset[e] = offset[e];
    if (threadIdx.x < RANKS) table.num_tokens[threadIdx.x] = smem.num_tokens[threadIdx.x];
  }
  for (int first = begin; first < end; first += GROUP_TOKENS) {
    const long long i = choice(first);
    const int local = i >= 0 ? table.place[i] : -1;
    const unsigned same = __match_any_sync(~0u, local);  // in order of token and choice, as lanes are
    int place = -1;
    if (local >= 0) {
      const long long row = offset[local] + count[warp * EXPERTS + local] + __popc(same & ((1u << lane) - 1));
      place = row < table.max_rows ? static_cast<int>(row) : -2;
      if (place >= 0)
        table.slot[place] = static_cast<int>(i / TOP_K);
      else
        atomicAdd(memory.report + 1, 1ull);
    }
    __syncwarp();
    if (local >= 0 && lane == __ffs(same) - 1) count[warp * EXPERTS + local] += __popc(same);
    __syncwarp();
    if (i >= 0) table.place[i] = place;
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

// ---- receiving --------------------------------------------------------------------------------------------------------

__device__ inline float pushed_scale(const Memory& memory, const Buffer& buffer, int from, long long index,
                                     unsigned tag) {
  if constexpr (TAGGED)
    return to_float(wait_for_pair(memory, ROWS, from, buffer.scales, index, tag));
  else
    return __ldcg(at<float>(memory, memory.rank, buffer.scales) + index);
}

// Whether a token that is on its way goes to this rank; asked by whole warps.
__device__ inline bool comes(const Memory& memory, const Buffer& buffer, int from, long long slot, unsigned tag) {
  const int j = threadIdx.x % 32;
  bool mine = false;
  if (j < TOP_K) {
    uint4 word = {};
    wait(memory, CHOICES, from, tag, [&] {
      word = peek_tagged(at<uint4>(memory, memory.rank, buffer.choices) + slot * TOP_K + j);
      return word.y == tag && word.w == tag;
    });
    mine = word.y == tag && word.x < NUM_EXPERTS && word.x / EXPERTS == memory.rank;
  }
  return __any_sync(~0u, mine);
}

// One token's pieces to where they belong. OUTPUT 0 is only needed for rows that came TAGGED.
__device__ inline void receive_row(const Memory& memory, const Buffer& buffer, const Table& table, const Item& item,
                                   int from, WIRE* rows, float* scales, unsigned tag) {
  const long long slot = static_cast<long long>(from) * MAX_TOKENS + item.token;
  if (OUTPUT == 0 && !comes(memory, buffer, from, slot, tag)) return;
  constexpr int COPIES = OUTPUT == 0 ? 1 : TOP_K;
  int place[COPIES];
  bool any = OUTPUT == 0;
#pragma unroll
  for (int j = 0; j < COPIES; ++j) {
    place[j] = OUTPUT == 0 ? static_cast<int>(slot) : __ldcg(table.place + slot * TOP_K + j);
    any |= place[j] != -1;
  }
  if (!any) return;
  for (int i = item.first; i < PIECES; i += STEP * UNROLL) {
    uint4 piece[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (i + u * STEP < PIECES) piece[u] = pushed(memory, buffer, from, slot * PIECES + i + u * STEP, tag);
#pragma unroll
    for (int j = 0; j < COPIES; ++j) {
      if (place[j] < 0) continue;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (i + u * STEP < PIECES) store_piece(rows + static_cast<long long>(place[j]) * HIDDEN, i + u * STEP, piece[u]);
    }
  }
#if FP8
  for (int g = item.leads() ? item.lane : SCALES; g < SCALES; g += LANES) {
    const float scale = pushed_scale(memory, buffer, from, slot * SCALES + g, tag);
#pragma unroll
    for (int j = 0; j < COPIES; ++j)
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
    if (place < 0) {
      if (place == -2 && lane == 0) grad_weight[slot * TOP_K + j] = 0;
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
extern "C" __global__ void __launch_bounds__(THREADS)
    direct_dispatch(const __grid_constant__ Memory memory, const __grid_constant__ Buffer buffer,
                    const __grid_constant__ Table table, const ELEMENT* x, const int* expert, const float* weight,
                    int num_tokens, const ELEMENT* answers, WIRE* rows, float* scales, float* grad_weight,
                    int pushers) {
  if (peek(memory.failed)) return;
  __shared__ Smem smem;
  const unsigned tag = peek(&buffer.counters->uses) + 1;
#if OUTPUT == 2
  if (blockIdx.x < pushers) push_rows(memory, buffer, x, expert, num_tokens, pushers, tag);
  for (int rank = threadIdx.x; rank < RANKS; rank += THREADS) smem.num_tokens[rank] = table.num_tokens[rank];
  __syncthreads();
  for (;;) {
    const int ticket = take_ticket(buffer), from = ticket % RANKS, number = ticket / RANKS;
    if (number >= num_items(MAX_TOKENS)) break;
    if (number >= num_items(smem.num_tokens[from]) || number % SLICES) continue;
    if (!TAGGED) {
      if (threadIdx.x < SLICES) wait_for_item(memory, buffer, from, number + threadIdx.x, tag);
      __syncthreads();
    }
    for (int n = threadIdx.x / 32; n < CHUNK; n += WARPS) {
      const int token = number / SLICES * CHUNK + n;
      if (token < smem.num_tokens[from])
        spread_row(memory, buffer, table, from, token, answers, rows, grad_weight, tag);
    }
  }
#else
  const int table_block = blockIdx.x - (gridDim.x - TABLE_BLOCKS);
  if (table_block >= 0) {
    push_choices(memory, buffer, expert, weight, num_tokens, table_block, tag);
    wait_for_tokens(memory, buffer, tag, smem);
    make_table(memory, buffer, table, table_block, tag, smem);
    if (OUTPUT == 0 && !TAGGED)  // everything has come
      for (int rank = 0; rank < RANKS; ++rank)
        for (int i = table_block * THREADS + threadIdx.x; i < num_items(smem.num_tokens[rank]); i += TABLE_BLOCKS * THREADS)
          wait_for_item(memory, buffer, rank, i, tag);
  } else if (blockIdx.x < pushers) {
    push_rows(memory, buffer, x, expert, num_tokens, pushers, tag);
  }
  if (OUTPUT == 1 || (TAGGED && table_block < 0)) {
    if (table_block < 0) wait_for_tokens(memory, buffer, tag, smem);
    if (OUTPUT == 1) {
      if (threadIdx.x == 0)
        wait(memory, INSIDE, memory.rank, tag,
             [&] { return static_cast<int>(acquire(&buffer.counters->tables) - tag * TABLE_BLOCKS) >= 0; });
      __syncthreads();
    }
    const int blocks = gridDim.x - (OUTPUT == 0 ? TABLE_BLOCKS : 0);
    for (int n = blockIdx.x;; n += blocks) {
      const int ticket = TAGGED ? n : take_ticket(buffer), from = ticket % RANKS;
      if (ticket / RANKS >= num_items(MAX_TOKENS)) break;
      const Item item(ticket / RANKS);
      if (item.number >= num_items(smem.num_tokens[from])) continue;
      if (!TAGGED) {
        if (threadIdx.x == 0) wait_for_item(memory, buffer, from, item.number, tag);
        __syncthreads();
      }
      if (item.token < smem.num_tokens[from]) receive_row(memory, buffer, table, item, from, rows, scales, tag);
    }
  }
#endif
  // Compact rows are read until combine has taken their answers, which gives the credit.
  if (finish(buffer, tag) && (OUTPUT != 0 || TAGGED)) give_credit(memory, buffer.credit, tag);
}
