// SPDX-License-Identifier: Apache-2.0
// The gate's kernels of every instruction set that this processor has: do they give the same bits? 0: yes.
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gating.h"

using namespace moecomm;
using namespace moecomm::gating;

constexpr int T = 203;

struct Answers {
    std::vector<std::int32_t> ints;
    std::vector<float> floats;
};

static Answers run(const Kernels& kernels, int E, int K, Type type, Score score, int num_groups, Noise noise) {
    std::mt19937 random(static_cast<unsigned>(E * 100 + K));
    std::normal_distribution<float> normal(0.0f, 3.0f);
    std::vector<float> logits(static_cast<std::size_t>(T * E)), bias(static_cast<std::size_t>(E));
    for (float& x : logits) x = normal(random);
    for (float& x : bias) x = 0.01f * normal(random);
    std::vector<std::uint16_t> narrow(logits.size());
    for (std::size_t i = 0; i < logits.size(); ++i) narrow[i] = static_cast<std::uint16_t>(bits_of(logits[i]) >> 16);
    if (type == kFloat16)
        for (auto& x : narrow) x = static_cast<std::uint16_t>(x % 0x7000);  // neither inf nor NaN

    Answers answers;
    answers.ints.resize(static_cast<std::size_t>(T * K + E));
    answers.floats.resize(static_cast<std::size_t>(T * K + T + E + T * E));
    Route a{};
    a.logits = type == kFloat32 ? static_cast<const void*>(logits.data()) : narrow.data();
    a.bias = num_groups > 1 ? bias.data() : nullptr;
    a.T = T, a.E = E, a.K = K, a.type = type, a.score = score;
    a.num_groups = num_groups, a.top_groups = num_groups > 1 ? num_groups - 1 : 1;
    a.capacity = -1, a.noise = noise, a.noise_scale = 0.5f, a.generator = {5, 7};
    a.expert = answers.ints.data(), a.weight = answers.floats.data(), a.lse = a.weight + T * K;
    Chunk chunk{0, T, answers.ints.data() + T * K, a.lse + T, 0.0, false};
    std::vector<float> memory(static_cast<std::size_t>(scratch_floats(E) + 16));
    auto* scratch = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) & ~std::uintptr_t{63});
    kernels.select(a, chunk, scratch);

    // Rows: token t's choice k is row t * K + k of a [T * K, E] matrix made of logits.
    std::vector<float> rows(static_cast<std::size_t>(T * K * E));
    std::vector<std::int32_t> row(static_cast<std::size_t>(T * K));
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = logits[i * 7 % logits.size()];
    for (std::size_t i = 0; i < row.size(); ++i) row[i] = i % 5 == 3 ? -1 : static_cast<std::int32_t>(i);
    Unpermute u{{row.data(), nullptr, T, T * K, K}, rows.data(), answers.floats.data(), nullptr, chunk.share + E, E,
                kFloat32, kFloat32};
    kernels.unpermute(u, 0, T, false);
    return answers;
}

int main() {
    std::vector<std::pair<std::string, const Kernels*>> tables{{"baseline", &kernels_baseline}};
#ifdef MOECOMM_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.emplace_back("avx2", &kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        tables.emplace_back("avx512", &kernels_avx512);
#endif
    int wrong = 0;
    for (const int E : {1, 4, 7, 24, 64, 130, 256, 1024})
        for (const int K : {1, 3, 8})
            for (const Type type : {kFloat32, kFloat16, kBfloat16})
                for (const Score score : {kSoftmax, kSigmoid})
                    for (const int num_groups : {1, 4})
                        for (const Noise noise : {kNoNoise, kGumbel, kJitter}) {
                            if (K > E || (num_groups > 1 && (E % num_groups || E / num_groups * 3 < K))) continue;
                            const Answers first = run(*tables[0].second, E, K, type, score, num_groups, noise);
                            for (const auto& [name, table] : tables) {
                                const Answers same = run(*table, E, K, type, score, num_groups, noise);
                                if (first.ints == same.ints &&
                                    std::memcmp(first.floats.data(), same.floats.data(), 4 * first.floats.size()) == 0)
                                    continue;
                                std::printf("%s differs: E %d, K %d, type %d, score %d, groups %d, noise %d\n", name.c_str(),
                                            E, K, type, score, num_groups, noise);
                                ++wrong;
                            }
                        }
    for (const auto& table : tables) std::printf("%s ", table.first.c_str());
    std::printf("%d wrong\n", wrong);
    return wrong != 0;
}
