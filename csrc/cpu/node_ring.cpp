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

constexpr std::int64_t line_bytes = 64;   // a counter has a cache line of its own

std::int64_t now_us() {
    using namespace std::chrono;
    return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

std::uint32_t load(const std::uint32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

bool is_past(std::uint32_t seen, std::uint32_t wanted) { return static_cast<std::int32_t>(seen - wanted) >= 0; }

// Sleep while *word == seen, but not for longer. A rank that waits leaves its core to the others of its node.
void sleep_while(std::uint32_t* word, std::uint32_t seen, std::int64_t longest_us) {
#ifdef __linux__
    const timespec longest{static_cast<time_t>(longest_us / 1000000), static_cast<long>(longest_us % 1000000) * 1000};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &longest, nullptr, 0);
#else
    (void)word, (void)seen;
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

// memory: one line that says "failed", the counters of each slot, what each rank has begun, the slots
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

std::int64_t NodeRing::chunk_bytes(const Stream& stream, std::int64_t chunk) const {
    return clipped(stream.bytes, chunk * transfer_->window, transfer_->window);
}

void NodeRing::begin(const Transfer* transfer, const std::byte* src, std::byte* dst) {
    first_ = after_;
    after_ += transfer->num_chunks;
    transfer_ = transfer;
    src_ = src;
    dst_ = dst;
    turn_ = phase_ = 0;
    __atomic_store_n(begun(local_rank_), ++num_begun_, __ATOMIC_RELEASE);
}

std::vector<std::int64_t> NodeRing::missing() const {
    std::vector<std::int64_t> ranks;
    for (std::int64_t rank = 0; rank < layout_.num_ranks; ++rank)
        if (!is_past(load(begun(rank)), num_begun_)) ranks.push_back(rank);
    return ranks;
}

void NodeRing::fail() {
    __atomic_store_n(failed(), 1, __ATOMIC_RELEASE);
    for (std::int64_t line = 1; line <= layout_.num_slots * num_counters; ++line)
        wake_all(reinterpret_cast<std::uint32_t*>(memory_ + line * line_bytes));
}

// Whether *word has come to `value`, waiting for it until the deadline.
bool NodeRing::reached(std::uint32_t* word, std::uint32_t value) {
    if (is_past(load(word), value)) return true;
    if (spin_us_ > 0)
        for (const std::int64_t end = now_us() + spin_us_; now_us() < end;)
            if (is_past(load(word), value)) return true;
    for (;;) {
        const std::uint32_t seen = load(word);
        if (is_past(seen, value)) return true;
        const std::int64_t left = deadline_ - now_us();
        if (left <= 0 || load(failed())) return false;
        sleep_while(word, seen, left);
    }
}

// One more has done it; the last one wakes those who wait for all.
void NodeRing::add(std::uint32_t* word, std::uint32_t complete) {
    if (__atomic_add_fetch(word, 1, __ATOMIC_ACQ_REL) == complete) wake_all(word);
}

// others: where the parts for or from the other nodes begin
void NodeRing::copy(const std::vector<Stream>& streams, std::int64_t chunk, std::byte* others, bool to_slot) {
    const std::int64_t from = chunk * transfer_->window;
    for (std::int64_t node = 0; node < layout_.num_nodes; ++node) {
        const Stream& stream = streams[node];
        const std::int64_t bytes = chunk_bytes(stream, chunk);
        std::byte* part = others;
        if (node == node_)
            part = slot(chunk) + (layout_.num_nodes - 1) * layout_.window;
        else
            others += bytes;
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

// One phase of a turn: turn t writes chunk t and reads chunk t - (num_slots - 1); those between are on their way.
// False: stop with `event`.
bool NodeRing::advance(Event& event) {
    enum { wait_for_slot, wait_for_rows, exchange_started, read_or_finish, exchange_finished, wait_for_exchange };
    const auto num_ranks = static_cast<std::uint32_t>(layout_.num_ranks);
    const std::int64_t next = turn_, last = turn_ - (layout_.num_slots - 1);
    const bool has_next = next < transfer_->num_chunks;
    event = Event::timed_out;
    switch (phase_) {
    case wait_for_slot:
        if (last >= transfer_->num_chunks || transfer_->num_chunks == 0) {
            event = Event::finished;
            return false;
        }
        if (has_next) {
            if (!reached(counter(next, taken), num_ranks * (use(next) - 1))) return false;
            copy(transfer_->send, next, outgoing(next), true);
            add(counter(next, written), num_ranks * use(next));
        }
        phase_ = has_next && is_leader(next) ? wait_for_rows : read_or_finish;
        return true;
    case wait_for_rows:
        if (!reached(counter(next, written), num_ranks * use(next))) return false;
        phase_ = exchange_started;
        exchange_ = next;
        event = Event::start_exchange;
        return false;
    case exchange_started:
        phase_ = read_or_finish;
        return true;
    case read_or_finish:
        if (last >= 0 && is_leader(last)) {
            phase_ = exchange_finished;
            exchange_ = last;
            event = Event::finish_exchange;
            return false;
        }
        phase_ = wait_for_exchange;
        return true;
    case exchange_finished:
        __atomic_store_n(counter(last, exchanged), use(last), __ATOMIC_RELEASE);
        wake_all(counter(last, exchanged));
        phase_ = wait_for_exchange;
        return true;
    default:
        if (last >= 0) {
            const bool reads = takes_part(transfer_->recv, last);
            const bool is_end = last == transfer_->num_chunks - 1;   // nobody leaves before all have come
            if ((reads || is_end) && !reached(counter(last, exchanged), use(last))) return false;
            if (reads) copy(transfer_->recv, last, incoming(last), false);
            add(counter(last, taken), num_ranks * use(last));
        }
        ++turn_;
        phase_ = wait_for_slot;
        return true;
    }
}

}  // namespace moecomm
