// SPDX-License-Identifier: Apache-2.0
// numpy arrays to gating.h. moecomm/gating/host.py makes the arrays and has checked what the caller gave.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

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

template <typename T>
Type type_of(const T& array) {  // numpy has no bfloat16: its bits come as uint16
    if (array.dtype() == nb::dtype<double>()) return kFloat64;
    if (array.dtype() == nb::dtype<float>()) return kFloat32;
    return array.dtype() == nb::dtype<std::uint16_t>() ? kBfloat16 : kFloat16;
}

// ---- the records of moecomm/gating/choices.py, read by the names of their fields -----------------------------------

// The numbers of an array that the caller has allocated or checked. Never a converted copy: what a kernel wrote into one
// would be lost.
template <class T>
T* numbers(nb::handle record, const char* field) {
    return nb::cast<Array<T>>(record.attr(field), false).data();
}

template <class T>
const T* numbers_or_null(nb::handle record, const char* field) {
    return record.attr(field).is_none() ? nullptr : numbers<const T>(record, field);
}

// The place of the field's word among `words`, which stand in the order of the enum.
template <class Enum>
Enum word(nb::handle record, const char* field, std::initializer_list<const char*> words) {
    const nb::str text(record.attr(field));
    int place = 0;
    for (const char* known : words) {
        if (std::strcmp(text.c_str(), known) == 0) return static_cast<Enum>(place);
        ++place;
    }
    throw std::invalid_argument(std::string("route: no kernel knows ") + field + " " + text.c_str());
}

template <class T>
T number(nb::handle record, const char* field) {
    return nb::cast<T>(record.attr(field));
}

Choices choices_of(nb::handle record) {
    Choices c{};
    c.score = word<Score>(record, "score", {"softmax", "sigmoid"});
    c.num_groups = number<int>(record, "num_groups");
    c.top_groups = number<int>(record, "top_groups");
    c.best_in_group = number<int>(record, "best_in_group");
    c.floor = number<float>(record, "floor");
    c.scale = number<float>(record, "scale");
    c.capacity = record.attr("capacity").is_none() ? -1 : number<std::int64_t>(record, "capacity");
    c.drop = word<Drop>(record, "drop", {"position", "choice", "probability", "random"});
    c.noise = word<Noise>(record, "noise", {"none", "gumbel", "jitter"});
    c.noise_scale = number<float>(record, "noise_scale");
    c.generator.seed = number<std::uint64_t>(record, "seed");
    c.generator.offset = number<std::uint64_t>(record, "offset");
    c.align = number<int>(record, "align");
    c.threads = number<int>(record, "threads");
    return c;
}

// What Route and RouteBackward have in common: the logits, their shape, the mask and the choices.
template <class Call>
Call call_on(nb::handle record, nb::handle choices) {
    const auto logits = nb::cast<AnyIn>(record.attr("logits"), false);
    Call a{};
    static_cast<Choices&>(a) = choices_of(choices);
    a.logits = logits.data();
    a.type = type_of(logits);
    a.T = static_cast<std::int64_t>(logits.shape(0));
    a.E = static_cast<int>(logits.shape(1));
    a.K = number<int>(choices, "top_k");
    a.mask = reinterpret_cast<const std::uint8_t*>(numbers_or_null<bool>(record, "mask"));
    a.live = numbers_or_null<std::int64_t>(record, "live");
    return a;
}

int route_arrays(nb::handle inputs, nb::handle choices, nb::handle fields) {
    auto a = call_on<Route>(inputs, choices);
    a.bias = numbers_or_null<float>(inputs, "bias");
    a.recorded = numbers_or_null<std::int32_t>(inputs, "recorded");
    a.N = static_cast<std::int64_t>(nb::len(nb::object(fields.attr("source"))));
    a.expert = numbers<std::int32_t>(fields, "expert");
    a.slot = numbers<std::int32_t>(fields, "slot");
    a.row = numbers<std::int32_t>(fields, "row");
    a.weight = numbers<float>(fields, "weight");
    a.source = numbers<std::int32_t>(fields, "source");
    a.count = numbers<std::int32_t>(fields, "count");
    a.offset = numbers<std::int32_t>(fields, "offset");
    a.load = numbers<std::int32_t>(fields, "load");
    a.aux_loss = numbers<float>(fields, "aux_loss");
    a.z_loss = numbers<float>(fields, "z_loss");
    a.lse = numbers<float>(fields, "lse");
    // The caller's records keep the arrays alive until the call returns.
    const ReleasedGil released;
    return route(a);
}

void route_backward_arrays(nb::handle grads, nb::handle saved, nb::handle choices, AnyOut grad_logits) {
    auto a = call_on<RouteBackward>(saved, choices);
    a.grad_weight = numbers<const float>(grads, "grad_weight");
    a.grad_aux = number<float>(grads, "grad_aux_loss");
    a.grad_z = number<float>(grads, "grad_z_loss");
    a.expert = numbers<const std::int32_t>(saved, "expert");
    a.lse = numbers<const float>(saved, "lse");
    a.load = numbers<const std::int32_t>(saved, "load");
    a.grad_logits = grad_logits.data();
    const ReleasedGil released;
    route_backward(a);
}

// ---- rows ----------------------------------------------------------------------------------------------------------

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

void unpermute_arrays(AnyIn rows, Array<const std::int32_t> row, std::optional<AnyIn> weight,
                      std::optional<AnyIn> residual, AnyOut y, int threads) {
    Rows table{row.data(), nullptr, static_cast<std::int64_t>(row.shape(0)), static_cast<std::int64_t>(rows.shape(0)),
               static_cast<int>(row.shape(1))};
    for (std::int64_t i = 0; i < table.T * table.K; ++i)
        if (table.row[i] < -1 || table.row[i] >= table.N) throw std::invalid_argument("routing.row is out of range");
    const Unpermute a{table,    rows.data(), weight ? weight->data() : nullptr, residual ? residual->data() : nullptr,
                      y.data(), width(rows), type_of(rows),                     type_of(y)};
    const ReleasedGil released;
    unpermute(a, threads);
}

void unpermute_backward_arrays(AnyIn grad_y, AnyIn rows, Array<const std::int32_t> row, AnyIn weight,
                               Array<const std::int32_t> source, AnyOut grad_rows, AnyOut grad_weight, int threads) {
    const UnpermuteBackward a{table_of(row, source), grad_y.data(),      rows.data(), weight.data(),
                              grad_rows.data(),      grad_weight.data(), width(rows), type_of(rows), type_of(grad_y)};
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
