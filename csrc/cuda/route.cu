// route: from logits to everything in Routing, in one launch. With ROWS, the rows of x go to their experts in it too.
//
// 1. select   Each block has a range of tokens. Teams of lanes choose each token's experts (route_select.cuh).
// 2. count    Per expert a bit for each token of the block: ranks are counts of bits, whatever the order of execution.
// 3. exchange Blocks publish their counts and read those of all others (route_exchange.cuh).
// 4. emit     Slots, rows and the tables follow; with a capacity, drops.
//
// Shared memory of a block, in this order, in numbers of 4 bytes:
//
//   ring       SLOTS rows of x             with BULK: rows on their way (route_copy.cuh)
//   bits       [WORDS32, E]                bit t of bits[w, e]: token 32 w + t of the block chose expert e
//   preceding  [WORDS32, E]                how many of the block's tokens before word w chose e
//   counted    [E]                         how many of the block's tokens chose e
//   total      [E]                         of all blocks' tokens; with one block it is `counted` itself
//   before     [E]                         of the tokens of the blocks before this one; with GRID
//   begin      [E + 1]                     the first row of each expert
//   pick       [tokens, K]                 the choices, later with their ranks; with SPILL in the output `row`
//   score      [tokens, K]                 their scores; with SPILL in the output `weight`
//   part       [PART]                      each warp's sums of counts (Board::collect)
//   scratch    [WARPS, E + GROUPS]         keys of a token, with GROUPS
//
// An example with one block, one word of bits and K = 1:
//
//   token  expert        bits[0, e], token 0 on the right   total   begin
//     0      1           e = 0    1 0 0 0                     1       0        source = 3 0 1 2
//     1      1           e = 1    0 0 1 1                     2       1        row    = 1 2 3 0
//     2      2           e = 2    0 1 0 0                     1       3
//     3      0                                                        4
//
// slot = before[e] + preceding[w, e] + the number of bits below t in bits[w, e], and row = begin[e] + slot. Token 1: one
// bit below it, so slot 1 and row 2. Nothing depends on which thread set its bit first: every run gives the same table.
//
// THREADS, BLOCKS   threads of a block; blocks that a multiprocessor must hold, for the compiler's register budget
// GRID              1: many blocks, which wait for each other: no more than multiprocessors; 0: one block
// MASK              1: masked tokens get no experts
// NORMALIZE         1: a token's kept weights are divided by their sum
// ALIGNED           1: each expert's rows end at a multiple of `align`
// CAPACITY          1: an expert keeps at most `capacity` assignments
// DROP              which: 0 by position, 1 by choice, 2 by probability, 3 random
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
constexpr bool EARLY = DIRECT && WORDS32 <= 2;            // counts are published as soon as the bits are there
constexpr bool WEIGHTS_LATER = NORMALIZE || CAPACITY;      // a weight depends on other choices of its token, or on drops
constexpr int PASSES = CHOICE_MAJOR ? K : 1;
constexpr unsigned NOTHING = 0xffffffffu;                  // a choice of a masked token, or of no expert

struct Arguments {
  const ELEMENT* logits;      // [T, E]
  const float* bias;          // [E]
  const unsigned char* mask;  // [T]
  const int64* step;
  const int* recorded;  // [T, K]
  const int64* live;    // with RECORDED and MASK: the tokens that are not masked
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

#if CLUSTER && __CUDA_ARCH__ >= 900
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

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
    // All threads have read their scores before one of them writes a weight in their place.
    if (SPILL) __syncthreads();  // score and weight are the same memory
    if (active) weight[i] = value;
  }
}

constexpr int EACH = (E + 31) / 32;  // experts of a lane

// The EACH numbers of a lane, 0 beyond the last expert.
__device__ inline void load_experts(const unsigned* from, int first, unsigned (&value)[EACH]) {
  // Then each lane's experts are whole words of 16 bytes, at multiples of 16.
  if constexpr (E % 128 == 0) {
#pragma unroll
    for (int i = 0; i < EACH; i += 4)
      *reinterpret_cast<uint4*>(value + i) = *reinterpret_cast<const uint4*>(from + i);
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i) value[i] = first + i < E ? from[i] : 0;
  }
}

// Where the rows of each expert begin, from total[E]: begin[E + 1]. For one warp. Returns the sum of total.
__device__ inline unsigned scan_experts(const unsigned* total, int align, unsigned* begin) {
  const int lane = threadIdx.x % 32;
  unsigned chosen = 0, rows = 0;
  alignas(16) unsigned size[EACH];
  load_experts(total + lane * EACH, lane * EACH, size);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    chosen += size[i];
    if (ALIGNED) size[i] = (size[i] + align - 1) / align * align;
    rows += size[i];
  }
  // Inclusive prefix sums over lanes: after the step of 2^n a lane has the sum of 2^(n + 1) lanes up to itself.
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

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
}

// Sums over a warp: of aux and z as floats in x and y, of the problems seen in z.
__device__ inline uint4 add_losses(uint4 part) {
  const float aux = warp_sum(__uint_as_float(part.x)), z = warp_sum(__uint_as_float(part.y));
  return make_uint4(__float_as_uint(aux), __float_as_uint(z), __reduce_or_sync(ALL, part.z), 0);
}

// num_chosen: choices of all tokens that are not masked.
__device__ inline float mean_aux(uint4 sum, unsigned num_chosen) {
  const float over_tokens = num_chosen ? static_cast<float>(K) / static_cast<float>(num_chosen) : 0.0f;
  return static_cast<float>(E) / K * (__uint_as_float(sum.x) * over_tokens) * over_tokens;
}

__device__ inline void write_z(const Arguments& a, uint4 sum, unsigned num_chosen) {
  *a.z_loss = num_chosen ? __uint_as_float(sum.y) * K / static_cast<float>(num_chosen) : 0.0f;
  *a.status = sum.z;
}

#if GRID && !CLUSTER
#define WAIT_FOR_ALL board.wait_for_all<true>()
#else
#define WAIT_FOR_ALL __syncthreads()
#endif

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, BLOCKS) route(const Arguments a) {
  // What blocks of a cluster send to each other lies in static shared memory: it has the same address in each of them.
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint4 warp_losses[WARPS], block_losses[CLUSTER ? CLUSTER : 1], words[CLUSTER ? CLUSTER * PACKED : 1];
  __shared__ unsigned long long counts_arrived, losses_arrived;
  __shared__ unsigned num_chosen;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, member = threadIdx.x % LANES;
  const int blocks = gridDim.x, block = blockIdx.x;
  const int first = block * a.tokens_per_block;
  const int tokens = max(0, min(a.tokens_per_block, a.num_tokens - first)), n = tokens * K;
  const int64 first_assignment = static_cast<int64>(first) * K;
#if ROWS
  unsigned* bits = reinterpret_cast<unsigned*>(shared + SLOTS * a.row_bytes);  // [WORDS32, E]
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
  unsigned* const part = own + (SPILL ? 0 : 2 * a.tokens_per_block * K);
  float* const scratch = reinterpret_cast<float*>(part + (GRID && !CLUSTER ? PART : 0));
  // What needs no input comes before wait_for_inputs(): it runs while the kernel before on the stream ends.
  share_out<WORDS32 * E>([&](int i) { bits[i] = 0; });
#if ROWS
  __shared__ unsigned long long arrived[BULK ? SLOTS : 1];
  const Copier copier{a.x + static_cast<int64>(first) * a.row_bytes, shared, arrived, tokens, a.row_bytes};
  copier.prepare();
#endif
  if (CLUSTER && threadIdx.x == 0) {
    expect(&counts_arrived, CLUSTER * PACKED * 16);
    expect(&losses_arrived, CLUSTER * 16);
  }
  // Release: the barriers that `expect` has made exist before a block that has waited below sends to them.
  if (CLUSTER) cluster_arrive();  // its shared memory is ready for what others send
  // The zeros in bits are there before any warp sets a bit.
  __syncthreads();
  wait_for_inputs();

  // ---- select ----
  const ELEMENT* const logits = a.logits + static_cast<int64>(first) * E;
  // Lanes beyond the last token load its row again: a load is cheaper than a branch, and nothing comes of it.
  const auto row_of = [&](int start) { return logits + static_cast<int64>(min(start + lane / LANES, tokens - 1)) * E; };
  // The next token's logits are loaded while this one's are looked at.
  Logits ahead[CHUNKS];
  if (warp * TEAMS_OF_WARP < tokens) load_logits(row_of(warp * TEAMS_OF_WARP), member, ahead);
#if ROWS
  const bool at_once = a.tokens_per_block <= TEAMS;  // all logits are asked for: rows do not keep them waiting
  if (at_once) copier.start();
#endif
#if GRID && !CLUSTER
  Board board(a.board);
#endif
  // `step` is read here and not by the host, so that a CUDA graph draws new numbers at each replay.
  moecomm::Generator generator{a.seed, a.generator_offset};
  if ((NOISE || RANKED) && a.step) generator.offset += static_cast<unsigned long long>(*a.step);
  // A thread's sums over all tokens that its team chooses for. They become the losses.
  float mean[VALUES] = {}, z = 0.0f;
  bool bad = false, misrecorded = false;
  const Selection how{a.bias, generator, a.noise_scale, scratch + warp * (E + GROUPS)};
  // All lanes of a warp stay in the loop as long as one team has a token: they take part in its shuffles.
#pragma unroll 1
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
    const int* const recorded = RECORDED ? a.recorded + first_assignment + min(local, tokens - 1) * K : nullptr;
    const Token token = choose(x, row, recorded, element, member, live ? 1.0f : 0.0f, how, mean);
    if (local >= tokens) continue;
    if (member == 0) {
      a.lse[first + local] = live ? token.lse : 0.0f;
      if (live) z = fmaf(token.lse, token.lse, z);
    }
    bad |= live && token.bad;
    misrecorded |= live && token.misrecorded;
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s) {
      const int j = s * LANES + member;
      if (j >= K) continue;
      const bool taken = live && token.expert[s] != NO_EXPERT;
      pick[local * K + j] = taken ? token.expert[s] : NOTHING;
      if (WEIGHTS_LATER) score[local * K + j] = taken ? token.score[s] : 0.0f;
      // Without a capacity nothing is dropped: what was chosen is final, and written while other warps still choose.
      if (!CAPACITY) {
        const int64 assignment = first_assignment + local * K + j;
        a.expert[assignment] = taken ? token.expert[s] : -1;
        if (!NORMALIZE) a.weight[assignment] = taken ? moecomm::mul(a.scale, token.score[s]) : 0.0f;
      }
      // Tokens of one word are on several lanes and warps. The order of the atomics leaves no trace in the bits.
      if (DIRECT && taken) atomicOr(&bits[local / 32 * E + token.expert[s]], 1u << local % 32);
    }
  }
  if (BIAS)
    share_out<E>([&](int e) { bad |= !(fabsf(a.bias[e]) < INFINITE); });
  // The barrier below makes bits, choices and these sums of all warps visible to the block.
  z = warp_sum(z);
  unsigned problems = __any_sync(ALL, bad) ? 1 : 0;
  if (RECORDED) problems |= __any_sync(ALL, misrecorded) ? 4 : 0;
  if (lane == 0) warp_losses[warp] = make_uint4(0, __float_as_uint(z), problems, 0);
  __syncthreads();
  // With many tokens the rows come after the logits: both share the bandwidth, and only logits are waited for.
#if ROWS
  if (!at_once) copier.start();
#endif

  // ---- count ----
  const auto tokens_of = [&](int e) {  // with EARLY
    unsigned sum = 0;
#pragma unroll
    for (int word = 0; word < WORDS32; ++word) sum += __popc(bits[word * E + e]);
    return sum;
  };
#if CLUSTER
  static_assert(EARLY, "a cluster has few tokens");
  // Acquire: pairs with cluster_arrive above. Every block's barriers exist, so counts may be sent to them.
  cluster_wait();
  share_counts(tokens_of, block, words, &counts_arrived);
#elif GRID
  if (EARLY) board.publish(0, tokens_of);
  // Two lanes write two equal words: 32 bytes at once, see VECTORS.
  if (warp == WARPS - 1) {
    const uint4 sum = add_losses(lane < WARPS ? warp_losses[lane] : make_uint4(0, 0, 0, 0));
    if (lane < 2) store_word(&board.losses[block].of_block + lane, make_uint4(0, sum.y, sum.z, board.tag));
  }
#endif
  share_out<E>([&](int e) { counted[e] = 0; });
  if (!DIRECT) __syncthreads();
  for (int pass = 0; pass < PASSES; ++pass) {
    for (int chunk = 0; chunk < (DIRECT ? 1 : tokens); chunk += 32 * WORDS32) {
      const int chunk_end = min(tokens, chunk + 32 * WORDS32) * K;
      // The bits hold one chunk of tokens, or one choice of each token, at a time; a rank must be kept before they go.
      if (!DIRECT) {
        share_out<WORDS32 * E>([&](int i) { bits[i] = 0; });
        __syncthreads();
        for (int i = chunk * K + threadIdx.x; i < chunk_end; i += THREADS) {
          const int local = i / K - chunk;
          if (pick[i] != NOTHING && (PASSES == 1 || i % K == pass))
            atomicOr(&bits[local / 32 * E + (pick[i] & 1023)], 1u << local % 32);
        }
        __syncthreads();
      }
      // One thread for an expert: a prefix sum over the words, on top of the chunks before.
      share_out<E>([&](int e) {
        unsigned so_far = counted[e];
#pragma unroll
        for (int word = 0; word < WORDS32; ++word) {
          preceding[word * E + e] = so_far;
          so_far += __popc(bits[word * E + e]);
        }
        counted[e] = so_far;
      });
      __syncthreads();
      if (!DIRECT)
        for (int i = chunk * K + threadIdx.x; i < chunk_end; i += THREADS) {
          const int local = i / K - chunk, e = pick[i] & 1023, at = local / 32 * E + e;
          // 10 bits for the expert, 22 for the rank: blocks of up to 2^22 tokens.
          if (pick[i] != NOTHING && (PASSES == 1 || i % K == pass))
            pick[i] = e | (preceding[at] + __popc(bits[at] & ((1u << local % 32) - 1))) << 10;
        }
      if (!DIRECT) __syncthreads();
    }
#if GRID && !CLUSTER
    if (!EARLY) board.publish(pass, [&](int e) { return counted[e]; });
    if (PASSES > 1) {  // each pass is counted from 0
      __syncthreads();
      share_out<E>([&](int e) { counted[e] = 0; });
    }
#endif
  }

  // ---- exchange ----
  // Weights that do not depend on drops are written while the counts of the other blocks are on their way.
#if CLUSTER
  if (!CAPACITY && NORMALIZE) write_weights(a, score, n, a.weight + first_assignment);
  // Acquire: pairs with the completion of each `send`. All counts are in this block's shared memory.
  await(&counts_arrived);
  add_shared_counts(words, block, total, before);
  __syncthreads();
#else
  if (!CAPACITY && NORMALIZE) write_weights(a, score, n, a.weight + first_assignment);
#endif
#if GRID && !CLUSTER
  // No fence: what is read after it is tagged words, each of which says itself whether it is there. The wait only
  // keeps warps from polling hundreds of words while some block still chooses.
  board.wait_for_all<false>();
  for (int pass = 0; pass < PASSES; ++pass) {
    // Choice-major order: the slots of a pass follow all assignments of the passes before, which `counted` adds up.
    board.collect(pass, total, before, part);
    __syncthreads();
    if (PASSES > 1) {
      for (int i = threadIdx.x; i < n; i += THREADS)
        if (i % K == pass && pick[i] != NOTHING) {
          const unsigned e = pick[i] & 1023;
          a.slot[first_assignment + i] = counted[e] + before[e] + (pick[i] >> 10);
        }
      __syncthreads();
      share_out<E>([&](int e) { counted[e] += total[e]; });
      __syncthreads();
    }
  }
  if (PASSES > 1) {
    share_out<E>([&](int e) { total[e] = counted[e]; });
    __syncthreads();
  }
#endif
  // aux = sum over experts of (sum of scores) * (tokens that chose it). Each warp adds its own tokens' scores: the sums
  // over experts never leave the registers.
  float aux = 0.0f;
  if (warp * TEAMS_OF_WARP < tokens) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
      if (expert_of(i, member) < E) aux = fmaf(mean[i], static_cast<float>(total[expert_of(i, member)]), aux);
    aux = warp_sum(aux);
  }
  if (lane == 0) warp_losses[warp].x = __float_as_uint(aux);
  if (warp == WARPS - 1) {  // where it can be, a warp without tokens
    unsigned chosen = scan_experts(total, a.align, begin);
    // A choice that was dropped when it was recorded is in no count, but its token is in the means.
    if (RECORDED) chosen = K * static_cast<unsigned>(MASK ? *a.live : a.num_tokens);
    if (lane == 0) num_chosen = chosen;
  }
  __syncthreads();

  // ---- emit ----
  // `begin`, `num_chosen` and the warps' losses are there for the block.
#if GRID && !CLUSTER
  unsigned long long share = 0, earlier = 0;
#endif
  if (warp == 0) {
    const uint4 sum = add_losses(lane < WARPS ? warp_losses[lane] : make_uint4(0, 0, 0, 0));
#if CLUSTER
    if (lane == 0) send(0, block_losses + block, sum, &losses_arrived);
#elif GRID
    share = Board::aux_share(mean_aux(sum, num_chosen));
    if (lane == 0) earlier = board.add_aux(share);
#else
    if (lane == 0) *a.aux_loss = mean_aux(sum, num_chosen);
    if (lane == 0) write_z(a, sum, num_chosen);
#endif
  }
#if GRID && !CLUSTER
  // z and the problems were published before the counts were exchanged, so most of these words do not have to be waited for.
  if (warp == WARPS - 1 && block == 0) {
    uint4 sum = make_uint4(0, 0, 0, 0);
    for (int other = lane; other < blocks; other += 32) {
      const uint4 loss = board.read(&board.losses[other].of_block);
      sum.y = __float_as_uint(__uint_as_float(sum.y) + __uint_as_float(loss.y));
      sum.z |= loss.z;
    }
    sum = add_losses(sum);
    if (lane == 0) write_z(a, sum, num_chosen);
  }
#endif
  if (block == 0)
    share_out<E + 1>([&](int e) {
      if (e < E) a.load[e] = total[e];
      if (e < E) a.count[e] = CAPACITY ? min(static_cast<int>(total[e]), a.capacity) : total[e];
      a.offset[e] = CAPACITY ? e * a.capacity : begin[e];
    });
  // The rank of assignment i among those of the block that chose its expert.
  const auto rank_of = [&](int i) {
    if (!DIRECT) return pick[i] >> 10;
    const int local = i / K, at = local / 32 * E + static_cast<int>(pick[i]);
    return preceding[at] + __popc(bits[at] & ((1u << local % 32) - 1));
  };
  // Keys go through device memory, since an expert's come from all blocks and one block ranks them.
  if (RANKED) {
    for (int i = threadIdx.x; i < n; i += THREADS)
      if (pick[i] != NOTHING) {
        const unsigned e = pick[i] & 1023;
        a.key[begin[e] + (GRID ? before[e] : 0) + rank_of(i)] =
            DROP == 2 ? moecomm::ordered(score[i])
                      : moecomm::random_word(generator, moecomm::kDrop, static_cast<unsigned long long>(first_assignment + i));
      }
    // Orders every block's writes of key[] before the reads below.
    WAIT_FOR_ALL;
    for (int e = block; e < E; e += blocks)
      if (total[e] > a.capacity) keep_largest(a.key + begin[e], total[e], a.capacity, a.place + begin[e]);
    // Orders the writes of place[] before the reads below.
    WAIT_FOR_ALL;
  }
#pragma unroll 1
  for (int i = THREADS - 1 - threadIdx.x; i < n; i += THREADS) {  // the first warps are busy: few choices are for the last
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
    if (ROWS) pick[i] = to;
    a.slot[assignment] = slot;
    if (CAPACITY) a.expert[assignment] = slot < 0 ? -1 : static_cast<int>(picked & 1023);
    a.row[assignment] = to;
  }
  // A token's choices were handled by several threads. Its weights and its row's copies need all of them.
  if (CAPACITY || ROWS) __syncthreads();
#if ROWS
  copier.finish(pick, a.rows);
#endif
  if (CAPACITY) write_weights(a, score, n, a.weight + first_assignment);

  // Rows that hold nothing: behind each expert's last one, and behind all experts.
  const auto empty_row = [&](int r) {
#if ROWS
    zero_row(a.rows + static_cast<int64>(r) * a.row_bytes, a.row_bytes);
#endif
    if (lane == 0) a.source[r] = -1;
  };
  // Units of work: an expert's rows, or with more blocks than experts a part of them.
  const int parts = max(1, blocks / E);
  if (CAPACITY || ALIGNED)
    for (int unit = block; unit < E * parts; unit += blocks) {
      const int e = unit / parts, kept = CAPACITY ? min(static_cast<int>(total[e]), a.capacity) : total[e];
      const int start = CAPACITY ? e * a.capacity : begin[e], end = CAPACITY ? start + a.capacity : begin[e + 1];
      for (int r = start + kept + unit % parts * WARPS + warp; r < end; r += parts * WARPS) empty_row(r);
    }
  if (!CAPACITY && (MASK || ALIGNED || RECORDED))
    for (int r = begin[E] + block * WARPS + warp; r < a.num_rows; r += blocks * WARPS) empty_row(r);

#if CLUSTER
  // Block 0 must not end before: the others write into its shared memory.
  if (block == 0 && warp == 0) {
    await(&losses_arrived);
    const uint4 sum = add_losses(lane < CLUSTER ? block_losses[lane] : make_uint4(0, 0, 0, 0));
    if (lane == 0) *a.aux_loss = mean_aux(sum, num_chosen);
    if (lane == 0) write_z(a, sum, num_chosen);
  }
#elif GRID
  // The last block to add its share has the sum of all of them in what the atomic returned: no other memory is read, so
  // the atomic needs no ordering. Every block has read the header by then, and the next launch starts from what is
  // written here; it is ordered after this one by the stream.
  if (threadIdx.x == 0 && (earlier & 4095) == blocks - 1) {  // the last one
    *a.aux_loss = static_cast<float>((earlier + share) >> 12) * 9.094947017729282e-13f;
    board.close(RANKED ? 3 : 1);
  }
#endif
}
