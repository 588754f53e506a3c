// SPDX-License-Identifier: Apache-2.0
#include "node_ring.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <thread>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moecomm {
namespace {

// A counter has a cache line of its own: a rank that polls one counter is not disturbed by writes to another.
constexpr std::int64_t line_bytes = 64;

std::int64_t now_us() {
    using namespace std::chrono;
    return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

// The acquire half of every pair: what the other rank wrote before its release of this value is visible after it.
std::uint32_t load(const std::uint32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

// Counters wrap after 2^32: the difference, taken modulo 2^32, is right while two values lie less than 2^31 apart.
bool is_past(std::uint32_t value, std::uint32_t target) { return static_cast<std::int32_t>(value - target) >= 0; }

// Sleep while *word == value, for longest_us at most. A rank that waits leaves its core to the others of its node.
void sleep_while(std::uint32_t* word, std::uint32_t value, std::int64_t longest_us) {
#ifdef __linux__
    // The kernel compares *word with `value` and sleeps in one atomic step, so no wake-up between our load and the
    // sleep is lost. Not FUTEX_PRIVATE: the ranks are processes, and the word has another address in each.
    const timespec longest{static_cast<time_t>(longest_us / 1000000), static_cast<long>(longest_us % 1000000) * 1000};
    syscall(SYS_futex, word, FUTEX_WAIT, value, &longest, nullptr, 0);
#else
    (void)word, (void)value;
    std::this_thread::sleep_for(std::chrono::microseconds(std::min<std::int64_t>(longest_us, 50)));
#endif
}

void wake_all(std::uint32_t* word) {
#ifdef __linux__
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

std::int64_t clipped(std::int64_t bytes, std::int64_t from, std::int64_t window) {
    return std::clamp<std::int64_t>(bytes - from, 0, window);
}

}  // namespace

// The memory, R ranks and S slots; each [ ] of the first three rows is a cache line, of which 4 bytes are used:
//
//   [failed]                                                           0, or 1 for good
//   [written 0][exchanged 0][taken 0] .. [written S-1][exchanged S-1][taken S-1]
//   [begun 0] .. [begun R-1]                                           transfers that each rank has begun
//   | slot 0 | .. | slot S-1 |
//
//   a slot:  | outgoing: to the other nodes  | inside the node | incoming: from the other nodes |
//            | (N - 1) windows               | 1 window        | (N - 1) windows                |
//
// Chunks are numbered through all transfers. Chunk c is in slot c mod S and is the u-th to use it, u = c / S + 1. The
// counters are never reset. In the order of their use for one chunk:
//
//   value            set by                       waited for by            what the release / acquire pair orders
//   written = R u    each rank, +1, release       the chunk's leader       rows copied in -> the leader sends them
//   exchanged = u    the leader, store, release   ranks that copy out      rows received, and (through the leader, which
//                                                                          acquired `written`) rows of the node -> read
//   taken = R u      each rank, +1, release       ranks that copy in use   reads of this use -> writes of the next one
//                                                 u + 1 of the slot
//   begun            each rank, store, release    missing(), a diagnosis   nothing: only the number is used
//   failed = 1       any rank, store, release     every wait and step      nothing: only the flag is used
std::int64_t NodeRing::num_lines(const Layout& layout) {
    return 1 + layout.num_slots * num_counters + layout.num_ranks;
}

std::int64_t NodeRing::bytes_needed(const Layout& layout) {
    const std::int64_t slot_bytes = (2 * layout.num_nodes - 1) * layout.window;
    return line_bytes * num_lines(layout) + layout.num_slots * slot_bytes;
}

NodeRing::NodeRing(std::byte* memory, const Layout& layout, std::int64_t local_rank, std::int64_t node,
                   std::int64_t spin_us)
    : memory_(memory), layout_(layout), local_rank_(local_rank), node_(node), spin_us_(spin_us) {}

std::uint32_t* NodeRing::counter(std::int64_t chunk, Counter which) const {
    const std::int64_t line = 1 + (first_ + chunk) % layout_.num_slots * num_counters + which;
    return reinterpret_cast<std::uint32_t*>(memory_ + line * line_bytes);
}

std::uint32_t* NodeRing::begun(std::int64_t rank) const {
    const std::int64_t line = 1 + layout_.num_slots * num_counters + rank;
    return reinterpret_cast<std::uint32_t*>(memory_ + line * line_bytes);
}

std::byte* NodeRing::slot(std::int64_t chunk) const {
    const std::int64_t slot_bytes = (2 * layout_.num_nodes - 1) * layout_.window;
    return memory_ + line_bytes * num_lines(layout_) + (first_ + chunk) % layout_.num_slots * slot_bytes;
}

std::uint32_t NodeRing::use(std::int64_t chunk) const {
    return static_cast<std::uint32_t>((first_ + chunk) / layout_.num_slots + 1);
}

std::uint32_t NodeRing::all_ranks(std::int64_t chunk) const {
    return static_cast<std::uint32_t>(layout_.num_ranks) * use(chunk);
}

std::int64_t NodeRing::chunk_bytes(const Stream& stream, std::int64_t chunk) const {
    return clipped(stream.bytes, chunk * transfer_->window, transfer_->window);
}

void NodeRing::begin(const Transfer* transfer, const std::byte* src, std::byte* dst) {
    // Chunks are numbered through all transfers: a slot's counters go on where the transfer before left them.
    first_ = after_;
    after_ += transfer->num_chunks;
    transfer_ = transfer;
    src_ = src;
    dst_ = dst;
    turn_ = 0;
    phase_ = Phase::wait_for_slot;
    __atomic_store_n(begun(local_rank_), ++num_begun_, __ATOMIC_RELEASE);
}

NodeRing::Exchange NodeRing::exchange() const {
    if (transfer_ == nullptr) throw std::invalid_argument("NodeRing.exchange: no transfer has begun");
    Exchange exchange{outgoing(exchange_) - memory_, incoming(exchange_) - memory_, {}, {}};
    for (std::int64_t node = 0; node < layout_.num_nodes; ++node) {
        // What stays in the node is copied through the slot and is in no message.
        const bool is_own = node == node_;
        exchange.to_node.push_back(is_own ? 0 : chunk_bytes(transfer_->send[node], exchange_));
        exchange.from_node.push_back(is_own ? 0 : chunk_bytes(transfer_->recv[node], exchange_));
    }
    return exchange;
}

std::vector<std::int64_t> NodeRing::missing() const {
    std::vector<std::int64_t> ranks;
    for (std::int64_t rank = 0; rank < layout_.num_ranks; ++rank)
        if (!is_past(load(begun(rank)), num_begun_)) ranks.push_back(rank);
    return ranks;
}

void NodeRing::fail() {
    // Set before the ranks are woken: each looks at it when it wakes.
    __atomic_store_n(failed(), 1, __ATOMIC_RELEASE);
    for (std::int64_t line = 1; line <= layout_.num_slots * num_counters; ++line)
        wake_all(reinterpret_cast<std::uint32_t*>(memory_ + line * line_bytes));
}

// Wait until *word has reached `target`; false at the deadline, or when a rank of the node has failed.
bool NodeRing::reached(std::uint32_t* word, std::uint32_t target) {
    if (is_past(load(word), target)) return true;
    if (spin_us_ > 0)
        for (const std::int64_t end = now_us() + spin_us_; now_us() < end;)
            if (is_past(load(word), target)) return true;
    for (;;) {
        // The value that is compared here is the one that the kernel compares before it sleeps.
        const std::uint32_t value = load(word);
        if (is_past(value, target)) return true;
        const std::int64_t remaining = deadline_ - now_us();
        if (remaining <= 0 || load(failed())) return false;
        sleep_while(word, value, remaining);
    }
}

// Count this rank; the last one wakes the waiting ranks, the earlier ones would wake them for nothing.
void NodeRing::add(std::uint32_t* word, std::uint32_t complete) {
    // Release: this rank's copies come before its count. Read-modify-writes continue the release of earlier ones
    // (one release sequence), so a rank that acquires the last value sees the copies of all ranks.
    if (__atomic_add_fetch(word, 1, __ATOMIC_ACQ_REL) == complete) wake_all(word);
}

// Copy this rank's pieces of a chunk into the slot or out of it. others: the slot's outgoing or incoming bytes.
void NodeRing::copy(const std::vector<Stream>& streams, std::int64_t chunk, std::byte* others, bool to_slot) {
    const std::int64_t from = chunk * transfer_->window;
    for (std::int64_t node = 0; node < layout_.num_nodes; ++node) {
        const Stream& stream = streams[node];
        const std::int64_t bytes = chunk_bytes(stream, chunk);
        std::byte* part = others;
        // The parts of the other nodes lie without gaps: a leader sends and receives them as one array.
        if (node == node_)
            part = slot(chunk) + (layout_.num_nodes - 1) * layout_.window;
        else
            others += bytes;
        // Pieces are ordered and do not overlap, so the first piece of the chunk is found by bisection.
        auto piece = std::partition_point(stream.pieces.begin(), stream.pieces.end(), [&](const Piece& p) {
            return p.stream_start + p.bytes <= from;
        });
        for (; piece != stream.pieces.end() && piece->stream_start < from + bytes; ++piece) {
            const std::int64_t begin = std::max(piece->stream_start, from);
            const std::int64_t end = std::min(piece->stream_start + piece->bytes, from + bytes);
            const std::int64_t local = piece->local_start + begin - piece->stream_start;
            if (to_slot)
                std::memcpy(part + begin - from, src_ + local, end - begin);
            else
                std::memcpy(dst_ + local, part + begin - from, end - begin);
        }
    }
}

// Whether this rank may have a piece of the chunk: looks at the first and last piece of each stream only.
bool NodeRing::takes_part(const std::vector<Stream>& streams, std::int64_t chunk) const {
    const std::int64_t from = chunk * transfer_->window, to = from + transfer_->window;
    return std::any_of(streams.begin(), streams.end(), [&](const Stream& stream) {
        return !stream.pieces.empty() && stream.pieces.front().stream_start < to &&
               stream.pieces.back().stream_start + stream.pieces.back().bytes > from;
    });
}

NodeRing::Event NodeRing::step(std::int64_t timeout_us) {
    deadline_ = now_us() + timeout_us;
    if (load(failed())) return Event::failed;
    Event event = Event::finished;
    while (advance(event)) {
    }
    return event == Event::timed_out && load(failed()) ? Event::failed : event;
}

// One phase of a turn. Turn t writes chunk t and reads chunk t - (S - 1), S slots; the S - 2 chunks between are being
// exchanged. The read chunk's slot is the one that chunk t + 1 is written to, so no rank waits for a slot that it would
// have to empty itself.
//
//   wait_for_slot -> wait_for_rows -> exchange_started -> read_or_finish -> exchange_finished -> wait_for_exchange -> next
//                \__ not the leader of t ______________/              \__ not the leader __/
//
// A phase that waits returns false at the deadline and is entered again by the next step. False: stop with `event`.
bool NodeRing::advance(Event& event) {
    const std::int64_t last = turn_ - (layout_.num_slots - 1);
    event = Event::timed_out;
    switch (phase_) {
    case Phase::wait_for_slot:
        if (last >= transfer_->num_chunks || transfer_->num_chunks == 0) {
            event = Event::finished;
            return false;
        }
        return write(turn_);
    case Phase::wait_for_rows:
        if (!reached(counter(turn_, written), all_ranks(turn_))) return false;
        phase_ = Phase::exchange_started;
        exchange_ = turn_;
        event = Event::start_exchange;
        return false;
    case Phase::exchange_started:
        phase_ = Phase::read_or_finish;
        return true;
    case Phase::read_or_finish:
        if (last >= 0 && is_leader(last)) {
            phase_ = Phase::exchange_finished;
            exchange_ = last;
            event = Event::finish_exchange;
            return false;
        }
        phase_ = Phase::wait_for_exchange;
        return true;
    case Phase::exchange_finished:
        // Release: the received rows, and those of the node that `written` let this leader see, come before it.
        __atomic_store_n(counter(last, exchanged), use(last), __ATOMIC_RELEASE);
        wake_all(counter(last, exchanged));
        phase_ = Phase::wait_for_exchange;
        return true;
    case Phase::wait_for_exchange:
        if (last >= 0 && !read(last)) return false;
        ++turn_;
        phase_ = Phase::wait_for_slot;
        return true;
    }
    return false;
}

// False if the slot is not free yet.
bool NodeRing::write(std::int64_t chunk) {
    if (chunk >= transfer_->num_chunks) {
        phase_ = Phase::read_or_finish;
        return true;
    }
    // Acquire: all ranks have read what the slot held in its use before; the first use waits for 0.
    if (!reached(counter(chunk, taken), all_ranks(chunk) - static_cast<std::uint32_t>(layout_.num_ranks))) return false;
    copy(transfer_->send, chunk, outgoing(chunk), true);
    add(counter(chunk, written), all_ranks(chunk));
    phase_ = is_leader(chunk) ? Phase::wait_for_rows : Phase::read_or_finish;
    return true;
}

// False if the chunk has not been exchanged yet.
bool NodeRing::read(std::int64_t chunk) {
    const bool has_pieces = takes_part(transfer_->recv, chunk);
    // A rank with nothing to read need not wait, but for the last chunk: a call returns on no rank before all ranks of
    // the node have come to it.
    const bool must_wait = has_pieces || chunk == transfer_->num_chunks - 1;
    if (must_wait && !reached(counter(chunk, exchanged), use(chunk))) return false;
    if (has_pieces) copy(transfer_->recv, chunk, incoming(chunk), false);
    // A rank that read nothing counts too: `taken` is complete when all ranks have passed.
    add(counter(chunk, taken), all_ranks(chunk));
    return true;
}

}  // namespace moecomm
