// SPDX-License-Identifier: Apache-2.0
// Compiled once for each instruction set; every one gives the same bits. No std templates here: the linker would keep
// one copy of each for all. Arrays named [E][16] hold 16 tokens side by side, so that a vector register is 4 to 16
// tokens at one expert and a reduction over experts is plain vector arithmetic.
#include <climits>
#include <cmath>
#include <cstring>

#include "gating.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace moecomm::gating {
namespace {

constexpr int kLanes = 16;  // tokens side by side
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int Ints __attribute__((vector_size(4 * kWidth)));

inline Floats& floats(float* p) { return *reinterpret_cast<Floats*>(p); }
inline Ints& ints(void* p) { return *reinterpret_cast<Ints*>(p); }

// ---- number types --------------------------------------------------------------------------------------------------

template <Type>
struct Number;

template <>
struct Number<kFloat32> {
    typedef float Stored;
    static float widen(Stored x) { return x; }
    static Stored narrow(float x) { return x; }
};

template <>
struct Number<kBfloat16> {
    typedef std::uint16_t Stored;
    static float widen(Stored x) { return float_of(static_cast<unsigned>(x) << 16); }
    static Stored narrow(float x) {
        const unsigned bits = bits_of(x);
        const unsigned rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        return static_cast<Stored>(x == x ? rounded : (bits >> 16 | 0x40u));
    }
};

template <>
struct Number<kFloat16> {
    typedef std::uint16_t Stored;
    static float widen(Stored x) {
        const unsigned size = (x & 0x7fffu) << 13, sign = static_cast<unsigned>(x & 0x8000u) << 16;
        const float normal = float_of(size + (112u << 23));
        const float subnormal = add(float_of(size + (113u << 23)), -6.103515625e-5f);
        const float finite = size < (1u << 23) ? subnormal : normal;
        return float_of((size >= (31u << 23) ? size | 0x7f800000u : bits_of(finite)) | sign);
    }
    static Stored narrow(float x) {
        const unsigned sign = bits_of(x) >> 16 & 0x8000u, size = bits_of(x) & 0x7fffffffu;
        const unsigned normal = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
        const unsigned subnormal = bits_of(add(float_of(size), 0.5f)) - bits_of(0.5f);  // multiples of 2^-24
        unsigned code = size < (113u << 23) ? subnormal : normal;
        code = size >= 0x477ff000u ? 0x7c00u : code;  // 65520 and above round to inf
        return static_cast<Stored>(sign | (size > 0x7f800000u ? 0x7e00u : code));
    }
};

template <Type type>
void widen(float* out, const void* in, std::int64_t first, std::int64_t n) {
    const auto* x = static_cast<const typename Number<type>::Stored*>(in) + first;
    for (std::int64_t i = 0; i < n; ++i) out[i] = Number<type>::widen(x[i]);
}

void widen(Type type, float* out, const void* in, std::int64_t first, std::int64_t n) {
    if (type == kFloat32) widen<kFloat32>(out, in, first, n);
    else if (type == kFloat16) widen<kFloat16>(out, in, first, n);
    else widen<kBfloat16>(out, in, first, n);
}

template <Type type>
void store(void* out, const float* in, std::int64_t first, std::int64_t n, bool stream) {
    typedef typename Number<type>::Stored Stored;
    auto* y = static_cast<Stored*>(out) + first;
    if (!stream) {
        for (std::int64_t i = 0; i < n; ++i) y[i] = Number<type>::narrow(in[i]);
        return;
    }
    alignas(64) Stored narrowed[512];
    if (type != kFloat32)
        for (std::int64_t i = 0; i < n; ++i) narrowed[i] = Number<type>::narrow(in[i]);
    const void* from = type == kFloat32 ? static_cast<const void*>(in) : narrowed;
    copy_row(y, from, n * static_cast<std::int64_t>(sizeof(Stored)), true);
}

void store(Type type, void* out, const float* in, std::int64_t first, std::int64_t n, bool stream) {
    if (type == kFloat32) store<kFloat32>(out, in, first, n, stream);
    else if (type == kFloat16) store<kFloat16>(out, in, first, n, stream);
    else store<kBfloat16>(out, in, first, n, stream);
}

// ---- route: scores and choices -------------------------------------------------------------------------------------

struct Scratch {             // views into one allocation, each a multiple of 64 bytes
    float *x, *seen, *term, *score, *key, *work, *share, *rows;
};

Scratch views(float* p, int E) {
    const std::int64_t size = 16 * (static_cast<std::int64_t>(E) + 16);
    return {p, p + size, p + 2 * size, p + 3 * size, p + 4 * size, p + 5 * size, p + 6 * size, p + 7 * size};
}

alignas(64) const float kZeros[kMaxExperts + 16] = {};

// out [E][16] = the rows [16] of E numbers each, E rounded up to 4.
void transpose(float* out, const float* const* row, int E) {
    for (int l = 0; l < kLanes; l += 4)
        for (int e = 0; e < E; e += 4) {
#ifdef __SSE2__
            if (e % 16 == 0)  // the next 16 tokens: theirs follow these
                for (int i = 0; i < 4; ++i) __builtin_prefetch(row[l + i] + kLanes * E + e, 0, 2);
            __m128 a = _mm_loadu_ps(row[l] + e), b = _mm_loadu_ps(row[l + 1] + e);
            __m128 c = _mm_loadu_ps(row[l + 2] + e), d = _mm_loadu_ps(row[l + 3] + e);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            float* to = out + e * kLanes + l;
            _mm_store_ps(to, a);
            _mm_store_ps(to + kLanes, b);
            _mm_store_ps(to + 2 * kLanes, c);
            _mm_store_ps(to + 3 * kLanes, d);
#else
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) out[(e + i) * kLanes + l + j] = row[l + j][e + i];
#endif
        }
}

// largest [16] over experts; whether any logit of any lane is unusable.
bool largest_logits(float* largest, float* x, int E) {
    Ints bad = {};
    for (int l = 0; l < kLanes; l += kWidth) {
        Floats m = floats(x + l);
        for (int e = 0; e < E; ++e) {
            const Floats v = floats(x + e * kLanes + l);
            // False for NaN and for +inf.
            bad |= ~(v < __builtin_inff());
            m = v > m ? v : m;
        }
        bad |= m == -__builtin_inff();
        floats(largest + l) = m;
    }
    for (int i = 0; i < kWidth; ++i)
        if (bad[i]) return true;
    return false;
}

// term [E][16] = exp(x - largest), total [16] = their folded sum.
void softmax_terms(float* term, float* total, const float* x, const float* largest, int E, float* work) {
    for (int e = 0; e < E; ++e)
        for (int l = 0; l < kLanes; ++l) term[e * kLanes + l] = softmax_term(x[e * kLanes + l], largest[l]);
    // The fold of score.h with E padded by zeros: the padding is left out, since adding 0 changes no bit.
    int half = 1;
    while (2 * half < E) half *= 2;
    const float* terms = term;
    for (int n = E; half > 0; n = half, half >>= 1, terms = work) {
        for (int i = 0; i < (n - half) * kLanes; ++i) work[i] = add(terms[i], terms[i + half * kLanes]);
        if (terms != work)
            for (int i = n > half ? (n - half) * kLanes : 0; i < half * kLanes && i < n * kLanes; ++i) work[i] = terms[i];
    }
    for (int l = 0; l < kLanes; ++l) total[l] = work[l];
}

// score [E][16] of the logits x.
void scores(Score kind, float* score, float* x, int E, float* work) {
    if (kind == kSigmoid) {
        for (int i = 0; i < E * kLanes; ++i) score[i] = sigmoid(x[i]);
        return;
    }
    alignas(64) float largest[kLanes], inverse[kLanes];
    largest_logits(largest, x, E);
    softmax_terms(score, inverse, x, largest, E, work);
    for (int l = 0; l < kLanes; ++l) inverse[l] = div(1.0f, inverse[l]);
    for (int e = 0; e < E; ++e)
        for (int l = 0; l < kLanes; ++l) score[e * kLanes + l] = mul(score[e * kLanes + l], inverse[l]);
}

constexpr std::int32_t kTaken = INT_MIN;  // below every key
inline std::int32_t to_key(float x) { return static_cast<std::int32_t>(ordered(x) ^ 0x80000000u); }

// The index [16] of the largest of n keys [n][16], ties to the lowest; then those keys are taken.
void take_best(std::int32_t* index, std::int32_t* key, int n) {
    for (int l = 0; l < kLanes; l += kWidth) {
        // Strictly larger: of equal keys the first stays.
        Ints top = ints(key + l), at = {};
        for (int e = 1; e < n; ++e) {
            const Ints k = ints(key + e * kLanes + l);
            const Ints larger = k > top;
            top = larger ? k : top;
            at = larger ? at * 0 + e : at;
        }
        ints(index + l) = at;
        // A vector cannot be loaded soon after a part of it was stored: few keys are written as vectors.
        for (int e = 0; n <= 32 && e < n; ++e) {
            Ints& k = ints(key + e * kLanes + l);
            k = at == e ? at * 0 + kTaken : k;
        }
    }
    for (int l = 0; n > 32 && l < kLanes; ++l) key[index[l] * kLanes + l] = kTaken;
}

// Takes the keys of all groups out but the top_groups whose largest value, or two largest ones added, are the largest.
void keep_top_groups(std::int32_t* key, const float* value, const Route& a, float* work) {
    const int E = a.E, num_groups = a.num_groups, members = E / num_groups;
    const bool adds_two = a.best_in_group == 2 && members > 1;
    // The best groups are taken as experts are, and a group that was taken is one that stays.
    auto* group_key = reinterpret_cast<std::int32_t*>(work);
    for (int g = 0; g < num_groups; ++g)
        for (int l = 0; l < kLanes; ++l) {
            const float* v = value + g * members * kLanes + l;
            float first = v[0], second = -__builtin_inff();
            for (int i = 1; i < members; ++i) {
                const float x = v[i * kLanes];
                second = x > first ? first : x > second ? x : second;
                first = x > first ? x : first;
            }
            group_key[g * kLanes + l] = to_key(adds_two ? add(first, second) : first);
        }
    alignas(64) std::int32_t index[kLanes];
    for (int i = 0; i < a.top_groups; ++i) take_best(index, group_key, num_groups);
    for (int e = 0; e < E; ++e)
        for (int l = 0; l < kLanes; ++l)
            key[e * kLanes + l] = group_key[e / members * kLanes + l] == kTaken ? key[e * kLanes + l] : kTaken;
}

void add_noise(float* row, const Route& a, std::int64_t t) {
    const std::uint64_t start = static_cast<std::uint64_t>(t) * static_cast<std::uint64_t>(a.E);
    alignas(64) unsigned words[kMaxExperts + 8];
    const auto first = static_cast<unsigned>(start >> 2);
    const int skip = static_cast<int>(start & 3), blocks = (skip + a.E + 3) / 4;
    for (int b = 0; b < blocks; ++b) {
        const Words w = philox(a.generator, kNoise, first + static_cast<unsigned>(b));
        for (int i = 0; i < 4; ++i) words[4 * b + i] = w.word[i];
    }
    // The kind is a constant in each loop: no branch inside.
    if (a.noise == kGumbel)
        for (int e = 0; e < a.E; ++e) row[e] = noisy(row[e], kGumbel, a.noise_scale, words[skip + e]);
    else
        for (int e = 0; e < a.E; ++e) row[e] = noisy(row[e], kJitter, a.noise_scale, words[skip + e]);
}

struct Block {                // 16 tokens from t on, those beyond the last and the masked ones not used
    std::int64_t t;
    int n;
    bool all_used;
    bool used[kLanes];
};

Block block_of(std::int64_t t, std::int64_t last, const std::uint8_t* mask) {
    Block b{t, static_cast<int>(last - t < kLanes ? last - t : kLanes), last - t >= kLanes, {}};
    for (int l = 0; l < kLanes; ++l) {
        b.used[l] = l < b.n && (mask == nullptr || mask[t + l] != 0);
        b.all_used &= b.used[l];
    }
    return b;
}

// x [E][16] = the logits of a block; zeros where a lane is not used.
void load_block(float* x, const Block& b, const void* logits, Type type, int E, float* rows, const Route* with_noise) {
    const int stride = (E + 3) / 4 * 4;
    const float* row[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        row[l] = kZeros;
        // Not what a masked row holds: NaN there would reach the sums, and +inf would count as a bad logit.
        if (!b.used[l]) continue;
        const std::int64_t start = (b.t + l) * E;
        // transpose reads 4 experts at a time: such a row can be read where it lies.
        if (type == kFloat32 && E % 4 == 0 && with_noise == nullptr) {
            row[l] = static_cast<const float*>(logits) + start;
            continue;
        }
        float* wide = rows + l * stride;
        widen(type, wide, logits, start, E);
        if (with_noise != nullptr) add_noise(wide, *with_noise, b.t + l);
        row[l] = wide;
    }
    transpose(x, row, E);
}

// Adds a block's normalised scores to share [E][16].
void add_share(float* share, const float* score, const Block& b, Score kind, int E) {
    alignas(64) float factor[kLanes];
    for (int l = 0; l < kLanes; ++l) factor[l] = b.used[l] ? 1.0f : 0.0f;
    if (kind == kSigmoid) {
        alignas(64) float total[kLanes] = {};
        for (int e = 0; e < E; ++e)
            for (int l = 0; l < kLanes; ++l) total[l] += score[e * kLanes + l];
        for (int l = 0; l < kLanes; ++l) factor[l] /= total[l] > 1e-20f ? total[l] : 1e-20f;
    }
    for (int e = 0; e < E; ++e)
        for (int l = 0; l < kLanes; ++l) share[e * kLanes + l] += score[e * kLanes + l] * factor[l];
}

// Choice k of a lane's token, with its score [E][16] and in the count of its expert. expert: -1 for none.
inline void note_choice(const Route& a, const Block& b, int lane, int k, int expert, const float* score, Chunk& out) {
    const std::int64_t i = (b.t + lane) * a.K + k;
    const bool taken = b.used[lane] && expert >= 0;
    a.expert[i] = taken ? expert : -1;
    a.weight[i] = taken ? score[expert * kLanes + lane] : 0.0f;
    if (taken) ++out.chosen[(a.drop == kByChoice ? k * a.E : 0) + expert];
}

void take_recorded(const Route& a, const Block& b, const float* score, Chunk& out) {
    for (int l = 0; l < b.n; ++l)
        for (int k = 0; k < a.K; ++k) note_choice(a, b, l, k, a.recorded[(b.t + l) * a.K + k], score, out);
}

void select_block(const Route& a, const Block& b, const Scratch& s, Chunk& out) {
    const int E = a.E;
    load_block(s.x, b, a.logits, a.type, E, s.rows, nullptr);
    alignas(64) float largest[kLanes], total[kLanes], inverse[kLanes], lse[kLanes];
    out.bad |= largest_logits(largest, s.x, E);
    // The whole call is given up then: nothing that follows would mean anything.
    if (out.bad) return;
    softmax_terms(s.term, total, s.x, largest, E, s.work);
    for (int l = 0; l < kLanes; ++l) {
        inverse[l] = div(1.0f, total[l]);
        lse[l] = add(largest[l], log_positive(total[l]));
    }
    if (a.score == kSoftmax) {
        for (int e = 0; e < E; ++e)
            for (int l = 0; l < kLanes; ++l) s.score[e * kLanes + l] = mul(s.term[e * kLanes + l], inverse[l]);
    } else {
        scores(kSigmoid, s.score, s.x, E, s.work);
    }
    add_share(s.share, s.score, b, a.score, E);
    for (int l = 0; l < b.n; ++l) {
        a.lse[b.t + l] = b.used[l] ? lse[l] : 0.0f;
        if (b.used[l]) out.lse_squared += static_cast<double>(lse[l]) * lse[l];
    }

    if (a.recorded != nullptr) {
        take_recorded(a, b, s.score, out);
        return;
    }
    float *seen = s.x, *value = s.x;  // the logits that select, and what the keys are made of
    if (a.noise != kNoNoise) load_block(seen = value = s.seen, b, a.logits, a.type, E, s.rows, &a);
    auto* key = reinterpret_cast<std::int32_t*>(s.key);
    if (a.score == kSigmoid || a.bias != nullptr || a.num_groups > 1) {
        value = s.term;  // no longer needed
        if (a.noise != kNoNoise) scores(a.score, value, seen, E, s.work);
        // Noise changes what selects, never the weights: those come from s.score.
        const float* score = a.noise != kNoNoise ? value : s.score;
        for (int e = 0; e < E; ++e) {
            const float bias = a.bias != nullptr ? a.bias[e] : 0.0f;
            for (int i = e * kLanes; i < (e + 1) * kLanes; ++i) value[i] = key_of(s.x[i], add(score[i], bias));
        }
    }
    for (int i = 0; i < E * kLanes; ++i) key[i] = to_key(value[i]);
    if (a.num_groups > 1) keep_top_groups(key, value, a, s.work);

    alignas(64) std::int32_t index[kLanes];
    for (int k = 0; k < a.K; ++k) {
        take_best(index, key, E);
        for (int l = 0; l < b.n; ++l) note_choice(a, b, l, k, index[l], s.score, out);
    }
}

void select(const Route& a, Chunk& chunk, float* scratch) {
    const Scratch s = views(scratch, a.E);
    std::memset(s.share, 0, sizeof(float) * kLanes * static_cast<std::size_t>(a.E));
    for (std::int64_t t = chunk.first; t < chunk.last && !chunk.bad; t += kLanes)
        select_block(a, block_of(t, chunk.last, a.mask), s, chunk);
    for (int e = 0; e < a.E; ++e) chunk.share[e] = folded_sum(s.share + e * kLanes, kLanes);
}

// ---- route, backward -----------------------------------------------------------------------------------------------

// grad [E][16] += what the weights of one token pass on to its scores.
void weight_backward(const RouteBackward& a, std::int64_t t, const float* score, float* grad, int lane) {
    const std::int32_t* expert = a.expert + t * a.K;
    const float* dw = a.grad_weight + t * a.K;
    float total = 0, dot = 0;
    for (int k = 0; k < a.K; ++k)
        if (expert[k] >= 0) {
            const float s = score[expert[k] * kLanes + lane];
            total += s;
            dot += dw[k] * s;
        }
    // d (s / total) = ds / total - s * dtotal / total ** 2; below the floor the divisor is a constant.
    const bool normalised = a.floor > 0.0f;
    const float inverse = normalised ? 1.0f / (total > a.floor ? total : a.floor) : 1.0f;
    const float through_total = normalised && total > a.floor ? dot * inverse * inverse : 0.0f;
    for (int k = 0; k < a.K; ++k)
        if (expert[k] >= 0) grad[expert[k] * kLanes + lane] += a.scale * (dw[k] * inverse - through_total);
}

void route_backward(const RouteBackward& a, std::int64_t first, std::int64_t last, float* scratch) {
    const Scratch s = views(scratch, a.E);
    const int E = a.E;
    const std::int64_t counted = num_counted(a);
    const float num_tokens = static_cast<float>(counted > 0 ? counted : 1);
    const float of_share = a.grad_aux * static_cast<float>(E) / static_cast<float>(a.K) / (num_tokens * num_tokens);
    const float of_lse = a.grad_z * 2.0f / num_tokens;
    for (std::int64_t t = first; t < last; t += kLanes) {
        const Block b = block_of(t, last, a.mask);
        load_block(s.x, b, a.logits, a.type, E, s.rows, nullptr);
        alignas(64) float lse[kLanes], dot[kLanes] = {}, total[kLanes] = {}, share_dot[kLanes] = {};
        for (int l = 0; l < kLanes; ++l) lse[l] = b.used[l] ? a.lse[t + l] : 0.0f;
        scores(kSoftmax, s.term, s.x, E, s.work);  // exp(x - lse) would be less exact where lse is large
        float* score = s.term;  // softmax
        if (a.score == kSigmoid) scores(kSigmoid, score = s.score, s.x, E, s.work);
        // The weights' pull on the scores goes to few experts; the losses' pull, to all, is added below.
        std::memset(s.key, 0, sizeof(float) * kLanes * static_cast<std::size_t>(E));
        float* grad = s.key;
        for (int l = 0; l < kLanes; ++l)
            if (b.used[l]) weight_backward(a, t + l, score, grad, l);
        for (int e = 0; e < E; ++e) {
            const float g = of_share * static_cast<float>(a.load[e]);
            for (int l = 0; l < kLanes; ++l) {
                const int i = e * kLanes + l;
                if (a.score == kSoftmax) grad[i] += g;
                dot[l] += grad[i] * score[i];
                total[l] += score[i];
                share_dot[l] += g * score[i];
            }
        }
        for (int e = 0; e < E; ++e) {
            const float g = of_share * static_cast<float>(a.load[e]);
            for (int l = 0; l < kLanes; ++l) {
                const int i = e * kLanes + l;
                const float from_lse = of_lse * lse[l] * s.term[i];
                if (a.score == kSoftmax) {
                    s.x[i] = score[i] * (grad[i] - dot[l]) + from_lse;
                } else {
                    const bool above = total[l] > 1e-20f;
                    const float sum = above ? total[l] : 1e-20f;
                    const float through_sum = above ? share_dot[l] / sum : 0.0f;
                    const float rest = sigmoid(-s.x[i]);  // 1 - score, which would lose digits where the score is near 1
                    s.x[i] = (grad[i] + (g - through_sum) / sum) * score[i] * rest + from_lse;
                }
            }
        }
        for (int l = 0; l < b.n; ++l) {
            for (int e = 0; e < E; ++e) s.rows[e] = b.used[l] ? s.x[e * kLanes + l] : 0.0f;
            store(a.type, a.grad_logits, s.rows, (t + l) * E, E, false);
        }
    }
}

// ---- rows ----------------------------------------------------------------------------------------------------------

constexpr std::int64_t kTile = 512;  // numbers of a row at a time

template <Type type>
Floats load(const typename Number<type>::Stored* p) {
    Floats wide;
    if constexpr (type == kFloat32) {
        std::memcpy(&wide, p, sizeof wide);
    } else {
        alignas(64) float numbers[kWidth];
        for (int l = 0; l < kWidth; ++l) numbers[l] = Number<type>::widen(p[l]);
        wide = floats(numbers);
    }
    return wide;
}

void stream(float* p, Floats v) {  // p is aligned to its size
#if defined(__AVX512F__)
    _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
    _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__SSE2__)
    _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
    floats(p) = v;
#endif
}

template <Type type>
struct Summands {                // of one token: those of its choices [first, end), kMaxChoices of them at most
    const typename Number<type>::Stored* row[kMaxChoices];
    float weight[kMaxChoices];
    int kept = 0, end = 0;

    Summands(const Unpermute& a, std::int64_t t, std::int64_t last, int first = 0) : end(first) {
        if (t >= last) return;
        const auto* weights = static_cast<const float*>(a.weight);
        for (; end < a.table.K && kept < kMaxChoices; ++end) {
            const std::int64_t i = t * a.table.K + end;
            if (a.table.row[i] < 0) continue;
            row[kept] = static_cast<const typename Number<type>::Stored*>(a.rows) + a.table.row[i] * a.H;
            weight[kept++] = weights != nullptr ? weights[i] : 1.0f;
        }
    }
};

// to [len] = start (or zeros) + the weighted sum of a token's rows from number h on. While it is at it, it fetches
// those of the next token, which lie in other pages, where the processor does not look by itself.
template <Type type, bool streamed>
void weighted_sum(float* to, const float* start, const Summands<type>& token, const Summands<type>& next,
                  std::int64_t h, std::int64_t len) {
    constexpr int step = 4 * kWidth, numbers_per_line = 64 / static_cast<int>(sizeof(typename Number<type>::Stored));
    std::int64_t j = 0;
    for (; j + step <= len; j += step) {
        Floats sum[4];
        for (int i = 0; i < 4; ++i) {
            sum[i] = Floats{};
            if (start != nullptr) std::memcpy(&sum[i], start + j + i * kWidth, sizeof sum[i]);
        }
        for (int k = 0; k < token.kept; ++k) {
            const auto* row = token.row[k] + h + j;
            if (k < next.kept)
                for (int i = 0; i < step; i += numbers_per_line) __builtin_prefetch(next.row[k] + h + j + i, 0, 2);
            for (int i = 0; i < 4; ++i) sum[i] = sum[i] + load<type>(row + i * kWidth) * token.weight[k];
        }
        for (int i = 0; i < 4; ++i) {
            if (streamed) stream(to + j + i * kWidth, sum[i]);
            else std::memcpy(to + j + i * kWidth, &sum[i], sizeof sum[i]);
        }
    }
    for (; j < len; ++j) {
        float sum = start != nullptr ? start[j] : 0.0f;
        for (int k = 0; k < token.kept; ++k)
            sum = add(sum, mul(token.weight[k], Number<type>::widen(token.row[k][h + j])));
        to[j] = sum;
    }
}

template <Type type>
void unpermute_tokens(const Unpermute& a, std::int64_t first, std::int64_t last, bool streamed) {
    alignas(64) float sum[kTile], residual[kTile];
    const bool in_one_pass = a.table.K <= kMaxChoices;
    const bool aligned = (reinterpret_cast<std::uintptr_t>(a.y) | a.H * 4) % 64 == 0;
    const bool straight = a.y_type == kFloat32 && in_one_pass && (!streamed || aligned);
    for (std::int64_t t = first; t < last; ++t) {
        const Summands<type> token(a, t, last), next(a, t + 1, last);
        for (std::int64_t h = 0; h < a.H; h += kTile) {
            const std::int64_t n = a.H - h < kTile ? a.H - h : kTile, at = t * a.H + h;
            if (a.residual != nullptr) widen<type>(residual, a.residual, at, n);
            const float* start = a.residual != nullptr ? residual : nullptr;
            float* y = static_cast<float*>(a.y) + at;
            if (straight && streamed) {
                weighted_sum<type, true>(y, start, token, next, h, n);
            } else {
                weighted_sum<type, false>(straight ? y : sum, start, token, next, h, n);
                // A router has at most kMaxChoices choices, but a row from another rank may be for more experts.
                for (int end = token.end; end < a.table.K;) {
                    const Summands<type> rest(a, t, last, end);
                    weighted_sum<type, false>(sum, sum, rest, Summands<type>(a, last, last), h, n);
                    end = rest.end;
                }
                if (!straight) store(a.y_type, a.y, sum, at, n, streamed);
            }
        }
    }
}

// Summed in double, in the same order.
void unpermute_doubles(const Unpermute& a, std::int64_t first, std::int64_t last) {
    const auto* weight = static_cast<const double*>(a.weight);
    for (std::int64_t t = first; t < last; ++t) {
        double* y = static_cast<double*>(a.y) + t * a.H;
        for (std::int64_t h = 0; h < a.H; ++h)
            y[h] = a.residual != nullptr ? static_cast<const double*>(a.residual)[t * a.H + h] : 0.0;
        for (std::int64_t i = t * a.table.K; i < (t + 1) * a.table.K; ++i) {
            if (a.table.row[i] < 0) continue;
            const double* row = static_cast<const double*>(a.rows) + a.table.row[i] * a.H;
            const double w = weight != nullptr ? weight[i] : 1.0;
            for (std::int64_t h = 0; h < a.H; ++h) y[h] += row[h] * w;
        }
    }
}

void unpermute(const Unpermute& a, std::int64_t first, std::int64_t last, bool stream) {
    if (a.type == kFloat64) unpermute_doubles(a, first, last);
    else if (a.type == kFloat32) unpermute_tokens<kFloat32>(a, first, last, stream);
    else if (a.type == kFloat16) unpermute_tokens<kFloat16>(a, first, last, stream);
    else unpermute_tokens<kBfloat16>(a, first, last, stream);
}

template <Type type>
void unpermute_backward_tokens(const UnpermuteBackward& a, std::int64_t first, std::int64_t last, bool stream) {
    typedef typename Number<type>::Stored Stored;
    alignas(64) float wide[kTile], scaled[kTile];
    const int K = a.table.K;
    const auto* weight = static_cast<const float*>(a.weight);
    auto* grad_weight = static_cast<float*>(a.grad_weight);
    for (std::int64_t i = first * K; i < last * K; ++i) {
        grad_weight[i] = 0.0f;
        if (a.table.row[i] < 0) continue;
        alignas(64) float dot[kLanes] = {};
        for (std::int64_t h = 0; h < a.H; h += kTile) {
            const std::int64_t n = a.H - h < kTile ? a.H - h : kTile, start = a.table.row[i] * a.H + h;
            widen(a.grad_type, wide, a.grad_y, i / K * a.H + h, n);
            const Stored* row = static_cast<const Stored*>(a.rows) + start;
            for (std::int64_t j = 0; j + kLanes <= n; j += kLanes)
                for (int l = 0; l < kLanes; ++l) dot[l] += wide[j + l] * Number<type>::widen(row[j + l]);
            for (std::int64_t j = n / kLanes * kLanes; j < n; ++j) dot[j % kLanes] += wide[j] * Number<type>::widen(row[j]);
            for (std::int64_t j = 0; j < n; ++j) scaled[j] = wide[j] * weight[i];
            store<type>(a.grad_rows, scaled, start, n, stream);
        }
        grad_weight[i] = folded_sum(dot, kLanes);
    }
}

void unpermute_backward_doubles(const UnpermuteBackward& a, std::int64_t first, std::int64_t last) {
    const auto* weight = static_cast<const double*>(a.weight);
    auto* grad_weight = static_cast<double*>(a.grad_weight);
    for (std::int64_t i = first * a.table.K; i < last * a.table.K; ++i) {
        grad_weight[i] = 0.0;
        if (a.table.row[i] < 0) continue;
        const double* grad = static_cast<const double*>(a.grad_y) + i / a.table.K * a.H;
        const double* row = static_cast<const double*>(a.rows) + a.table.row[i] * a.H;
        double* grad_row = static_cast<double*>(a.grad_rows) + a.table.row[i] * a.H;
        for (std::int64_t h = 0; h < a.H; ++h) {
            grad_weight[i] += grad[h] * row[h];
            grad_row[h] = grad[h] * weight[i];
        }
    }
}

void unpermute_backward(const UnpermuteBackward& a, std::int64_t first, std::int64_t last, bool stream) {
    if (a.type == kFloat64) unpermute_backward_doubles(a, first, last);
    else if (a.type == kFloat32) unpermute_backward_tokens<kFloat32>(a, first, last, stream);
    else if (a.type == kFloat16) unpermute_backward_tokens<kFloat16>(a, first, last, stream);
    else unpermute_backward_tokens<kBfloat16>(a, first, last, stream);
}

// A row, while the place of the next one is fetched into the cache.
void copy_cached(char* to, const char* from, const char* next_to, std::int64_t bytes) {
    std::int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
        __builtin_prefetch(next_to + i, 1, 2);
        Floats line[64 / sizeof(Floats)];
        std::memcpy(line, from + i, 64);
        std::memcpy(to + i, line, 64);
    }
    if (i < bytes) std::memcpy(to + i, from + i, static_cast<std::size_t>(bytes - i));
}

void permute(const Rows& table, const void* x, void* rows, std::int64_t row_bytes, std::int64_t first,
             std::int64_t last, bool streamed) {
    auto* to = static_cast<char*>(rows);
    for (std::int64_t i = first * table.K; i < last * table.K; ++i) {
        if (table.row[i] < 0) continue;
        const char* from = static_cast<const char*>(x) + i / table.K * row_bytes;
        char* here = to + table.row[i] * row_bytes;
        const bool another = i + 1 < last * table.K && table.row[i + 1] >= 0;
        if (streamed) copy_row(here, from, row_bytes, true);
        else copy_cached(here, from, another ? to + table.row[i + 1] * row_bytes : here, row_bytes);
    }
}

void permute_fp8(const PermuteFp8& a, std::int64_t first, std::int64_t last) {
    const std::int64_t blocks = (a.H + 127) / 128;
    alignas(64) float wide[128];
    for (std::int64_t t = first; t < last; ++t)
        for (std::int64_t b = 0; b < blocks; ++b) {
            const std::int64_t n = a.H - 128 * b < 128 ? a.H - 128 * b : 128;
            widen(a.type, wide, a.x, t * a.H + 128 * b, n);
            float amax = 0;
            for (std::int64_t j = 0; j < n; ++j) {
                const float size = float_of(bits_of(wide[j]) & 0x7fffffffu);
                amax = size > amax ? size : amax;
            }
            const float scale = e4m3_scale(amax);
            alignas(64) std::uint8_t narrow[128];
            for (std::int64_t j = 0; j < n; ++j) narrow[j] = e4m3(div(wide[j], scale));
            for (std::int64_t i = t * a.table.K; i < (t + 1) * a.table.K; ++i) {
                const std::int64_t row = a.table.row[i];
                if (row < 0) continue;
                std::memcpy(a.rows + row * a.H + 128 * b, narrow, static_cast<std::size_t>(n));
                a.scales[row * blocks + b] = scale;
            }
        }
}

}  // namespace

#ifndef MOECOMM_KERNELS
#define MOECOMM_KERNELS kernels_baseline
#endif
const Kernels MOECOMM_KERNELS = {select, route_backward, permute, unpermute, unpermute_backward, permute_fp8};

}  // namespace moecomm::gating
