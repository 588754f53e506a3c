// SPDX-License-Identifier: Apache-2.0
// numpy arrays to gating.h. moecomm/gating/host.py makes the arrays and has checked what the caller gave.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstring>
#include <optional>
#include <stdexcept>

#include "gating.h"
#include "released_gil.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moecomm::gating {
namespace {

template <class T>
using Array = nb::ndarray<nb::numpy, T, nb::c_contig, nb::device::cpu>;
template <class T>
using Maybe = std::optional<Array<const T>>;
using AnyIn = nb::ndarray<nb::numpy, nb::ro, nb::c_contig, nb::device::cpu>;
using AnyOut = nb::ndarray<nb::numpy, nb::c_contig, nb::device::cpu>;

template <class T>
const T* pointer(const Maybe<T>& array) {
    return array ? array->data() : nullptr;
}

Type type_of(const AnyIn& array) {  // numpy has no bfloat16: its bits come as uint16
    if (array.dtype() == nb::dtype<float>()) return kFloat32;
    return array.dtype() == nb::dtype<std::uint16_t>() ? kBfloat16 : kFloat16;
}

int route_arrays(AnyIn logits, Maybe<float> bias, Maybe<bool> mask, Array<std::int32_t> expert, Array<float> weight,
                 Array<std::int32_t> slot, Array<std::int32_t> row, Array<std::int32_t> source,
                 Array<std::int32_t> count, Array<std::int32_t> offset, Array<std::int32_t> load, Array<float> aux_loss,
                 Array<float> z_loss, Array<float> lse, int score, int num_groups, int top_groups,
                 int best_in_group, float floor, float scale, std::int64_t capacity, int drop, int noise,
                 float noise_scale, std::uint64_t seed, std::uint64_t generator_offset, int align, int threads) {
    const Route a{logits.data(),
                  pointer(bias),
                  reinterpret_cast<const std::uint8_t*>(pointer(mask)),
                  static_cast<std::int64_t>(logits.shape(0)),
                  static_cast<int>(logits.shape(1)),
                  static_cast<int>(expert.shape(1)),
                  type_of(logits),
                  static_cast<Score>(score),
                  num_groups,
                  top_groups,
                  best_in_group,
                  floor,
                  scale,
                  capacity,
                  static_cast<Drop>(drop),
                  static_cast<Noise>(noise),
                  noise_scale,
                  {seed, generator_offset},
                  align,
                  static_cast<std::int64_t>(source.shape(0)),
                  expert.data(),
                  slot.data(),
                  row.data(),
                  weight.data(),
                  source.data(),
                  count.data(),
                  offset.data(),
                  load.data(),
                  aux_loss.data(),
                  z_loss.data(),
                  lse.data()};
    const ReleasedGil released;
    return route(a, threads);
}

void route_backward_arrays(Array<const float> grad_weight, float grad_aux, float grad_z, AnyIn logits,
                           Array<const std::int32_t> expert, Array<const float> lse, Array<const std::int32_t> load,
                           Maybe<bool> mask, AnyOut grad_logits, int score, float floor, float scale, int threads) {
    const RouteBackward a{grad_weight.data(),
                          grad_aux,
                          grad_z,
                          logits.data(),
                          expert.data(),
                          lse.data(),
                          load.data(),
                          reinterpret_cast<const std::uint8_t*>(pointer(mask)),
                          static_cast<std::int64_t>(logits.shape(0)),
                          static_cast<int>(logits.shape(1)),
                          static_cast<int>(expert.shape(1)),
                          type_of(logits),
                          static_cast<Score>(score),
                          floor,
                          scale,
                          grad_logits.data()};
    const ReleasedGil released;
    route_backward(a, threads);
}

Rows table_of(const Array<const std::int32_t>& row, const Array<const std::int32_t>& source) {
    const Rows table{row.data(), source.data(), static_cast<std::int64_t>(row.shape(0)),
                     static_cast<std::int64_t>(source.shape(0)), static_cast<int>(row.shape(1))};
    for (std::int64_t i = 0; i < table.T * table.K; ++i)
        if (table.row[i] < -1 || table.row[i] >= table.N) throw std::invalid_argument("routing.row is out of range");
    return table;
}

std::int64_t width(const AnyIn& rows) { return static_cast<std::int64_t>(rows.shape(1)); }

void permute_arrays(AnyIn x, Array<const std::int32_t> row, Array<const std::int32_t> source, AnyOut rows, int threads) {
    const Rows table = table_of(row, source);
    const ReleasedGil released;
    permute(table, x.data(), rows.data(), width(x) * static_cast<std::int64_t>(x.itemsize()), threads);
}

void permute_fp8_arrays(AnyIn x, Array<const std::int32_t> row, Array<const std::int32_t> source,
                        Array<std::uint8_t> rows, Array<float> scales, int threads) {
    const PermuteFp8 a{table_of(row, source), x.data(), rows.data(), scales.data(), width(x), type_of(x)};
    const ReleasedGil released;
    permute_fp8(a, threads);
}

void unpermute_arrays(AnyIn rows, Array<const std::int32_t> row, Maybe<float> weight, std::optional<AnyIn> residual,
                      AnyOut y, int threads) {
    Rows table{row.data(), nullptr, static_cast<std::int64_t>(row.shape(0)), static_cast<std::int64_t>(rows.shape(0)),
               static_cast<int>(row.shape(1))};
    for (std::int64_t i = 0; i < table.T * table.K; ++i)
        if (table.row[i] < -1 || table.row[i] >= table.N) throw std::invalid_argument("routing.row is out of range");
    const Unpermute a{table,    rows.data(), pointer(weight), residual ? residual->data() : nullptr,
                      y.data(), width(rows), type_of(rows)};
    const ReleasedGil released;
    unpermute(a, threads);
}

void unpermute_backward_arrays(AnyIn grad_y, AnyIn rows, Array<const std::int32_t> row, Array<const float> weight,
                               Array<const std::int32_t> source, AnyOut grad_rows, Array<float> grad_weight,
                               int threads) {
    const UnpermuteBackward a{table_of(row, source), grad_y.data(),      rows.data(), weight.data(),
                              grad_rows.data(),      grad_weight.data(), width(rows), type_of(rows)};
    const ReleasedGil released;
    unpermute_backward(a, threads);
}

}  // namespace

void bind(nb::module_& m) {
    m.def("route", &route_arrays, "The bits of Routing.status.");
    m.def("route_backward", &route_backward_arrays);
    m.def("permute", &permute_arrays);
    m.def("permute_fp8", &permute_fp8_arrays);
    m.def("unpermute", &unpermute_arrays);
    m.def("unpermute_backward", &unpermute_backward_arrays);
}

}  // namespace moecomm::gating
