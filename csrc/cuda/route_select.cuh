// One token's choices, made by a team of LANES lanes of one warp: each lane holds VALUES of the token's E logits.
//
// ELEMENT   the type of the logits: float, bfloat16, float16
// E, K      experts, choices of each token
// LANES     lanes that share a token: a power of two up to 32
// SCORE     0: softmax, 1: sigmoid
// BIAS      1: a bias is added to the keys that select
// GROUPS    groups of experts, of which the best TOP_GROUPS are eligible; 1: no groups
// BEST_IN_GROUP  keys of a group that are added to its score: its largest, or its two largest
// NOISE     0: none, 1: Gumbel, 2: jitter
// RECORDED  1: the experts were chosen before
// EXACT     1: scores select or drop, so they must have the reference's bits (exp and order of sums of score.h)
#pragma once
#include "../gating/score.h"
#include "rows.cuh"

constexpr unsigned ALL = 0xffffffffu;
#define INFINITE __int_as_float(0x7f800000)
// CHUNK neighbouring experts belong to one lane, loaded as one word; the lanes' chunks take turns along the row, so that
// a team's load is contiguous:
//
//   expert   0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15     E = 16, LANES = 2, CHUNK = 4
//   lane        0         1         0           1            lane 0 holds experts 0 .. 3 and 8 .. 11: CHUNKS = 2
constexpr int CHUNK = E % 4 == 0 && E >= 4 * LANES ? 4 : E % 2 == 0 && E >= 2 * LANES ? 2 : 1;
constexpr int CHUNKS = (E + CHUNK * LANES - 1) / (CHUNK * LANES);
constexpr int VALUES = CHUNK * CHUNKS;
constexpr int PER_LANE = (K + LANES - 1) / LANES;  // choices that one lane keeps: choice j is kept by lane j % LANES
constexpr bool KEYS_ARE_LOGITS = SCORE == 0 && !BIAS && GROUPS == 1;

__host__ __device__ constexpr int log2_up(int n) { return n <= 1 ? 0 : 1 + log2_up((n + 1) / 2); }

using Logits = Piece<ELEMENT, CHUNK>;

__device__ inline int expert_of(int i, int lane) { return (i / CHUNK * LANES + lane) * CHUNK + i % CHUNK; }

__device__ inline void load_logits(const ELEMENT* row, int lane, Logits (&piece)[CHUNKS]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
    if (E % (CHUNK * LANES) == 0 || expert_of(c * CHUNK, lane) < E)
      piece[c] = *reinterpret_cast<const Logits*>(row + expert_of(c * CHUNK, lane));
}

// Experts beyond the last one count as -inf: they have score 0, and every true expert precedes them.
__device__ inline void to_floats(const Logits (&piece)[CHUNKS], int lane, float (&x)[VALUES]) {
#pragma unroll
  for (int i = 0; i < VALUES; ++i)
    x[i] = E % (CHUNK * LANES) == 0 || expert_of(i, lane) < E ? to_float(piece[i / CHUNK].value[i % CHUNK]) : -INFINITE;
}

template <typename T, typename Combine>
__device__ inline T over_lanes(T value, Combine combine) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(ALL, value, step));
  return value;
}

// A lane's own values, combined pairwise: short chains of dependent instructions.
template <int N, typename Combine>
__device__ inline float fold(const float (&value)[N], Combine combine) {
  float part[N];
#pragma unroll
  for (int i = 0; i < N; ++i) part[i] = value[i];
#pragma unroll
  for (int step = 1; step < N; step *= 2)
#pragma unroll
    for (int i = 0; i + step < N; i += 2 * step) part[i] = combine(part[i], part[i + step]);
  return part[0];
}

__device__ inline float largest_of(const float (&x)[VALUES]) {
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  return over_lanes(fold(x, larger), larger);
}

// The sum of the team's terms. EXACT: the upper half is added onto the lower half of the experts until one is left.
__device__ inline float sum_of(const float (&term)[VALUES]) {
  // Experts e and e + half lie on one lane as long as half is a multiple of CHUNK * LANES; then on two lanes; then in
  // one chunk. So the three loops below are the folds of score.h from the largest half to the smallest.
  if constexpr (EXACT) {
    float part[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; ++i) part[i] = term[i];
#pragma unroll
    for (int half = 1 << log2_up(CHUNKS) >> 1; half > 0; half /= 2)
#pragma unroll
      for (int c = 0; c < half; ++c)
        if (c + half < CHUNKS)
#pragma unroll
          for (int j = 0; j < CHUNK; ++j)
            part[c * CHUNK + j] = moecomm::add(part[c * CHUNK + j], part[(c + half) * CHUNK + j]);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j)
      part[j] = over_lanes(part[j], [](float a, float b) { return moecomm::add(a, b); });
#pragma unroll
    for (int half = CHUNK / 2; half > 0; half /= 2)
#pragma unroll
      for (int j = 0; j < half; ++j) part[j] = moecomm::add(part[j], part[j + half]);
    return part[0];
  } else {
    const auto sum = [](float a, float b) { return a + b; };
    return over_lanes(fold(term, sum), sum);
  }
}

__device__ inline float reciprocal(float x) { return EXACT ? moecomm::div(1.0f, x) : __fdividef(1.0f, x); }

__device__ inline float softmax_term(float x, float largest) {
  if constexpr (EXACT) return moecomm::softmax_term(x, largest);
  // e^x as 2^(x / ln 2), by one instruction. These scores become weights, and decide nothing.
  float term;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(term) : "f"((x - largest) * 1.44269504f));
  return term;
}

// ---- top-k by rounds: exact for any keys -----------------------------------------------------------------------------

// NaN marks what cannot be chosen (any more): fmaxf skips it and it equals nothing.
__device__ inline void choose_by_rounds(float (&key)[VALUES], int lane, int (&expert)[PER_LANE], float (&best)[PER_LANE]) {
  // Unrolled only where that is little code: K rounds look at VALUES keys each.
#pragma unroll(K <= 8 && K * VALUES <= 64 ? K : 1)
  for (int j = 0; j < K; ++j) {
    const float largest = largest_of(key);
    // The lowest expert that has the largest key: from the last one down, so that the lowest is assigned last.
    int first = 1 << 30;
#pragma unroll
    for (int c = CHUNKS - 1; c >= 0; --c) {
      int here = 1 << 30;
#pragma unroll
      for (int i = CHUNK - 1; i >= 0; --i)
        if (key[c * CHUNK + i] == largest) here = expert_of(c * CHUNK + i, lane);
      first = min(first, here);
    }
    first = over_lanes(first, [](int a, int b) { return min(a, b); });
    first = min(first, E - 1);  // only NaN logits can leave less than K experts to choose from
    // A loop over all values with constant indices: an index known only at run time would put key[] into local memory.
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
      if (expert_of(i, lane) == first) key[i] = __int_as_float(0x7fffffff);
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s)
      if (j == s * LANES + lane) expert[s] = first, best[s] = largest;
  }
}

// ---- top-k by sorted lists: a key and its expert in one word -----------------------------------------------------------

constexpr int INDEX_BITS = log2_up(E);
constexpr unsigned INDEX_MASK = (1u << INDEX_BITS) - 1;
constexpr int LENGTH = 1 << log2_up(VALUES);
constexpr bool SORTED = !RECORDED && LANES == 32 && K >= 3 && K < 32 && LENGTH <= 16;
constexpr bool LOSSLESS = sizeof(ELEMENT) == 2 && KEYS_ARE_LOGITS && NOISE == 0;  // the low bits of a 16-bit logit are 0

__device__ inline void sort_descending(unsigned (&word)[LENGTH]) {  // Batcher's odd-even merge sort
#pragma unroll
  for (int p = 1; p < LENGTH; p *= 2)
#pragma unroll
    for (int k = p; k >= 1; k /= 2)
#pragma unroll
      for (int i = 0; i < LENGTH; ++i)
        if (i >= k % p && (i - k % p) / k % 2 == 0 && i + k < LENGTH && i / (2 * p) == (i + k) / (2 * p)) {
          const unsigned high = max(word[i], word[i + k]);
          word[i + k] = min(word[i], word[i + k]);
          word[i] = high;
        }
}

// Each lane sorts its words once; each round takes the largest head. The low bits of a key make room for the expert, so
// two neighbours may seem equal that are not: then false is returned, and the rounds must decide.
__device__ inline bool choose_from_sorted(const float (&key)[VALUES], int lane, int (&expert)[PER_LANE]) {
  unsigned word[LENGTH];
#pragma unroll
  for (int i = 0; i < LENGTH; ++i) {
    word[i] = 0;
    // The complement of the expert, so that of two equal keys the lower expert makes the larger word. 0: no expert.
    if (i < VALUES && (E % (CHUNK * LANES) == 0 || expert_of(i, lane) < E) && (GROUPS == 1 || key[i] == key[i]))
      word[i] = (moecomm::ordered(key[i]) & ~INDEX_MASK) | (INDEX_MASK - expert_of(i, lane));
  }
  sort_descending(word);
  // One round more than K, to see whether the K-th and the next best are told apart.
  unsigned mine[PER_LANE] = {};
#pragma unroll
  for (int j = 0; j < K + !LOSSLESS; ++j) {
    // One instruction over the warp (sm_80). The words of experts are all different: one lane alone takes its head off.
    const unsigned largest = __reduce_max_sync(ALL, word[0]);
    if (word[0] == largest) {
#pragma unroll
      for (int i = 0; i + 1 < LENGTH; ++i) word[i] = word[i + 1];
      word[LENGTH - 1] = 0;
    }
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s)
      if (j == s * LANES + lane) mine[s] = largest;
  }
#pragma unroll
  for (int s = 0; s < PER_LANE; ++s) expert[s] = min(INDEX_MASK - (mine[s] & INDEX_MASK), E - 1u);
  if (LOSSLESS) return true;  // else lane j has the j-th word, and lane K the best of the rest
  // Two neighbours in the order that agree in all bits of the key which were kept may be in the wrong order.
  const unsigned previous = __shfl_up_sync(ALL, mine[0], 1);
  return !__any_sync(ALL, lane > 0 && lane <= K && (previous ^ mine[0]) <= INDEX_MASK);
}

// ---- groups --------------------------------------------------------------------------------------------------------

// Marks the keys outside the best TOP_GROUPS groups with NaN. A group's score: its largest key, or its two largest keys
// added. `scratch`: E + GROUPS floats of this warp.
__device__ inline void keep_best_groups(float (&key)[VALUES], int lane, float* scratch) {
  static_assert(GROUPS == 1 || LANES == 32, "groups need a whole warp for a token");
  constexpr int SIZE = E / GROUPS;
  constexpr int PARTS = GROUPS >= 32 ? 1 : 32 >> log2_up(GROUPS);  // lanes that share a group
  // Groups are contiguous, a lane's experts are not: the keys change lanes through shared memory.
  float* score = scratch + E;
#pragma unroll
  for (int i = 0; i < VALUES; ++i)
    if (expert_of(i, lane) < E) scratch[expert_of(i, lane)] = key[i];
  __syncwarp();
  for (int start = 0; start < GROUPS; start += 32 / PARTS) {
    const int group = start + lane / PARTS;
    // The two largest keys of a lane's part of a group; then lanes that share a group merge theirs.
    float first = -INFINITE, second = -INFINITE;
    if (group < GROUPS)
      for (int n = lane % PARTS; n < SIZE; n += PARTS) {
        const float value = scratch[group * SIZE + n];
        second = fmaxf(second, fminf(first, value));
        first = fmaxf(first, value);
      }
#pragma unroll
    for (int step = PARTS / 2; step > 0; step /= 2) {
      const float other_first = __shfl_xor_sync(ALL, first, step), other_second = __shfl_xor_sync(ALL, second, step);
      second = fmaxf(fmaxf(second, other_second), fminf(first, other_first));
      first = fmaxf(first, other_first);
    }
    if (group < GROUPS && lane % PARTS == 0) score[group] = SIZE == 1 || BEST_IN_GROUP == 1 ? first : moecomm::add(first, second);
  }
  __syncwarp();
  // A group's rank is the number of groups that precede it. All lanes read the same score at a time: one broadcast.
  bool out[VALUES];
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const int group = min(expert_of(i, lane), E - 1) / SIZE;
    int better = 0;
    for (int g = 0; g < GROUPS; ++g) better += score[g] > score[group] || (score[g] == score[group] && g < group);
    out[i] = better >= TOP_GROUPS;
  }
#pragma unroll
  for (int i = 0; i < VALUES; ++i)
    if (out[i]) key[i] = __int_as_float(0x7fffffff);
  __syncwarp();
}

// ---- one token -----------------------------------------------------------------------------------------------------

constexpr int NO_EXPERT = -1;

struct Token {
  int expert[PER_LANE];
  float score[PER_LANE];
  float lse;
  bool bad;          // a logit
  bool misrecorded;  // a recorded expert
};

struct Selection {
  const float* bias;
  moecomm::Generator generator;
  float noise_scale;
  float* scratch;
};

// Choice j of a token that was chosen before. NO_EXPERT for none, and for what cannot be: then token.misrecorded is set.
__device__ inline int recorded_expert(const int* of_token, int j, Token& token) {
  const int expert = of_token[j];
  bool wrong = expert < -1 || expert >= E;
  // A token that stood twice in an expert's line would have one bit there, and two rows.
  for (int earlier = 0; earlier < j; ++earlier) wrong |= expert >= 0 && of_token[earlier] == expert;
  token.misrecorded |= wrong;
  return wrong || expert < 0 ? NO_EXPERT : expert;
}

// Chooses, or with RECORDED takes the K experts of `recorded`, and adds the token's share of each expert's score to `mean`
// (times `live`: 0 for a token that does not count).
__device__ inline Token choose(const float (&x)[VALUES], const ELEMENT* row, const int* recorded,
                               unsigned long long first_element, int lane, float live, const Selection& how,
                               float (&mean)[VALUES]) {
  Token token;
  token.misrecorded = false;
  float term[VALUES], key[VALUES];
  float largest, sum, inverse, best[PER_LANE];
  bool known = false;  // best[] holds the logits of the choices
  // With EXACT the scores come first: they are keys. Otherwise the choice comes first: it tells the largest logit.
  if constexpr (EXACT || NOISE || RECORDED) {
    largest = largest_of(x);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) term[i] = softmax_term(x[i], largest);
    sum = sum_of(term);
    inverse = reciprocal(sum);
  }
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    key[i] = x[i];
    const int e = expert_of(i, lane);
    // A word of the stream for each logit, by its index: a token's noise does not depend on the launch's geometry.
    if constexpr (NOISE)
      if (e < E)
        key[i] = moecomm::noisy(key[i], static_cast<moecomm::Noise>(NOISE), how.noise_scale,
                                moecomm::random_word(how.generator, moecomm::kNoise, first_element + e));
  }
  if constexpr (!KEYS_ARE_LOGITS) {
    if constexpr (SCORE == 1) {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) key[i] = moecomm::sigmoid(key[i]);
    } else if constexpr (NOISE) {
      float noisy_term[VALUES];
      const float noisy_largest = largest_of(key);
#pragma unroll
      for (int i = 0; i < VALUES; ++i) noisy_term[i] = softmax_term(key[i], noisy_largest);
      const float noisy_inverse = moecomm::div(1.0f, sum_of(noisy_term));
#pragma unroll
      for (int i = 0; i < VALUES; ++i) key[i] = moecomm::mul(noisy_term[i], noisy_inverse);
    } else {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) key[i] = moecomm::mul(term[i], inverse);
    }
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      const int e = expert_of(i, lane);
      if constexpr (BIAS)
        if (e < E) key[i] = moecomm::add(key[i], how.bias[e]);
      // An expert that x rules out must not overtake others through its bias.
      key[i] = moecomm::key_of(x[i], key[i]);
      if (E % (CHUNK * LANES) != 0 && e >= E) key[i] = -INFINITE;
    }
    if constexpr (GROUPS > 1) keep_best_groups(key, lane, how.scratch);
  }
  // All lanes agree on `chosen`, and go through the rounds together.
  bool chosen = false;
  if constexpr (SORTED) chosen = choose_from_sorted(key, lane, token.expert);
  if constexpr (RECORDED) {
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s)
      token.expert[s] = s * LANES + lane < K ? recorded_expert(recorded, s * LANES + lane, token) : NO_EXPERT;
  } else if (!SORTED || !chosen) {
    choose_by_rounds(key, lane, token.expert, best);
    known = KEYS_ARE_LOGITS && !NOISE;
  }
#pragma unroll
  for (int s = 0; s < PER_LANE; ++s) {
    if (!known)
      best[s] = s * LANES + lane < K && token.expert[s] != NO_EXPERT ? to_float(row[token.expert[s]]) : -INFINITE;
    // A masked token counts as zeros in x. Its row may hold anything: what lies there must not meet the zeros, or
    // infinity times 0 would reach `mean`.
    if (MASK && live == 0.0f) best[s] = 0.0f;
  }
  if constexpr (!EXACT && !NOISE && !RECORDED) {
    // The first choice is the largest logit: no reduction is needed.
    largest = __shfl_sync(ALL, best[0], 0, LANES);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) term[i] = softmax_term(x[i], largest);
    sum = sum_of(term);
    inverse = reciprocal(sum);
  }
  token.lse = largest + __logf(sum);  // 1 <= sum <= E
  // NaN or +inf in any logit makes the sum NaN or infinite; a row of -inf alone has -inf as its largest.
  token.bad = !(sum < INFINITE) || largest == -INFINITE;
  if constexpr (EXACT) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) token.bad |= moecomm::is_bad_logit(x[i]);
  }
  if constexpr (SCORE == 0) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) mean[i] = fmaf(term[i], inverse * live, mean[i]);
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s)
      token.score[s] = moecomm::mul(moecomm::softmax_term(best[s], largest), inverse);
  } else {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) term[i] = moecomm::sigmoid(x[i]);
    // The aux loss takes sigmoids as shares of their sum.
    const float total = sum_of(term);
    const float share = live / (total > 1e-20f ? total : 1e-20f);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) mean[i] = fmaf(term[i], share, mean[i]);
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s) token.score[s] = moecomm::sigmoid(best[s]);
  }
  return token;
}
