// SPDX-License-Identifier: Apache-2.0
// What the drivers share: random numbers from the seed on the command line, and the end of a program that found something.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

struct Random {
    explicit Random(std::uint64_t seed) : engine(seed) {}

    // lowest .. highest, both included
    std::int64_t between(std::int64_t lowest, std::int64_t highest) {
        return std::uniform_int_distribution<std::int64_t>(lowest, highest)(engine);
    }

    bool one_in(int n) { return between(1, n) == 1; }

    std::mt19937_64 engine;
};

inline void check(bool holds, const char* what) {
    if (holds) return;
    std::printf("wrong: %s\n", what);
    std::fflush(stdout);
    std::_Exit(1);
}

inline std::uint64_t seed_of(int argc, char** argv) {
    if (argc == 2) return std::strtoull(argv[1], nullptr, 10);
    std::printf("usage: %s SEED\n", argv[0]);
    std::exit(2);
}
