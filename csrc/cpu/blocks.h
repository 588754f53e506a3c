// SPDX-License-Identifier: Apache-2.0
// The data-layout transformation of the hierarchical all-to-all (arXiv 2201.05596, section 5.3).
#pragma once
#include <cstddef>
#include <cstdint>

namespace moecomm {

struct CopyBlocks {          // N blocks; block i has rows[i] rows of row_bytes bytes
    std::byte* dst;          // out: the blocks of src, one behind the other, in the order `order`
    const std::byte* src;    // the blocks 0 .. N-1, one behind the other
    std::size_t dst_bytes;
    std::size_t src_bytes;
    const std::int64_t* order;   // [N] each block at most once
    const std::int64_t* rows;    // [N], or null: one row each
    std::size_t N;
    std::size_t row_bytes;
};

// Throws std::invalid_argument before it writes if a block lies outside src or the blocks do not fill dst.
void copy_blocks(const CopyBlocks& a);

}  // namespace moecomm
