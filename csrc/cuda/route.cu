// route: from logits to everything in Routing, in one launch. With ROWS, the rows of x go to their experts in it too.
//
// 1. select   Each block has a range of tokens. Teams of lanes choose each token's experts (route_select.cuh).
// 2. count    Per expert a bit for each token of the block: ranks are counts of bits, whatever the order of execution.
// 3. exchange  Blocks publish their counts and read those of all others (route_exchange.cuh).
// 4. emit     Slots, rows and the tables follow; with a capacity, drops.
//
// THREADS, BLOCKS   threads of a block; blocks that a multiprocessor must hold, for the compiler's register budget
// GRID              1: many blocks, all resident at once; 0: one block
// MASK              1: masked tokens get no experts
// NORMALIZE         1: a token's kept weights are divided by their sum
// CAPACITY          1: an expert keeps at most `capacity` assignments; DROP: 0 position, 1 choice, 2 probability, 3 random
// WORDS32           words of 32 tokens that a block counts at once
// CHUNKED           1: a block has more tokens than that
// SPILL             1: its choices do not fit into shared memory, and wait in the outputs
// and those of the included files
#include "rows.cuh"
#include "route_select.cuh"
#include "route_exchange.cuh"
#include "route_drop.cuh"
#if ROWS
#include "route_copy.cuh"
#endif

constexpr int TEAMS = THREADS / LANES, TEAMS_OF_WARP = 32 / LANES;
constexpr int STEP = THREADS / K * K;                      // assignments that a block looks at together: whole tokens
constexpr bool CHOICE_MAJOR = DROP == 1 && K > 1;          // slots: all first choices, then all second ones, ...
constexpr bool RANKED = CAPACITY && DROP >= 2;             // the largest keys stay
constexpr bool DIRECT = !CHOICE_MAJOR && !CHUNKED;         // bits are set while selecting, and kept
constexpr int PASSES = CHOICE_MAJOR ? K : 1;
constexpr unsigned NOTHING = 0xffffffffu;                  // the choice of a masked token

struct Arguments {
  const ELEMENT* logits;      // [T, E]
  const float* bias;          // [E]
  const unsigned char* mask;  // [T]
  const int64* offset_tensor;
  int* expert;    // [T, K]
  float* weight;  // [T, K]
  int* slot;      // [T, K]
  int* row;       // [T, K]
  int* source;    // [N]
  int* count;     // [E]
  int* offset;    // [E + 1]
  int* load;      // [E]
  float* aux_loss;
  float* z_loss;
  float* lse;  // [T]
  int* status;
  uint4* board;
  unsigned* key;  // [T * K], by expert, with RANKED
  int* place;     // [T * K]
  const unsigned char* x;
  unsigned char* rows;
  unsigned long long seed, generator_offset;
  float floor, scale, noise_scale;
  int num_tokens, tokens_per_block, capacity, align, num_rows, row_bytes;
};

// The weights of the block's tokens. score[] of a dropped assignment is 0.
__device__ inline void write_weights(const Arguments& a, const float* score, int n, float* weight) {
  for (int base = 0; base < n; base += STEP) {
    const int i = base + threadIdx.x;
    const bool active = threadIdx.x < STEP && i < n;
    float sum = 0.0f, value = 0.0f;
    if (active) {
      if constexpr (NORMALIZE)
        for (int j = 0, token = i - threadIdx.x % K; j < K; ++j) sum = moecomm::add(sum, score[token + j]);
      value = moecomm::choice_weight(score[i], sum, NORMALIZE ? a.floor : 0.0f, a.scale);
    }
    if (SPILL) __syncthreads();  // score and weight are the same memory
    if (active) weight[i] = value;
  }
}

// What follows from total[E] for the rows of each expert: begin[E + 1]. Returns the number of choices. For one warp.
__device__ inline unsigned scan_experts(const Arguments& a, const unsigned* total, unsigned* begin) {
  constexpr int EACH = (E + 31) / 32;
  const int lane = threadIdx.x % 32;
  unsigned chosen = 0, rows = 0, size[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    size[i] = lane * EACH + i < E ? total[lane * EACH + i] : 0;
    chosen += size[i];
    if (!CAPACITY && a.align > 1) size[i] = (size[i] + a.align - 1) / a.align * a.align;
    rows += size[i];
  }
  unsigned end = rows;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned below = __shfl_up_sync(ALL, end, step);
    if (lane >= step) end += below;
  }
  unsigned at = end - rows;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    if (lane * EACH + i < E) begin[lane * EACH + i] = at;
    at += size[i];
  }
  if (lane == 31) begin[E] = at;
  return __reduce_add_sync(ALL, chosen);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) route(const Arguments a) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float warp_loss[2][WARPS];
  __shared__ unsigned warp_bad[WARPS], num_chosen;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, member = threadIdx.x % LANES;
  const int first = blockIdx.x * a.tokens_per_block;
  const int tokens = max(0, min(a.tokens_per_block, a.num_tokens - first)), n = tokens * K;
  const int64 first_assignment = static_cast<int64>(first) * K;
#if ROWS
  unsigned char* const ring = shared;
  unsigned* bits = reinterpret_cast<unsigned*>(shared + static_cast<int64>(SLOTS) * a.row_bytes);  // [WORDS32, E]
#else
  unsigned* bits = reinterpret_cast<unsigned*>(shared);
#endif
  unsigned* const preceding = bits + WORDS32 * E;  // [WORDS32, E] of the block's tokens before each word of bits
  unsigned* const counted = preceding + WORDS32 * E;
  unsigned* const total = GRID ? counted + E : counted;
  unsigned* const before = GRID ? counted + 2 * E : nullptr;  // of the blocks before this one
  unsigned* const begin = counted + (GRID ? 3 : 1) * E;
  unsigned* const own = begin + E + 1;
  unsigned* const pick = SPILL ? reinterpret_cast<unsigned*>(a.row) + first_assignment : own;
  float* const score = SPILL ? a.weight + first_assignment : reinterpret_cast<float*>(own + a.tokens_per_block * K);
  float* const scratch = reinterpret_cast<float*>(own + (SPILL ? 0 : 2 * a.tokens_per_block * K));
  uint4* const barriers = a.board + 1;
  uint4* const losses = barriers + 2 * gridDim.x;
  uint4* const counts = losses + gridDim.x * WARPS;
  const unsigned launch = GRID ? *reinterpret_cast<const volatile unsigned*>(a.board) + 1 : 0;
  moecomm::Generator generator{a.seed, a.generator_offset};
  if ((NOISE || RANKED) && a.offset_tensor) generator.offset += static_cast<unsigned long long>(*a.offset_tensor);

  // ---- select ----
  const ELEMENT* const logits = a.logits + static_cast<int64>(first) * E;
  const auto row_of = [&](int start) { return logits + static_cast<int64>(min(start + lane / LANES, tokens - 1)) * E; };
  Logits ahead[CHUNKS];
  if (warp * TEAMS_OF_WARP < tokens) load_logits(row_of(warp * TEAMS_OF_WARP), member, ahead);
  for (int i = threadIdx.x; i < WORDS32 * E; i += THREADS) bits[i] = 0;
#if ROWS
  __shared__ unsigned long long arrived[BULK ? SLOTS : 1];
  const Copier copier{a.x + static_cast<int64>(first) * a.row_bytes, ring, arrived, tokens, a.row_bytes};
  copier.prepare();
#endif
  __syncthreads();
  float mean[VALUES] = {}, z = 0.0f;
  bool bad = false;
  const Selection how{a.bias, generator, a.noise_scale, scratch + warp * (E + GROUPS)};
  for (int start = warp * TEAMS_OF_WARP; start < tokens; start += TEAMS) {
    const int local = start + lane / LANES;
    const ELEMENT* const row = row_of(start);
    float x[VALUES];
    to_floats(ahead, member, x);
    if (start + TEAMS < tokens) load_logits(row_of(start + TEAMS), member, ahead);
    bool live = local < tokens;
    if (MASK && live && !a.mask[first + local]) live = false;
    if (MASK)
#pragma unroll
      for (int i = 0; i < VALUES; ++i)
        if (!live) x[i] = 0.0f;
    const unsigned long long element = static_cast<unsigned long long>(first + local) * E;
    const Token token = choose(x, row, element, member, live ? 1.0f : 0.0f, how, mean);
    if (local >= tokens) continue;
    if (member == 0) {
      a.lse[first + local] = live ? token.lse : 0.0f;
      if (live) z = fmaf(token.lse, token.lse, z);
    }
    bad |= live && token.bad;
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s) {
      const int j = s * LANES + member;
      if (j >= K) continue;
      pick[local * K + j] = live ? token.expert[s] : NOTHING;
      score[local * K + j] = live ? token.score[s] : 0.0f;
      if (DIRECT && live) atomicOr(&bits[local / 32 * E + token.expert[s]], 1u << local % 32);
    }
  }
  if (BIAS)
    for (int e = threadIdx.x; e < E; e += THREADS) bad |= !(fabsf(a.bias[e]) < INFINITE);
  __syncthreads();
#if ROWS
  copier.start();
#endif

  // ---- count ----
  for (int e = threadIdx.x; e < E; e += THREADS) counted[e] = 0;
  if (!DIRECT) __syncthreads();
  for (int pass = 0; pass < PASSES; ++pass) {
    for (int chunk = 0; chunk < (DIRECT ? 1 : tokens); chunk += 32 * WORDS32) {
      const int chunk_end = min(tokens, chunk + 32 * WORDS32) * K;
      if (!DIRECT) {
        for (int i = threadIdx.x; i < WORDS32 * E; i += THREADS) bits[i] = 0;
        __syncthreads();
        for (int i = chunk * K + threadIdx.x; i < chunk_end; i += THREADS) {
          const int local = i / K - chunk;
          if (pick[i] != NOTHING && (PASSES == 1 || i % K == pass))
            atomicOr(&bits[local / 32 * E + (pick[i] & 1023)], 1u << local % 32);
        }
        __syncthreads();
      }
      for (int e = threadIdx.x; e < E; e += THREADS) {
        unsigned so_far = counted[e];
#pragma unroll
        for (int word = 0; word < WORDS32; ++word) {
          preceding[word * E + e] = so_far;
          so_far += __popc(bits[word * E + e]);
        }
        counted[e] = so_far;
      }
      __syncthreads();
      if (!DIRECT)
        for (int i = chunk * K + threadIdx.x; i < chunk_end; i += THREADS) {
          const int local = i / K - chunk, e = pick[i] & 1023, at = local / 32 * E + e;
          if (pick[i] != NOTHING && (PASSES == 1 || i % K == pass))
            pick[i] = e | (preceding[at] + __popc(bits[at] & ((1u << local % 32) - 1))) << 10;
        }
      if (!DIRECT) __syncthreads();
    }
    if (GRID) publish_counts(counted, counts + static_cast<int64>(pass) * RECORDS * gridDim.x, launch);
    if (GRID && PASSES > 1) {  // each pass is counted from 0
      __syncthreads();
      for (int e = threadIdx.x; e < E; e += THREADS) counted[e] = 0;
    }
  }
  if (!CAPACITY) {
    write_weights(a, score, n, a.weight + first_assignment);
    for (int i = threadIdx.x; i < n; i += THREADS)
      a.expert[first_assignment + i] = pick[i] == NOTHING ? -1 : static_cast<int>(pick[i] & 1023);
  }

  // ---- exchange ----
  if (GRID) {
    __syncthreads();
    for (int pass = 0; pass < PASSES; ++pass) {
      collect_counts(counts + static_cast<int64>(pass) * RECORDS * gridDim.x, launch, total, before);
      __syncthreads();
      if (PASSES > 1) {
        for (int i = threadIdx.x; i < n; i += THREADS)
          if (i % K == pass && pick[i] != NOTHING) {
            const unsigned e = pick[i] & 1023;
            a.slot[first_assignment + i] = counted[e] + before[e] + (pick[i] >> 10);
          }
        __syncthreads();
        for (int e = threadIdx.x; e < E; e += THREADS) counted[e] += total[e];
        __syncthreads();
      }
    }
    if (PASSES > 1)
      for (int e = threadIdx.x; e < E; e += THREADS) total[e] = counted[e];
    if (PASSES > 1) __syncthreads();
  }
  if (warp == 0) {
    const unsigned chosen = scan_experts(a, total, begin);
    if (lane == 0) num_chosen = chosen;
  }
  float aux = 0.0f;
#pragma unroll
  for (int i = 0; i < VALUES; ++i)
    if (expert_of(i, member) < E) aux = fmaf(mean[i], static_cast<float>(total[expert_of(i, member)]), aux);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    aux += __shfl_xor_sync(ALL, aux, step);
    z += __shfl_xor_sync(ALL, z, step);
  }
  unsigned problems = __any_sync(ALL, bad) ? 1 : 0;
  if (lane == 0) {
    if (GRID) write_record(losses + blockIdx.x * WARPS + warp, __float_as_uint(aux), __float_as_uint(z), problems, launch);
    warp_loss[0][warp] = aux;
    warp_loss[1][warp] = z;
    warp_bad[warp] = problems;
  }
  __syncthreads();

  // ---- emit ----
  const auto rank_of = [&](int i) {
    if (!DIRECT) return pick[i] >> 10;
    const int local = i / K, at = local / 32 * E + static_cast<int>(pick[i]);
    return preceding[at] + __popc(bits[at] & ((1u << local % 32) - 1));
  };
  if (RANKED) {
    for (int i = threadIdx.x; i < n; i += THREADS)
      if (pick[i] != NOTHING) {
        const unsigned e = pick[i] & 1023;
        a.key[begin[e] + (GRID ? before[e] : 0) + rank_of(i)] =
            DROP == 2 ? moecomm::ordered(score[i])
                      : moecomm::random_word(generator, moecomm::kDrop, static_cast<unsigned long long>(first_assignment + i));
      }
    wait_for_all(barriers, launch);
    for (int e = blockIdx.x; e < E; e += gridDim.x)
      if (total[e] > a.capacity) keep_largest(a.key + begin[e], total[e], a.capacity, a.place + begin[e]);
    wait_for_all(barriers + gridDim.x, launch);
  }
  for (int i = threadIdx.x; i < n; i += THREADS) {
    const unsigned picked = pick[i];
    const int64 assignment = first_assignment + i;
    int slot = -1, to = -1;
    if (picked != NOTHING) {
      const unsigned e = picked & 1023;
      if (CHOICE_MAJOR && GRID)
        slot = a.slot[assignment];
      else
        slot = (GRID ? before[e] : 0) + rank_of(i);
      if (RANKED && total[e] > a.capacity) slot = a.place[begin[e] + slot];
      if (CAPACITY && slot >= a.capacity) slot = -1;
      if (slot >= 0) {
        to = (CAPACITY ? static_cast<int>(e) * a.capacity : begin[e]) + slot;
        a.source[to] = static_cast<int>(assignment);
      }
      if (CAPACITY && slot < 0) score[i] = 0.0f;
    }
    a.slot[assignment] = slot;
    if (CAPACITY) a.expert[assignment] = slot < 0 ? -1 : static_cast<int>(picked & 1023);
    a.row[assignment] = to;
    if (ROWS) pick[i] = to;
  }
  if (CAPACITY || ROWS) __syncthreads();
#if ROWS
  copier.finish(pick, a.rows);
#endif
  if (CAPACITY) write_weights(a, score, n, a.weight + first_assignment);

  // Rows that hold nothing: behind each expert's last one, and behind all experts.
  const auto empty_row = [&](int r) {
#if ROWS
    zero_row(a.rows, r, a.row_bytes);
#endif
    if (lane == 0) a.source[r] = -1;
  };
  const int blocks = gridDim.x, parts = max(1, blocks / E);
  if (CAPACITY || a.align > 1)
    for (int unit = blockIdx.x; unit < E * parts; unit += blocks) {
      const int e = unit / parts, kept = CAPACITY ? min(static_cast<int>(total[e]), a.capacity) : total[e];
      const int start = CAPACITY ? e * a.capacity : begin[e], end = CAPACITY ? start + a.capacity : begin[e + 1];
      for (int r = start + kept + unit % parts * WARPS + warp; r < end; r += parts * WARPS) empty_row(r);
    }
  if (!CAPACITY)
    for (int r = begin[E] + blockIdx.x * WARPS + warp; r < a.num_rows; r += blocks * WARPS) empty_row(r);

  // ---- what concerns all tokens: block 0 ----
  if (blockIdx.x > 0) return;
  for (int e = threadIdx.x; e <= E; e += THREADS) {
    if (e < E) a.load[e] = total[e];
    if (e < E) a.count[e] = CAPACITY ? min(static_cast<int>(total[e]), a.capacity) : total[e];
    a.offset[e] = CAPACITY ? e * a.capacity : begin[e];
  }
  if (GRID) {
    constexpr int BATCH = 5;
    aux = z = 0.0f;
    problems = 0;
    for (int at = threadIdx.x; at < blocks * WARPS; at += THREADS * BATCH) {
      uint4 record[BATCH];
      await_records(losses, at, THREADS, blocks * WARPS, launch, record);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        aux += __uint_as_float(record[i].x);
        z += __uint_as_float(record[i].y);
        problems |= record[i].z;
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      aux += __shfl_xor_sync(ALL, aux, step);
      z += __shfl_xor_sync(ALL, z, step);
    }
    problems = __reduce_or_sync(ALL, problems);
    __syncthreads();
    if (lane == 0) {
      warp_loss[0][warp] = aux;
      warp_loss[1][warp] = z;
      warp_bad[warp] = problems;
    }
    __syncthreads();
  }
  if (warp == 0) {
    aux = lane < WARPS ? warp_loss[0][lane] : 0.0f;
    z = lane < WARPS ? warp_loss[1][lane] : 0.0f;
    problems = __reduce_or_sync(ALL, lane < WARPS ? warp_bad[lane] : 0);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      aux += __shfl_xor_sync(ALL, aux, step);
      z += __shfl_xor_sync(ALL, z, step);
    }
    if (lane == 0) {
      const float counting = static_cast<float>(num_chosen / K);  // tokens that are not masked
      *a.aux_loss = counting > 0.0f ? static_cast<float>(E) / K * (aux / counting) / counting : 0.0f;
      *a.z_loss = counting > 0.0f ? z / counting : 0.0f;
      *a.status = problems;
      if (GRID) a.board[0].x = launch;
    }
  }
}
