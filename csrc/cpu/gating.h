// SPDX-License-Identifier: Apache-2.0
// The gate on a CPU: route, permute, unpermute and their backward passes. moecomm/gating/reference.py is the definition.
#pragma once
#include <cstdint>

#include "../gating/score.h"

namespace moecomm::gating {

// T tokens, E experts, K choices, H numbers a row, N rows. Shapes are the caller's to check: moecomm/gating does.

enum Type : int { kFloat32, kFloat16, kBfloat16, kFloat64 };  // kFloat64: unpermute and its backward pass alone
enum Score : int { kSoftmax, kSigmoid };
enum Drop : int { kByPosition, kByChoice, kByProbability, kByRandom };

constexpr int kMaxExperts = 1024, kMaxChoices = 32;
constexpr int kChunk = 256;   // tokens: sums are made chunk by chunk, so they do not depend on the number of threads

// What the caller chose: the numbers of moecomm/gating/choices.py, words as enums.
struct Choices {
    Score score;
    int num_groups, top_groups;
    int best_in_group;           // keys of a group that are added: 1 or 2
    float floor, scale;          // see choice_weight
    std::int64_t capacity;       // -1: none
    Drop drop;
    Noise noise;
    float noise_scale;
    Generator generator;
    int align;
    int threads;
};

struct Route : Choices {
    const void* logits;          // [T, E] of `type`
    const float* bias;           // [E], or null
    const std::uint8_t* mask;    // [T], or null: 0 is padding
    const std::int32_t* recorded;  // [T, K] experts to take instead of choosing, -1: none; or null
    const std::int64_t* live;    // the tokens that are not masked; null without `recorded` or without a mask
    std::int64_t T;
    int E, K;
    Type type;
    std::int64_t N;
    std::int32_t *expert, *slot, *row;        // out: [T, K]
    float* weight;                            // out: [T, K]
    std::int32_t *source;                     // out: [N]
    std::int32_t *count, *offset, *load;      // out: [E], [E + 1], [E]
    float *aux_loss, *z_loss, *lse;           // out: scalar, scalar, [T]
};

struct RouteBackward : Choices {
    const float* grad_weight;    // [T, K]
    float grad_aux, grad_z;
    const void* logits;          // [T, E] of `type`
    const std::int32_t* expert;  // [T, K]
    const float* lse;            // [T]
    const std::int32_t* load;    // [E]
    const std::uint8_t* mask;    // [T], or null
    const std::int64_t* live;    // as in Route
    std::int64_t T;
    int E, K;
    Type type;
    void* grad_logits;           // out: [T, E] of `type`
};

struct Rows {
    const std::int32_t* row;     // [T, K] token -> row, -1: dropped
    const std::int32_t* source;  // [N] row -> assignment, -1: an empty row, which gets zeros
    std::int64_t T, N;
    int K;
};

struct Unpermute {
    Rows table;
    const void* rows;            // [N, H] of `type`
    const void* weight;          // [T, K] float, double where `type` is kFloat64; or null: 1
    const void* residual;        // [T, H] of `type`, or null
    void* y;                     // out: [T, H] of `y_type`
    std::int64_t H;
    Type type, y_type;           // y_type is kFloat64 where `type` is, and only there
};

struct UnpermuteBackward {
    Rows table;
    const void *grad_y, *rows;   // [T, H] of `grad_type`, [N, H] of `type`
    const void* weight;          // [T, K] float, double where `type` is kFloat64
    void* grad_rows;             // out: [N, H] of `type`
    void* grad_weight;           // out: [T, K] like weight
    std::int64_t H;
    Type type, grad_type;        // grad_type is kFloat64 where `type` is, and only there
};

struct PermuteFp8 {
    Rows table;
    const void* x;               // [T, H] of `type`
    std::uint8_t* rows;          // out: [N, H] e4m3
    float* scales;               // out: [N, ceil(H / 128)]
    std::int64_t H;
    Type type;
};

// The tokens over which the losses are means: those that are not masked, of which each has K choices before drops, unless
// the choices were recorded. static: each instruction set has its own.
template <class Call>
static std::int64_t num_counted(const Call& a) {
    if (a.mask == nullptr) return a.T;
    if (a.live != nullptr) return *a.live;
    std::int64_t choices = 0;
    for (int e = 0; e < a.E; ++e) choices += a.load[e];
    return choices / a.K;
}

// The bits of Routing.status; outputs other than 0 mean nothing.
int route(const Route& a);
void route_backward(const RouteBackward& a);
void permute(const Rows& table, const void* x, void* rows, std::int64_t row_bytes, int threads);
void permute_fp8(const PermuteFp8& a, int threads);
void unpermute(const Unpermute& a, int threads);
void unpermute_backward(const UnpermuteBackward& a, int threads);

// ---- what is compiled once for each instruction set (gating_kernels.cpp) -------------------------------------------

struct Chunk {                   // what selection finds in the tokens [first, last), last - first <= kChunk
    std::int64_t first, last;
    std::int32_t* chosen;        // out: [E] how many chose each expert; drop by choice: [K, E]
    float* share;                // out: [E] the sum over tokens of their normalised scores
    double lse_squared;          // out: the sum
    bool bad;                    // out: a logit is NaN or +inf, or a row -inf alone
};

struct Kernels {
    // expert and weight get the choices and their scores before drops, lse its values.
    void (*select)(const Route& a, Chunk& chunk, float* scratch);
    void (*route_backward)(const RouteBackward& a, std::int64_t first, std::int64_t last, float* scratch);
    void (*permute)(const Rows& table, const void* x, void* rows, std::int64_t row_bytes, std::int64_t first,
                    std::int64_t last, bool streamed);
    void (*unpermute)(const Unpermute& a, std::int64_t first, std::int64_t last, bool streamed);
    void (*unpermute_backward)(const UnpermuteBackward& a, std::int64_t first, std::int64_t last, bool streamed);
    void (*permute_fp8)(const PermuteFp8& a, std::int64_t first, std::int64_t last);
};

constexpr std::int64_t scratch_floats(int E) { return 16 * 8 * (static_cast<std::int64_t>(E) + 16); }

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

// Copies bytes past the caches where `stream` is set.
void copy_row(void* dst, const void* src, std::int64_t bytes, bool stream);

}  // namespace moecomm::gating
