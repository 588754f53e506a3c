// SPDX-License-Identifier: Apache-2.0
// The array types below are the argument checks; noconvert() turns a wrong dtype or a strided array into a
// TypeError where nanobind would otherwise copy it, write the copy and throw it away.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#include "blocks.h"

namespace nb = nanobind;
using namespace nb::literals;

using Bytes = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<nb::numpy, const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<nb::numpy, const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

static void copy_blocks(Bytes dst, ConstBytes src, Counts order, std::optional<Counts> rows, std::size_t row_bytes) {
    if (rows && rows->size() != order.size())
        throw std::invalid_argument("copy_blocks: order and rows differ in length");
    moecomm::CopyBlocks a{reinterpret_cast<std::byte*>(dst.data()),
                          reinterpret_cast<const std::byte*>(src.data()),
                          dst.size(),
                          src.size(),
                          order.data(),
                          rows ? rows->data() : nullptr,
                          order.size(),
                          row_bytes};
    nb::gil_scoped_release release;      // ranks may be threads of one process
    moecomm::copy_blocks(a);
}

namespace moecomm::gating {
void bind(nb::module_& m);
}

NB_MODULE(_core, m) {
    m.doc() = "The C++ kernels of moecomm.";
    m.def("copy_blocks", &copy_blocks, "dst"_a.noconvert(), "src"_a.noconvert(), "order"_a.noconvert(),
          "rows"_a.noconvert().none(), "row_bytes"_a,
          "dst [bytes] = the blocks of src [bytes] in the order `order` [N]; block i has rows[i] rows (None: one).");
    moecomm::gating::bind(m);
}
