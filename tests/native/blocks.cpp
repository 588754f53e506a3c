// SPDX-License-Identifier: Apache-2.0
// copy_blocks on random blocks, right ones and wrong ones, in arrays that end where they must.
#include "blocks.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "random.h"

namespace {

struct Case {
    std::vector<std::byte> src, dst;
    std::vector<std::int64_t> order, rows;
    std::size_t row_bytes;
    bool is_ragged;

    moecomm::CopyBlocks arguments() {
        return {dst.data(),  src.data(), dst.size(), src.size(), order.data(), is_ragged ? rows.data() : nullptr,
                order.size(), row_bytes};
    }
};

Case random_case(Random& random) {
    Case made;
    const auto num_blocks = static_cast<std::size_t>(random.between(0, 9));
    made.is_ragged = random.one_in(2);
    made.row_bytes = static_cast<std::size_t>(random.between(0, 40));
    made.order.resize(num_blocks);
    std::iota(made.order.begin(), made.order.end(), 0);
    std::shuffle(made.order.begin(), made.order.end(), random.engine);
    made.rows.assign(num_blocks, 1);
    if (made.is_ragged)
        for (auto& n : made.rows) n = random.between(0, 5);
    const auto total = static_cast<std::size_t>(std::accumulate(made.rows.begin(), made.rows.end(), std::int64_t{0}));
    made.src.resize(total * made.row_bytes);
    made.dst.resize(total * made.row_bytes);
    for (auto& x : made.src) x = static_cast<std::byte>(random.between(0, 255));
    return made;
}

void check_copy(Case& right) {
    moecomm::copy_blocks(right.arguments());
    std::vector<std::size_t> start{0};
    for (const auto n : right.rows) start.push_back(start.back() + static_cast<std::size_t>(n) * right.row_bytes);
    std::size_t place = 0;
    for (const auto block : right.order)
        for (auto from = start[static_cast<std::size_t>(block)]; from < start[static_cast<std::size_t>(block) + 1]; ++from)
            check(right.dst[place++] == right.src[from], "a copied byte");
    check(place == right.dst.size(), "the number of bytes");
}

// One thing is changed. It must be refused before a byte is written, or be a right call all the same.
void check_refusal(Case& changed, Random& random) {
    const std::vector<std::byte> before = changed.dst;
    switch (random.between(0, 4)) {
    case 0: changed.src.resize(changed.src.size() + 1); break;
    case 1: changed.dst.resize(changed.dst.size() / 2); break;
    case 2: changed.row_bytes += static_cast<std::size_t>(random.between(1, 3)); break;
    case 3:
        if (!changed.order.empty()) changed.order[0] = random.one_in(2) ? -1 : random.between(0, INT64_MAX);
        break;
    default:
        if (!changed.rows.empty()) changed.rows.back() = random.one_in(2) ? -1 : random.between(0, INT64_MAX);
    }
    const std::vector<std::byte> given = changed.dst;
    try {
        moecomm::copy_blocks(changed.arguments());
    } catch (const std::invalid_argument&) {
        check(changed.dst == given, "a refused call has written");
    }
}

}  // namespace

int main(int argc, char** argv) {
    Random random(seed_of(argc, argv));
    for (int i = 0; i < 2000; ++i) {
        Case made = random_case(random);
        check_copy(made);
        check_refusal(made, random);
    }
}
