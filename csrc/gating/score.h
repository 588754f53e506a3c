// SPDX-License-Identifier: Apache-2.0
// The arithmetic behind every decision of a gate, for g++, nvcc and NVRTC alike: the same source gives the same bits.
// Only IEEE-rounded operations, each written out (no contraction), so compile host code with -ffp-contract=off.
// moecomm/gating/reference.py has the same in numpy.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define MOECOMM_BOTH static __host__ __device__ __forceinline__
#else
#define MOECOMM_BOTH static inline __attribute__((always_inline, unused))
#endif

namespace moecomm {

// ---- rounded once, never contracted --------------------------------------------------------------------------------

#ifdef __CUDA_ARCH__
MOECOMM_BOTH float add(float a, float b) { return __fadd_rn(a, b); }
MOECOMM_BOTH float mul(float a, float b) { return __fmul_rn(a, b); }
MOECOMM_BOTH float div(float a, float b) { return __fdiv_rn(a, b); }
MOECOMM_BOTH float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MOECOMM_BOTH unsigned bits_of(float x) { return __float_as_uint(x); }
MOECOMM_BOTH float float_of(unsigned x) { return __uint_as_float(x); }
#else
MOECOMM_BOTH float add(float a, float b) { return a + b; }
MOECOMM_BOTH float mul(float a, float b) { return a * b; }
MOECOMM_BOTH float div(float a, float b) { return a / b; }
MOECOMM_BOTH float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MOECOMM_BOTH unsigned bits_of(float x) {
    unsigned bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}
MOECOMM_BOTH float float_of(unsigned bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
#endif

// ---- order ---------------------------------------------------------------------------------------------------------

// Larger float, larger number; -0 equals 0. Not for NaN.
MOECOMM_BOTH unsigned ordered(float x) {
    const unsigned bits = bits_of(add(x, 0.0f));
    return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

// NaN and +inf make a gate meaningless; -inf says "not this expert".
MOECOMM_BOTH bool is_bad_logit(float x) { return !(x < float_of(0x7f800000u)); }

// ---- exp and log ---------------------------------------------------------------------------------------------------

// exp(x) for x <= 0; 0 below -80, so that a quotient by up to 1024 such terms is never subnormal.
MOECOMM_BOTH float exp_nonpositive(float x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const float clamped = x < -80.0f ? -80.0f : x;
    const float shifted = fma(clamped, 1.44269504f, shift);
    const float n = add(shifted, -shift);
    const float r = fma(n, -1.42860677e-6f, fma(n, -0.693145752f, clamped));  // n * ln 2, in two parts
    float p = fma(r, 1.37805939e-3f, 8.37312452e-3f);
    p = fma(p, r, 4.16695364e-2f);
    p = fma(p, r, 1.66664720e-1f);
    p = fma(p, r, 4.99999851e-1f);
    p = fma(p, r, 1.0f);
    p = fma(p, r, 1.0f);
    return x < -80.0f ? 0.0f : float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// log(x) for normal x > 0.
MOECOMM_BOTH float log_positive(float x) {
    const unsigned from_half = bits_of(x) - 0x3f3504f3u;  // the bits of sqrt(1/2): the mantissa lies in [sqrt(1/2), sqrt(2))
    const float n = static_cast<float>(static_cast<int>(from_half) >> 23);
    const float r = add(float_of((from_half & 0x007fffffu) + 0x3f3504f3u), -1.0f);
    float p = fma(r, 7.0376836292e-2f, -1.1514610310e-1f);
    p = fma(p, r, 1.1676998740e-1f);
    p = fma(p, r, -1.2420140846e-1f);
    p = fma(p, r, 1.4249322787e-1f);
    p = fma(p, r, -1.6668057665e-1f);
    p = fma(p, r, 2.0000714765e-1f);
    p = fma(p, r, -2.4999993993e-1f);
    p = fma(p, r, 3.3333331174e-1f);
    const float square = mul(r, r);
    const float tail = fma(n, -2.12194440e-4f, fma(square, -0.5f, mul(mul(p, r), square)));
    return fma(n, 0.693359375f, add(r, tail));
}

// ---- scores --------------------------------------------------------------------------------------------------------

// softmax: with m the largest logit, term_e = exp_nonpositive(x_e - m), inverse = 1 / folded_sum(terms),
// score_e = term_e * inverse.
MOECOMM_BOTH float softmax_term(float x, float largest) { return exp_nonpositive(add(x, -largest)); }

MOECOMM_BOTH float sigmoid(float x) {
    const float z = exp_nonpositive(x < 0.0f ? x : -x);
    const float inverse = div(1.0f, add(1.0f, z));
    return x < 0.0f ? mul(z, inverse) : inverse;
}

// The key of an expert where scores (+ bias) select: the least number if its logit is -inf. Not -inf: of two groups' sums
// of two keys, that of the group with more experts to choose from must be the larger one.
MOECOMM_BOTH float key_of(float logit, float score) {
    const float least = float_of(0xff7fffffu);
    return logit < least ? least : score;
}

// The order in which E terms are summed: the upper half is added onto the lower half until one is left, E padded with
// zeros to a power of two (any power of two >= E gives the same bits). terms is overwritten.
MOECOMM_BOTH float folded_sum(float* terms, int padded) {
    for (int half = padded >> 1; half > 0; half >>= 1)
        for (int i = 0; i < half; ++i) terms[i] = add(terms[i], terms[i + half]);
    return terms[0];
}

// The weight of a choice: scale * score, over max(sum of the token's kept scores in order of choice, floor) if normalised.
MOECOMM_BOTH float choice_weight(float score, float kept_sum, float floor, float scale) {
    return floor > 0.0f ? mul(scale, div(score, kept_sum > floor ? kept_sum : floor)) : mul(scale, score);
}

// ---- random numbers ------------------------------------------------------------------------------------------------

struct Generator {
    unsigned long long seed, offset;
};

enum RandomStream : unsigned { kNoise = 0, kDrop = 1 };

// Philox4x32-10 (Salmon et al., 2011): word `index` of a stream; key = seed, counter = (index / 4, stream, offset).
struct Words {
    unsigned word[4];
};

MOECOMM_BOTH Words philox(Generator g, RandomStream stream, unsigned block) {
    unsigned c0 = block, c1 = stream, c2 = static_cast<unsigned>(g.offset), c3 = static_cast<unsigned>(g.offset >> 32);
    unsigned k0 = static_cast<unsigned>(g.seed), k1 = static_cast<unsigned>(g.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        c0 = static_cast<unsigned>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<unsigned>(p1);
        c2 = static_cast<unsigned>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<unsigned>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return Words{{c0, c1, c2, c3}};
}

MOECOMM_BOTH unsigned random_word(Generator g, RandomStream stream, unsigned long long index) {
    return philox(g, stream, static_cast<unsigned>(index >> 2)).word[index & 3];
}

// In (0, 1), never 0 or 1.
MOECOMM_BOTH float uniform(unsigned word) { return mul(add(static_cast<float>(word >> 9), 0.5f), 1.1920928955078125e-7f); }

enum Noise : int { kNoNoise = 0, kGumbel = 1, kJitter = 2 };

// The logit that selects: element t * E + e of the stream kNoise is its word.
MOECOMM_BOTH float noisy(float logit, Noise kind, float scale, unsigned word) {
    const float u = uniform(word);
    if (kind == kGumbel) return fma(-scale, log_positive(-log_positive(u)), logit);
    return mul(logit, fma(scale, fma(2.0f, u, -1.0f), 1.0f));
}

// ---- fp8 -----------------------------------------------------------------------------------------------------------

// The scale of a block of 128 values whose largest magnitude is amax: each is stored as e4m3(value / scale).
MOECOMM_BOTH float e4m3_scale(float amax) {
    const float least = 7.8886090522101181e-31f;  // 2^-100: the scale is never subnormal
    return amax > 0.0f ? div(amax > least ? amax : least, 448.0f) : 1.0f;
}

// Nearest e4m3 (ties to even); beyond +-448 it saturates, NaN stays NaN.
MOECOMM_BOTH unsigned char e4m3(float x) {
    const unsigned sign = bits_of(x) >> 24 & 0x80u;
    const float size = float_of(bits_of(x) & 0x7fffffffu);
    const unsigned bits = bits_of(size < 448.0f ? size : 448.0f);
    const unsigned normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    const unsigned subnormal = bits_of(add(size, 16384.0f)) - bits_of(16384.0f);  // multiples of 2^-9
    const unsigned code = size < 0.015625f ? subnormal : normal;
    return static_cast<unsigned char>(sign | (size == size ? code : 0x7fu));
}

}  // namespace moecomm
