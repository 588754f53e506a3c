// The gradient of route's weights and losses in the logits, in one launch: logits are read once, the scores computed anew.
//
// ELEMENT, E, K, LANES, THREADS, SCORE, NORMALIZE, MASK   as for route.cu
// EACH      tokens that a team of lanes looks at, one after the other
#include "rows.cuh"
#define BIAS 0
#define GROUPS 1
#define TOP_GROUPS 1
#define NOISE 0
#define EXACT 0
#include "route_select.cuh"

struct Arguments {
  const float* grad_weight;  // [T, K]
  const float* grad_aux;
  const float* grad_z;
  const ELEMENT* logits;  // [T, E]
  const int* expert;      // [T, K]
  const float* lse;       // [T]
  const int* load;        // [E]
  const unsigned char* mask;
  ELEMENT* grad_logits;
  float floor, scale;
  int num_tokens;
};

__device__ inline float softmax_of(float x, float lse) {
  float p;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"((x - lse) * 1.44269504f));
  return p;
}

__device__ inline float sigmoid_of(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ inline float team_sum(float value) {
  return over_lanes(value, [](float a, float b) { return a + b; });
}

extern "C" __global__ void __launch_bounds__(THREADS) route_backward(const Arguments a) {
  constexpr int TEAMS = THREADS / LANES;
  const int member = threadIdx.x % LANES, team = threadIdx.x / LANES;
  const int first = blockIdx.x * TEAMS * EACH + team;

  Logits ahead[CHUNKS];
  const auto row_of = [&](int token) { return a.logits + static_cast<int64>(min(token, a.num_tokens - 1)) * E; };
  load_logits(row_of(first), member, ahead);

  // The aux loss pulls on each expert's score by slope[], the same for all tokens.
  float slope[VALUES], chosen = 0.0f, counting = static_cast<float>(a.num_tokens);
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    slope[i] = expert_of(i, member) < E ? static_cast<float>(a.load[expert_of(i, member)]) : 0.0f;
    chosen += slope[i];
  }
  if (MASK) counting = fmaxf(team_sum(chosen) / K, 1.0f);
  const float aux = *a.grad_aux * (static_cast<float>(E) / K) / counting / counting, z = *a.grad_z * 2.0f / counting;

  for (int each = 0; each < EACH; ++each) {
    const int token = first + each * TEAMS;
    float x[VALUES], grad[VALUES];
    to_floats(ahead, member, x);
    if (each + 1 < EACH) load_logits(row_of(token + TEAMS), member, ahead);
    const bool inside = token < a.num_tokens;
    const int safe = min(token, a.num_tokens - 1);
    const bool live = inside && (!MASK || a.mask[safe]);
    const float lse = a.lse[safe], of_z = z * lse;

    // The weights pull on the scores of the token's own choices, which its lanes share: pull[].
    int expert[PER_LANE];
    float mine[PER_LANE], score[PER_LANE], pull[PER_LANE], kept = 0.0f, product = 0.0f;
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s) {
      const int j = s * LANES + member;
      const int64 at = static_cast<int64>(safe) * K + j;
      expert[s] = j < K && live ? a.expert[at] : -1;
      pull[s] = expert[s] >= 0 ? a.scale * a.grad_weight[at] : 0.0f;
      mine[s] = expert[s] >= 0 ? to_float(a.logits[static_cast<int64>(safe) * E + expert[s]]) : -INFINITE;
      score[s] = SCORE == 0 ? softmax_of(mine[s], lse) : sigmoid_of(mine[s]);
      if (NORMALIZE) {
        kept += score[s];
        product += pull[s] * score[s];
      }
    }
    if (NORMALIZE) {
      kept = team_sum(kept);
      product = team_sum(product);
      const float over = 1.0f / fmaxf(kept, a.floor);
      const float through_sum = kept > a.floor ? product * over * over : 0.0f;
#pragma unroll
      for (int s = 0; s < PER_LANE; ++s)
        if (expert[s] >= 0) pull[s] = pull[s] * over - through_sum;
    }

    float dot = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      const float p = SCORE == 0 ? softmax_of(x[i], lse) : sigmoid_of(x[i]);
      grad[i] = p;
      dot = fmaf(aux * slope[i], p, dot);
      if (SCORE == 1) sum += p;
    }
    if (SCORE == 0) {
#pragma unroll
      for (int s = 0; s < PER_LANE; ++s) dot = fmaf(pull[s], score[s], dot);
      dot = team_sum(dot);
#pragma unroll
      for (int i = 0; i < VALUES; ++i) grad[i] *= fmaf(aux, slope[i], of_z - dot);
    } else {
      dot = team_sum(dot);
      sum = team_sum(sum);
    }
    const float over_sum = 1.0f / fmaxf(sum, 1e-20f), back = sum > 1e-20f ? dot * over_sum : 0.0f;
    if (SCORE == 1) {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        const float p = grad[i];
        grad[i] = fmaf((fmaf(aux, slope[i], -back)) * over_sum * p, 1.0f - p, of_z * softmax_of(x[i], lse));
      }
    }
    if (inside) {
      ELEMENT* const to = a.grad_logits + static_cast<int64>(token) * E;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        if (E % (CHUNK * LANES) == 0 || expert_of(c * CHUNK, member) < E) {
          Logits piece;
#pragma unroll
          for (int i = 0; i < CHUNK; ++i) from_float(live ? grad[c * CHUNK + i] : 0.0f, piece.value[i]);
          *reinterpret_cast<Logits*>(to + expert_of(c * CHUNK, member)) = piece;
        }
    }
    __syncwarp();  // then the choices' own elements are written over
    if (inside) {
      ELEMENT* const to = a.grad_logits + static_cast<int64>(token) * E;
#pragma unroll
      for (int s = 0; s < PER_LANE; ++s)
        if (expert[s] >= 0) {
          const float of_aux = aux * static_cast<float>(a.load[expert[s]]), p = score[s];
          const float value = SCORE == 0 ? p * (of_aux + pull[s] + of_z - dot)
                                         : fmaf((of_aux - back) * over_sum + pull[s], p * (1.0f - p),
                                                of_z * softmax_of(mine[s], lse));
          from_float(value, to[expert[s]]);
        }
    }
  }
}
