// The gradient of route's weights and losses in the logits, in one launch: logits are read once, the scores computed anew.
//
// ELEMENT, E, K, LANES, THREADS, SCORE, NORMALIZE, MASK   as for route.cu
// EACH      tokens that a team of lanes looks at, one after the other
#include "rows.cuh"
#define BIAS 0
#define GROUPS 1
#define TOP_GROUPS 1
#define BEST_IN_GROUP 1
#define NOISE 0
#define RECORDED 0
#define EXACT 0
#include "route_select.cuh"

struct Arguments {
  const float* grad_weight;  // [T, K]
  const float* grad_aux_loss;
  const float* grad_z_loss;
  const ELEMENT* logits;  // [T, E]
  const int* expert;      // [T, K]
  const float* lse;       // [T]
  const int* load;        // [E]
  const unsigned char* mask;
  const int64* live;  // the tokens that are not masked; null: the loads tell it
  ELEMENT* grad_logits;
  float floor, scale;
  int num_tokens;
};

// exp(x - lse), approximately: nothing is decided here, and gradients may differ from the definition by rounding.
__device__ inline float softmax_of(float x, float lse) {
  float p;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"((x - lse) * 1.44269504f));
  return p;
}

__device__ inline float sigmoid_of(float x) { return 1.0f / (1.0f + __expf(-x)); }

__device__ inline float team_sum(float value) {
  return over_lanes(value, [](float a, float b) { return a + b; });
}

extern "C" __global__ void __launch_bounds__(THREADS) route_backward(const Arguments a) {
  wait_for_inputs();
  constexpr int TEAMS = THREADS / LANES, PADDED = VALUES * LANES;
  const int member = threadIdx.x % LANES, team = threadIdx.x / LANES;
  const int first = blockIdx.x * TEAMS * EACH + team;

  // Teams beyond the last token read it again and write nothing: all lanes of a warp take part in the shuffles below.
  Logits ahead[CHUNKS];
  const auto row_of = [&](int token) { return a.logits + static_cast<int64>(min(token, a.num_tokens - 1)) * E; };
  load_logits(row_of(first), member, ahead);

  // The weights pull on the scores of a token's choices: written to the team's row, read back by who holds the expert.
  // With NORMALIZE a mark says which scores were kept, since a kept weight may have no pull.
  __shared__ alignas(16) float pulls[TEAMS][PADDED], kept_marks[NORMALIZE ? TEAMS : 1][PADDED];
  float* const pull_row = pulls[team];
  float* const mark_row = kept_marks[NORMALIZE ? team : 0];
  // Lanes of one warp alone share a row: __syncwarp orders it, no barrier of the block is needed.
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    pull_row[expert_of(i, member)] = 0.0f;
    if (NORMALIZE) mark_row[expert_of(i, member)] = 0.0f;
  }
  __syncwarp();

  // The aux loss pulls on each expert's score by slope[], the same for all tokens.
  float slope[VALUES], chosen = 0.0f, counting = static_cast<float>(a.num_tokens);
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    slope[i] = expert_of(i, member) < E ? static_cast<float>(a.load[expert_of(i, member)]) : 0.0f;
    chosen += slope[i];
  }
  // Masked tokens are not counted. All others have K choices before drops, so the loads tell their number, unless the
  // choices were recorded.
  if (MASK) counting = fmaxf(a.live ? static_cast<float>(*a.live) : team_sum(chosen) / K, 1.0f);
  const float aux = *a.grad_aux_loss * (static_cast<float>(E) / K) / counting / counting;
  const float z = *a.grad_z_loss * 2.0f / counting;
  // aux_loss = E / K * sum over experts of (scores summed / tokens) * (load / tokens); the loads have no gradient.
#pragma unroll
  for (int i = 0; i < VALUES; ++i) slope[i] *= aux;

  for (int each = 0; each < EACH; ++each) {
    const int token = first + each * TEAMS;
    float x[VALUES], grad[VALUES], pull[VALUES];
    to_floats(ahead, member, x);
    if (each + 1 < EACH) load_logits(row_of(token + TEAMS), member, ahead);
    const bool inside = token < a.num_tokens;
    const int safe = min(token, a.num_tokens - 1);
    const bool live = inside && (!MASK || a.mask[safe]);
    // z_loss is the mean of lse ** 2.
    const float lse = a.lse[safe];
    const float of_z = z * lse;
    // A lane knows the choices j = lane, lane + LANES, ..; the experts' scores are elsewhere, so both meet in the row.
    int expert[PER_LANE];
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s) {
      const int j = s * LANES + member;
      const int64 at = static_cast<int64>(safe) * K + j;
      expert[s] = j < K ? a.expert[at] : -1;
      if (expert[s] < 0) continue;
      pull_row[expert[s]] = a.scale * a.grad_weight[at];
      if (NORMALIZE) mark_row[expert[s]] = 1.0f;
    }
    // All pulls of the token are in the row.
    __syncwarp();
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      pull[i] = pull_row[expert_of(i, member)];
      grad[i] = SCORE == 0 ? softmax_of(x[i], lse) : sigmoid_of(x[i]);
    }
    if (NORMALIZE) {  // pull / kept sum - sum(pull * score) / kept sum ** 2, for what is kept
      float kept = 0.0f, product = 0.0f;
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        kept = fmaf(mark_row[expert_of(i, member)], grad[i], kept);
        product = fmaf(pull[i], grad[i], product);
      }
      kept = team_sum(kept);
      product = team_sum(product);
      // Below the floor the weights are divided by a constant, and nothing goes through the sum.
      const float over = 1.0f / fmaxf(kept, a.floor);
      const float through_sum = kept > a.floor ? product * over * over : 0.0f;
#pragma unroll
      for (int i = 0; i < VALUES; ++i)
        pull[i] = fmaf(pull[i], over, -through_sum * mark_row[expert_of(i, member)]);
    }
    // All lanes have read the row: it is cleared for the next token, at the few places that were written.
    __syncwarp();
#pragma unroll
    for (int s = 0; s < PER_LANE; ++s)
      if (expert[s] >= 0) {
        pull_row[expert[s]] = 0.0f;
        if (NORMALIZE) mark_row[expert[s]] = 0.0f;
      }

    float dot = 0.0f, sum = 0.0f;
    // Softmax: d logit = score * (pull - sum(pull * score)), and lse's gradient is the score.
    if (SCORE == 0) {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) dot = fmaf(pull[i] += slope[i], grad[i], dot);
      dot = team_sum(dot);
#pragma unroll
      for (int i = 0; i < VALUES; ++i) grad[i] *= pull[i] + (of_z - dot);
    } else {
      // Sigmoid: the aux loss sees scores divided by their sum, so its pull goes through the sum too.
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        dot = fmaf(slope[i], grad[i], dot);
        sum += grad[i];
      }
      dot = team_sum(dot);
      sum = team_sum(sum);
      const float over = 1.0f / fmaxf(sum, 1e-20f), back = sum > 1e-20f ? dot * over : 0.0f;
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        // sigmoid(-x) is 1 - score, without the digits that the subtraction would lose where the score is near 1.
        const float of_score = fmaf(slope[i] - back, over, pull[i]);
        grad[i] = fmaf(of_score * grad[i], sigmoid_of(-x[i]), of_z * softmax_of(x[i], lse));
      }
    }
    // No shuffle follows, so a team without a token may leave.
    if (!inside) continue;
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
}
