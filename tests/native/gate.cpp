// SPDX-License-Identifier: Apache-2.0
// The gate's functions with random shapes, types, drops and threads, in arrays that end where they must.
#include "gating.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "random.h"

using namespace moecomm;
using namespace moecomm::gating;

namespace {

template <class T>
using Array = std::vector<T>;

std::uint16_t narrow(float x, Type type) {
    if (type == kBfloat16) return static_cast<std::uint16_t>(bits_of(x) >> 16);
    return static_cast<std::uint16_t>(0x3c00 + static_cast<int>(x * 64) % 512);  // a half near 1
}

std::int64_t bytes_of(Type type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

// Numbers of a type, as the bytes of an array that is exactly as long.
Array<char> numbers(Random& random, std::int64_t n, Type type) {
    Array<char> made(static_cast<std::size_t>(n * bytes_of(type)));
    for (std::int64_t i = 0; i < n; ++i) {
        const float x = static_cast<float>(random.between(-400, 400)) / 64.0f;
        const double wide = x;
        const std::uint16_t half = narrow(x, type);
        if (type == kFloat64)
            std::memcpy(made.data() + 8 * i, &wide, 8);
        else if (type == kFloat32)
            std::memcpy(made.data() + 4 * i, &x, 4);
        else
            std::memcpy(made.data() + 2 * i, &half, 2);
    }
    return made;
}

struct Gate {
    Route a{};
    Array<char> logits;
    Array<float> bias, weight, lse;
    Array<std::uint8_t> mask;
    Array<std::int32_t> expert, slot, row, source, count, offset, load;
    float aux_loss = 0, z_loss = 0;

    explicit Gate(Random& random) {
        a.T = random.between(0, random.one_in(4) ? 1200 : 70);
        a.E = static_cast<int>(random.one_in(6) ? random.between(100, 300) : random.between(1, 24));
        a.K = static_cast<int>(random.between(1, std::min<std::int64_t>(a.E, 8)));
        a.type = static_cast<Type>(random.between(0, 2));
        a.score = static_cast<Score>(random.between(0, 1));
        choose_groups(random);
        a.best_in_group = a.E / a.num_groups > 1 ? static_cast<int>(random.between(1, 2)) : 1;
        a.floor = 0, a.scale = 1;
        a.capacity = random.one_in(2) ? -1 : random.between(0, 40);
        a.drop = static_cast<Drop>(random.between(0, 3));
        a.noise = static_cast<Noise>(random.between(0, 2));
        a.noise_scale = 0.5f;
        a.generator = {static_cast<std::uint64_t>(random.between(0, INT64_MAX)), 3};
        a.align = a.capacity < 0 ? static_cast<int>(random.between(1, 16)) : 1;
        // As moecomm/gating/host.py: room for the most rows that there can be.
        a.N = a.capacity >= 0 ? a.E * a.capacity : (a.T * a.K + std::min<std::int64_t>(a.E, a.T * a.K) * (a.align - 1));
        logits = numbers(random, a.T * a.E, a.type);
        const auto assignments = static_cast<std::size_t>(a.T * a.K), experts = static_cast<std::size_t>(a.E);
        if (random.one_in(2)) bias.assign(experts, 0.125f);
        if (random.one_in(2)) mask.resize(static_cast<std::size_t>(a.T));
        for (auto& keep : mask) keep = !random.one_in(5);
        expert.resize(assignments), slot.resize(assignments), row.resize(assignments), weight.resize(assignments);
        source.resize(static_cast<std::size_t>(a.N));
        count.resize(experts), offset.resize(experts + 1), load.resize(experts), lse.resize(static_cast<std::size_t>(a.T));
        a.logits = logits.data(), a.bias = bias.empty() ? nullptr : bias.data();
        a.mask = mask.empty() ? nullptr : mask.data();
        a.expert = expert.data(), a.slot = slot.data(), a.row = row.data(), a.weight = weight.data();
        a.source = source.data(), a.count = count.data(), a.offset = offset.data(), a.load = load.data();
        a.aux_loss = &aux_loss, a.z_loss = &z_loss, a.lse = lse.data();
    }

    void choose_groups(Random& random) {
        a.num_groups = a.top_groups = 1;
        const int groups = static_cast<int>(random.between(2, 4));
        if (a.E % groups != 0 || random.one_in(2)) return;
        const int top = static_cast<int>(random.between(1, groups));
        if (a.E / groups < 2 || a.E / groups * top < a.K) return;
        a.num_groups = groups, a.top_groups = top;
    }

    void run() {
        check(route(a) == 0, "the status of usable logits");
        check(a.offset[a.E] <= a.N, "the rows in use");
        for (std::int64_t i = 0; i < a.T * a.K; ++i) {
            check(a.expert[i] >= -1 && a.expert[i] < a.E, "an expert");
            check((a.expert[i] < 0) == (a.row[i] < 0), "a row of a dropped assignment");
            check(a.row[i] < 0 || a.source[a.row[i]] == i, "the way back from a row");
            check(std::isfinite(a.weight[i]), "a weight");
        }
    }

    Rows table() const { return {a.row, a.source, a.T, a.N, a.K}; }
};

// A type for the other side of a sum: float64 goes with float64 alone.
Type other_type(Random& random, Type type) {
    return type == kFloat64 ? kFloat64 : static_cast<Type>(random.between(0, 2));
}

void check_permute(Gate& gate, const Array<char>& x, Array<char>& rows, std::int64_t bytes, int threads) {
    permute(gate.table(), x.data(), rows.data(), bytes, threads);
    for (std::int64_t n = 0; n < gate.a.N && bytes > 0; ++n) {
        const std::int64_t from = gate.source[n];
        const char* wanted = from < 0 ? nullptr : x.data() + from / gate.a.K * bytes;
        for (std::int64_t i = 0; i < bytes; ++i)
            check(rows[n * bytes + i] == (wanted == nullptr ? 0 : wanted[i]), "a byte of a permuted row");
    }
}

void check_rows(Gate& gate, Random& random, int threads) {
    const auto type = static_cast<Type>(random.between(0, 3));
    const Type y_type = other_type(random, type);
    const std::int64_t H = random.one_in(5) ? random.between(100, 400) : random.between(0, 40);
    const std::int64_t T = gate.a.T, N = gate.a.N, K = gate.a.K, blocks = (H + 127) / 128;
    const Array<char> x = numbers(random, T * H, type);
    Array<char> rows(static_cast<std::size_t>(N * H * bytes_of(type)), 1);
    check_permute(gate, x, rows, H * bytes_of(type), threads);
    if (type != kFloat64) {
        Array<std::uint8_t> fp8(static_cast<std::size_t>(N * H));
        Array<float> scales(static_cast<std::size_t>(N * blocks));
        permute_fp8({gate.table(), x.data(), fp8.data(), scales.data(), H, type}, threads);
    }
    const Array<char> weight = numbers(random, T * K, type == kFloat64 ? kFloat64 : kFloat32);
    const void* weights = random.one_in(4) ? nullptr : weight.data();
    const void* residual = random.one_in(2) ? x.data() : nullptr;
    Array<char> y(static_cast<std::size_t>(T * H * bytes_of(y_type)));
    unpermute({gate.table(), rows.data(), weights, residual, y.data(), H, type, y_type}, threads);
    const Array<char> grad_y = numbers(random, T * H, y_type);
    Array<char> grad_rows(rows.size()), grad_weight(weight.size());
    unpermute_backward({gate.table(), grad_y.data(), rows.data(), weight.data(), grad_rows.data(), grad_weight.data(),
                        H, type, y_type},
                       threads);
}

void check_backward(Gate& gate) {
    const auto assignments = static_cast<std::size_t>(gate.a.T * gate.a.K);
    const Array<float> grad_weight(assignments, 0.5f);
    Array<char> grad_logits(gate.logits.size());
    RouteBackward b{};
    static_cast<Choices&>(b) = gate.a;
    b.grad_weight = grad_weight.data(), b.grad_aux = 0.1f, b.grad_z = 0.2f;
    b.logits = gate.a.logits, b.expert = gate.a.expert, b.lse = gate.a.lse, b.load = gate.a.load, b.mask = gate.a.mask;
    b.T = gate.a.T, b.E = gate.a.E, b.K = gate.a.K, b.type = gate.a.type;
    b.grad_logits = grad_logits.data();
    route_backward(b);
}

}  // namespace

int main(int argc, char** argv) {
    Random random(seed_of(argc, argv));
    for (int i = 0; i < 40; ++i) {
        const int threads = static_cast<int>(random.between(1, 4));
        Gate gate(random);
        gate.a.threads = threads;
        gate.run();
        check_rows(gate, random, threads);
        check_backward(gate);
    }
}
