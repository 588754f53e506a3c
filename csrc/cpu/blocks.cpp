// SPDX-License-Identifier: Apache-2.0
#include "blocks.h"

#include <cstring>
#include <stdexcept>
#include <vector>

namespace moecomm {
namespace {

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

void copy_equal_blocks(const CopyBlocks& a) {
    const auto N = static_cast<std::int64_t>(a.N);
    // All checks come before the first write: an error leaves dst as it was.
    require(a.N * a.row_bytes == a.src_bytes && a.src_bytes == a.dst_bytes, "copy_blocks: the blocks do not fill src and dst");
    for (std::size_t i = 0; i < a.N; ++i) require(a.order[i] >= 0 && a.order[i] < N, "copy_blocks: order is out of range");
    // memcpy must not get the null pointers of empty arrays, even for no bytes.
    if (a.dst_bytes == 0) return;
    std::byte* dst = a.dst;
    for (std::size_t i = 0; i < a.N; ++i, dst += a.row_bytes)
        std::memcpy(dst, a.src + static_cast<std::size_t>(a.order[i]) * a.row_bytes, a.row_bytes);
}

void copy_ragged_blocks(const CopyBlocks& a) {
    const auto N = static_cast<std::int64_t>(a.N);
    // Bytes, of blocks in src: block i is [start[i], start[i + 1]).
    std::vector<std::size_t> start(a.N + 1, 0);
    for (std::size_t i = 0; i < a.N; ++i) {
        require(a.rows[i] >= 0, "copy_blocks: a block has a negative number of rows");
        // Divided instead of multiplied: a huge count cannot overflow and pass.
        require(a.row_bytes == 0 || static_cast<std::size_t>(a.rows[i]) <= (a.src_bytes - start[i]) / a.row_bytes,
                "copy_blocks: the blocks do not fill src");
        start[i + 1] = start[i] + static_cast<std::size_t>(a.rows[i]) * a.row_bytes;
    }
    require(start[a.N] == a.src_bytes, "copy_blocks: the blocks do not fill src");
    // dst must be filled exactly; that too is found before the first write.
    std::size_t total = 0;
    for (std::size_t i = 0; i < a.N; ++i) {
        require(a.order[i] >= 0 && a.order[i] < N, "copy_blocks: order is out of range");
        const std::size_t bytes = start[a.order[i] + 1] - start[a.order[i]];
        require(bytes <= a.dst_bytes - total, "copy_blocks: the blocks do not fill dst");
        total += bytes;
    }
    require(total == a.dst_bytes, "copy_blocks: the blocks do not fill dst");
    std::byte* dst = a.dst;
    for (std::size_t i = 0; i < a.N; ++i) {
        const std::size_t bytes = start[a.order[i] + 1] - start[a.order[i]];
        if (bytes != 0) std::memcpy(dst, a.src + start[a.order[i]], bytes);
        dst += bytes;
    }
}

}  // namespace

void copy_blocks(const CopyBlocks& a) {
    if (a.rows == nullptr)
        copy_equal_blocks(a);
    else
        copy_ragged_blocks(a);
}

}  // namespace moecomm
