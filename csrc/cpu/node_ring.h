// SPDX-License-Identifier: Apache-2.0
// The rows of the ranks of a node in memory that they share: which rank may write or read which bytes, and when.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace moecomm {

// Rows between the nodes go in streams, one for each ordered pair of nodes (a, b): the blocks of all ranks of a for all
// ranks of b, ordered by destination, then source. A piece is the part of a stream that one rank sends or receives.
struct Piece {
    std::int64_t stream_start;   // in bytes
    std::int64_t bytes;
    std::int64_t local_start;    // in the rank's own rows
};

struct Stream {                  // between this node and another, in one direction
    std::int64_t bytes;
    std::vector<Piece> pieces;   // this rank's, in stream order, not overlapping
};

// One exchange, seen from one rank. Chunk c is the part [c * window, (c + 1) * window) of every stream.
struct Transfer {
    std::vector<Stream> send;    // [number of nodes] streams from here to each node
    std::vector<Stream> recv;    // [number of nodes] streams from each node to here
    std::int64_t send_bytes = 0; // size of the rank's rows
    std::int64_t recv_bytes = 0;
    std::int64_t window = 0;
    std::int64_t num_chunks = 0;
};

// A ring of slots in shared memory; a slot holds one chunk, of all streams from and to this node:
//   [number of nodes - 1][<= window] what goes to the other nodes, without gaps
//   [window]                         what stays in this node
//   [number of nodes - 1][<= window] what comes from the other nodes, without gaps
// Rank `c mod num_leaders` of the node, the leader of chunk c, exchanges it with the same rank of the other nodes.
// Every rank writes its pieces of a chunk, tells that it has, and reads its pieces once the leader has said that they
// are there; no rank writes to a slot before all have read what it held.
class NodeRing {
public:
    struct Layout {
        std::int64_t num_ranks, num_nodes, num_slots, num_leaders, window;
    };
    enum class Event { finished, timed_out, failed, start_exchange, finish_exchange };
    struct Exchange {
        std::int64_t outgoing, incoming;               // first byte in the memory
        std::vector<std::int64_t> to_node, from_node;  // [number of nodes] bytes, one node after the other; 0 for this one
    };

    static std::int64_t bytes_needed(const Layout&);

    // memory: bytes_needed, zeroed before the first rank of the node makes its ring, 64-byte aligned
    NodeRing(std::byte* memory, const Layout&, std::int64_t local_rank, std::int64_t node, std::int64_t spin_us);

    bool fits(const Transfer& transfer) const {
        const auto num_nodes = static_cast<std::size_t>(layout_.num_nodes);
        return transfer.send.size() == num_nodes && transfer.recv.size() == num_nodes &&
               transfer.window <= layout_.window;
    }

    // Every rank of the node begins the same transfers in the same order. src and dst stay valid until it is finished.
    void begin(const Transfer* transfer, const std::byte* src, std::byte* dst);

    // Go on until the transfer is finished, timeout_us have passed in waiting, or the caller, a leader, has to act:
    // start_exchange: start exchange() with the other nodes. finish_exchange: wait for the oldest exchange before the next
    // step. Up to num_slots exchanges are under way.
    Event step(std::int64_t timeout_us);

    // The ranks of the node that have not begun the transfer that this one has begun last.
    std::vector<std::int64_t> missing() const;

    // From now on step() returns `failed` on every rank of the node.
    void fail();

    // The messages of the chunk that step() has returned last for, start_exchange or finish_exchange.
    Exchange exchange() const;

private:
    // Of a slot; node_ring.cpp says which rank sets and awaits each, and what that orders.
    enum Counter { written, exchanged, taken, num_counters };
    enum class Phase {
        wait_for_slot,
        wait_for_rows,
        exchange_started,
        read_or_finish,
        exchange_finished,
        wait_for_exchange
    };
    static std::int64_t num_lines(const Layout&);   // before the slots
    std::uint32_t* failed() const { return reinterpret_cast<std::uint32_t*>(memory_); }
    std::uint32_t* counter(std::int64_t chunk, Counter) const;
    std::uint32_t* begun(std::int64_t rank) const;   // how many transfers it has begun
    std::byte* slot(std::int64_t chunk) const;
    std::byte* outgoing(std::int64_t chunk) const { return slot(chunk); }
    std::byte* incoming(std::int64_t chunk) const { return slot(chunk) + layout_.num_nodes * layout_.window; }
    std::int64_t chunk_bytes(const Stream&, std::int64_t chunk) const;
    std::uint32_t use(std::int64_t chunk) const;   // which use of its slot this is, from 1
    std::uint32_t all_ranks(std::int64_t chunk) const;   // value of a counter to which each rank adds 1, in this use
    bool reached(std::uint32_t* word, std::uint32_t target);
    void add(std::uint32_t* word, std::uint32_t complete);
    void copy(const std::vector<Stream>&, std::int64_t chunk, std::byte* others, bool to_slot);
    bool takes_part(const std::vector<Stream>&, std::int64_t chunk) const;
    bool is_leader(std::int64_t chunk) const { return chunk % layout_.num_leaders == local_rank_; }
    bool advance(Event&);
    bool write(std::int64_t chunk);
    bool read(std::int64_t chunk);

    std::byte* memory_;
    Layout layout_;
    std::int64_t local_rank_, node_, spin_us_;
    const Transfer* transfer_ = nullptr;
    const std::byte* src_ = nullptr;
    std::byte* dst_ = nullptr;
    std::uint32_t num_begun_ = 0;  // by this rank
    std::int64_t first_ = 0;       // number of chunks of all transfers before this one
    std::int64_t after_ = 0;       // the same for the next one
    std::int64_t turn_ = 0;        // chunk that is written in this turn; the one num_slots - 1 before it is read
    Phase phase_ = Phase::wait_for_slot;
    std::int64_t exchange_ = 0;
    std::int64_t deadline_ = 0;
};

}  // namespace moecomm
