// SPDX-License-Identifier: Apache-2.0
// The array types below are the argument checks; noconvert() turns a wrong dtype or a strided array into a
// TypeError where nanobind would otherwise copy it, write the copy and throw it away.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "blocks.h"
#include "node_ring.h"
#include "released_gil.h"

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
    // Ranks may be threads of one process: others work during the copy.
    const moecomm::ReleasedGil released;
    moecomm::copy_blocks(a);
}

using Pieces = nb::ndarray<nb::numpy, const std::int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

// The streams of one direction, from arrays of rows: those of node n are the next num_pieces[n] of `pieces`. The ring
// copies by them without checks, so a piece outside its stream or the rank's own rows is refused here.
static std::vector<moecomm::Stream> streams(Counts totals, Counts num_pieces, Pieces pieces, std::int64_t row_bytes,
                                            std::int64_t local_bytes) {
    std::vector<moecomm::Stream> result(totals.size());
    if (num_pieces.size() != totals.size()) throw std::invalid_argument("Transfer: one number of pieces a node");
    std::size_t i = 0;
    for (std::size_t node = 0; node < totals.size(); ++node) {
        result[node].bytes = totals.data()[node] * row_bytes;
        std::int64_t end = 0;
        for (std::int64_t n = 0; n < num_pieces.data()[node]; ++n, ++i) {
            if (i >= pieces.shape(0)) throw std::invalid_argument("Transfer: too few pieces");
            const std::int64_t* row = pieces.data() + 3 * i;
            const moecomm::Piece piece{row[0] * row_bytes, row[1] * row_bytes, row[2] * row_bytes};
            if (piece.stream_start < end || piece.bytes < 0 || piece.local_start < 0 ||
                piece.stream_start + piece.bytes > result[node].bytes || piece.local_start + piece.bytes > local_bytes)
                throw std::invalid_argument("Transfer: a piece lies outside its stream or rows, or over another");
            // In order and apart: the ring finds the pieces of a chunk by bisection.
            end = piece.stream_start + piece.bytes;
            if (piece.bytes > 0) result[node].pieces.push_back(piece);
        }
    }
    return result;
}

static void bind_node_ring(nb::module_& m) {
    using moecomm::NodeRing;
    using moecomm::Transfer;
    auto transfer = nb::class_<Transfer>(m, "Transfer", "The pieces of the streams between nodes that a rank's rows are.")
        .def(
            "__init__",
            [](Transfer* self, Counts send_totals, Counts send_num_pieces, Pieces send_pieces, std::int64_t send_rows,
               Counts recv_totals, Counts recv_num_pieces, Pieces recv_pieces, std::int64_t recv_rows,
               std::int64_t row_bytes, std::int64_t window, std::int64_t num_chunks) {
                Transfer transfer{
                    streams(send_totals, send_num_pieces, send_pieces, row_bytes, send_rows * row_bytes),
                    streams(recv_totals, recv_num_pieces, recv_pieces, row_bytes, recv_rows * row_bytes),
                    send_rows * row_bytes, recv_rows * row_bytes, window, num_chunks};
                for (const auto* side : {&transfer.send, &transfer.recv})
                    for (const moecomm::Stream& stream : *side)
                        if (stream.bytes > window * num_chunks)
                            throw std::invalid_argument("Transfer: a stream is longer than all chunks");
                // nanobind's object is constructed only once nothing can throw any more.
                new (self) Transfer(std::move(transfer));
            },
            "send_totals"_a, "send_num_pieces"_a, "send_pieces"_a, "send_rows"_a, "recv_totals"_a, "recv_num_pieces"_a,
            "recv_pieces"_a, "recv_rows"_a, "row_bytes"_a, "window"_a, "num_chunks"_a)
        .def_ro("recv_bytes", &Transfer::recv_bytes);
    nb::enum_<NodeRing::Event>(m, "Event")
        .value("finished", NodeRing::Event::finished)
        .value("timed_out", NodeRing::Event::timed_out)
        .value("failed", NodeRing::Event::failed)
        .value("start_exchange", NodeRing::Event::start_exchange)
        .value("finish_exchange", NodeRing::Event::finish_exchange);
    nb::class_<NodeRing::Layout>(m, "RingLayout", "The shape of a ring of slots, the same on all ranks of a node.")
        .def(nb::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>(), "num_ranks"_a,
             "num_nodes"_a, "num_slots"_a, "num_leaders"_a, "window"_a)
        .def_prop_ro("num_bytes", &NodeRing::bytes_needed);
    auto ring = nb::class_<NodeRing>(m, "NodeRing", "The rows of the ranks of a node in memory that they share.")
        .def(
            "__init__",
            [](NodeRing* self, Bytes memory, const NodeRing::Layout& layout, std::int64_t local_rank, std::int64_t node,
               std::int64_t spin_us) {
                if (static_cast<std::int64_t>(memory.size()) < NodeRing::bytes_needed(layout))
                    throw std::invalid_argument("NodeRing: memory is too small for this layout");
                new (self) NodeRing(reinterpret_cast<std::byte*>(memory.data()), layout, local_rank, node, spin_us);
            },
            // The ring keeps a bare pointer: keep_alive ties the memory's array to it.
            "memory"_a.noconvert(), "layout"_a, "local_rank"_a, "node"_a, "spin_us"_a, nb::keep_alive<1, 2>())
        .def(
            "begin",
            [](NodeRing& self, const Transfer& transfer, ConstBytes src, Bytes dst) {
                if (static_cast<std::int64_t>(src.size()) != transfer.send_bytes ||
                    static_cast<std::int64_t>(dst.size()) != transfer.recv_bytes)
                    throw std::invalid_argument("NodeRing.begin: src or dst does not fit the transfer");
                if (!self.fits(transfer)) throw std::invalid_argument("NodeRing.begin: the transfer does not fit the ring");
                self.begin(&transfer, reinterpret_cast<const std::byte*>(src.data()),
                           reinterpret_cast<std::byte*>(dst.data()));
            },
            "transfer"_a, "src"_a.noconvert(), "dst"_a.noconvert(), "The caller keeps all three alive until the transfer is finished.")
        // A rank sleeps in here: without Python's lock, which the other ranks' threads need to come.
        .def("step", &NodeRing::step, "timeout_us"_a, nb::call_guard<moecomm::ReleasedGil>())
        .def("missing", &NodeRing::missing, "The ranks of the node that have not begun this transfer.")
        .def("fail", &NodeRing::fail)
        .def(
            "exchange",
            [](const NodeRing& self) {
                const NodeRing::Exchange exchange = self.exchange();
                return nb::make_tuple(exchange.outgoing, exchange.incoming, exchange.to_node, exchange.from_node);
            },
            "(first byte to send, first byte to receive, [N] bytes to each node, [N] bytes from each) of the chunk.");
    // Both hold pointers: a copy is the object itself and pickling is refused, as for Python's classes of that base.
    const nb::object identity = nb::module_::import_("moecomm.identity").attr("Identity");
    for (const char* name : {"__copy__", "__deepcopy__", "__reduce_ex__"})
        transfer.attr(name) = ring.attr(name) = identity.attr(name);
}

namespace moecomm::gating {
void bind(nb::module_& m);
}

NB_MODULE(_core, m) {
    m.doc() = "The C++ kernels of moecomm.";
    // Daemon threads keep the objects that they use until Python has ended, which is no leak.
    nb::set_leak_warnings(false);
    m.def("copy_blocks", &copy_blocks, "dst"_a.noconvert(), "src"_a.noconvert(), "order"_a.noconvert(),
          "rows"_a.noconvert().none(), "row_bytes"_a,
          "dst [bytes] = the blocks of src [bytes] in the order `order` [N]; block i has rows[i] rows (None: one).");
    bind_node_ring(m);
    moecomm::gating::bind(m);
}
