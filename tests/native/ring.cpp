// SPDX-License-Identifier: Apache-2.0
// NodeRing with random nodes, leaders, windows and rows: the ranks are threads, or the processes of one node. A rank that
// fails in the middle ends all others.
#include "node_ring.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>

#include "random.h"

using moecomm::NodeRing;
using moecomm::Piece;
using moecomm::Stream;
using moecomm::Transfer;
using Bytes = std::vector<std::byte>;

namespace {

// What a rank of one node sends to another node reaches it through here: the transport.
class Mail {
public:
    using Address = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;  // from, to, leader, message

    void send(const Address& address, Bytes bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        letters_[address] = std::move(bytes);
        came_.notify_all();
    }

    // False: a rank has failed.
    bool receive(const Address& address, Bytes& bytes) {
        std::unique_lock<std::mutex> lock(mutex_);
        came_.wait(lock, [&] { return has_failed_ || letters_.count(address) != 0; });
        if (letters_.count(address) == 0) return false;
        bytes = std::move(letters_[address]);
        letters_.erase(address);
        return true;
    }

    void fail() {
        const std::lock_guard<std::mutex> lock(mutex_);
        has_failed_ = true;
        came_.notify_all();
    }

private:
    std::mutex mutex_;
    std::condition_variable came_;
    std::map<Address, Bytes> letters_;
    bool has_failed_ = false;
};

struct World {
    std::vector<std::vector<std::int64_t>> nodes;   // the ranks of each
    std::vector<NodeRing::Layout> layouts;          // of each node
    std::vector<std::vector<std::vector<std::int64_t>>> bytes;   // [transfer][source][destination]
    std::int64_t num_ranks = 0;
    std::int64_t failing_rank = -1, failing_transfer = -1;

    static World random(Random& random, bool one_node) {
        World world;
        const std::int64_t num_nodes = one_node ? 1 : random.between(1, 3);
        std::int64_t smallest = 4;
        for (std::int64_t node = 0; node < num_nodes; ++node) {
            const std::int64_t size = random.between(1, 4);
            smallest = std::min(smallest, size);
            world.nodes.emplace_back();
            for (std::int64_t i = 0; i < size; ++i) world.nodes.back().push_back(world.num_ranks++);
        }
        const std::int64_t num_slots = random.between(2, 5), leaders = random.between(1, smallest);
        const std::int64_t window = 64 * random.between(1, 4);
        for (const auto& node : world.nodes)
            world.layouts.push_back({static_cast<std::int64_t>(node.size()), num_nodes, num_slots, leaders, window});
        const std::int64_t most = random.one_in(4) ? 0 : random.between(1, 200);
        for (std::int64_t transfer = random.between(1, 6); transfer > 0; --transfer) {
            world.bytes.emplace_back(world.num_ranks, std::vector<std::int64_t>(world.num_ranks));
            for (auto& row : world.bytes.back())
                for (auto& n : row) n = random.one_in(3) ? 0 : random.between(0, most);
        }
        if (random.one_in(4)) {
            world.failing_rank = random.between(0, world.num_ranks - 1);
            world.failing_transfer = random.between(0, static_cast<std::int64_t>(world.bytes.size()) - 1);
        }
        return world;
    }

    std::int64_t node_of(std::int64_t rank) const {
        std::int64_t node = 0;
        while (nodes[node].back() < rank) ++node;
        return node;
    }

    std::int64_t window() const { return layouts[0].window; }

    std::int64_t stream_bytes(std::int64_t transfer, std::int64_t from, std::int64_t to) const {
        std::int64_t total = 0;
        for (const auto s : nodes[from])
            for (const auto d : nodes[to]) total += bytes[transfer][s][d];
        return total;
    }

    // The stream from one node to another, as `rank` sees it: in pieces of those that it sends, or receives.
    Stream stream(std::int64_t transfer, std::int64_t from, std::int64_t to, std::int64_t rank, bool sends) const {
        Stream made{stream_bytes(transfer, from, to), {}};
        std::int64_t place = 0;
        for (const auto d : nodes[to])
            for (const auto s : nodes[from]) {
                const std::int64_t n = bytes[transfer][s][d];
                if (n > 0 && rank == (sends ? s : d)) made.pieces.push_back({place, n, local_start(transfer, s, d, sends)});
                place += n;
            }
        return made;
    }

    // Where the bytes from s to d are among those that s has, by destination, or d has, by source.
    std::int64_t local_start(std::int64_t transfer, std::int64_t s, std::int64_t d, bool of_source) const {
        std::int64_t start = 0;
        for (std::int64_t other = 0; other < (of_source ? d : s); ++other)
            start += of_source ? bytes[transfer][s][other] : bytes[transfer][other][d];
        return start;
    }

    Transfer transfer(std::int64_t number, std::int64_t rank) const {
        Transfer made;
        const std::int64_t here = node_of(rank), num_nodes = static_cast<std::int64_t>(nodes.size());
        std::int64_t longest = 0;
        for (std::int64_t a = 0; a < num_nodes; ++a)
            for (std::int64_t b = 0; b < num_nodes; ++b) longest = std::max(longest, stream_bytes(number, a, b));
        for (std::int64_t node = 0; node < num_nodes; ++node) {
            made.send.push_back(stream(number, here, node, rank, true));
            made.recv.push_back(stream(number, node, here, rank, false));
        }
        for (std::int64_t other = 0; other < num_ranks; ++other) {
            made.send_bytes += bytes[number][rank][other];
            made.recv_bytes += bytes[number][other][rank];
        }
        made.window = window();
        made.num_chunks = (longest + made.window - 1) / made.window;
        return made;
    }
};

std::byte value(std::int64_t transfer, std::int64_t source, std::int64_t destination, std::int64_t place) {
    return static_cast<std::byte>(transfer * 7 + source * 31 + destination * 101 + place * 3);
}

class Rank {
public:
    Rank(const World& world, Mail& mail, std::byte* memory, std::int64_t rank, std::uint64_t seed)
        : world_(world), mail_(mail), memory_(memory), rank_(rank), node_(world.node_of(rank)),
          local_rank_(rank - world.nodes[node_][0]), random_(seed + rank),
          ring_(memory, world.layouts[node_], local_rank_, node_, random_.one_in(2) ? 5 : 0) {}

    void run() {
        for (std::int64_t number = 0; number < static_cast<std::int64_t>(world_.bytes.size()); ++number) {
            const Transfer transfer = world_.transfer(number, rank_);
            Bytes src, dst(static_cast<std::size_t>(transfer.recv_bytes));
            for (std::int64_t d = 0; d < world_.num_ranks; ++d)
                for (std::int64_t i = 0; i < world_.bytes[number][rank_][d]; ++i) src.push_back(value(number, rank_, d, i));
            if (!exchange(transfer, number, src, dst)) {
                check(world_.failing_rank >= 0, "a ring failed, and no rank had failed");
                return;
            }
            std::size_t place = 0;
            for (std::int64_t s = 0; s < world_.num_ranks; ++s)
                for (std::int64_t i = 0; i < world_.bytes[number][s][rank_]; ++i)
                    check(dst[place++] == value(number, s, rank_, i), "a byte that came");
        }
    }

private:
    // False: some rank has failed.
    bool exchange(const Transfer& transfer, std::int64_t number, const Bytes& src, Bytes& dst) {
        ring_.begin(&transfer, src.data(), dst.data());
        for (;;) {
            if (rank_ == world_.failing_rank && number == world_.failing_transfer && random_.one_in(3)) return fail();
            if (random_.one_in(8)) std::this_thread::sleep_for(std::chrono::microseconds(random_.between(0, 200)));
            switch (ring_.step(random_.between(1, 2000))) {
            case NodeRing::Event::finished: return rank_ != world_.failing_rank || number != world_.failing_transfer || fail();
            case NodeRing::Event::failed: return fail();
            case NodeRing::Event::start_exchange: send(); break;
            case NodeRing::Event::finish_exchange:
                if (!receive()) return fail();
                break;
            case NodeRing::Event::timed_out: break;
            }
        }
    }

    bool fail() {
        ring_.fail();
        mail_.fail();
        return false;
    }

    // The leader's messages are numbered: its peer, the same rank of the other node, leads the same chunks in order.
    void send() {
        const NodeRing::Exchange exchange = ring_.exchange();
        const std::byte* from = memory_ + exchange.outgoing;
        for (std::int64_t node = 0; node < static_cast<std::int64_t>(exchange.to_node.size()); ++node) {
            if (node == node_) continue;
            mail_.send({node_, node, local_rank_, num_sent_}, Bytes(from, from + exchange.to_node[node]));
            from += exchange.to_node[node];
        }
        ++num_sent_;
    }

    bool receive() {
        const NodeRing::Exchange exchange = ring_.exchange();
        std::byte* to = memory_ + exchange.incoming;
        for (std::int64_t node = 0; node < static_cast<std::int64_t>(exchange.from_node.size()); ++node) {
            if (node == node_) continue;
            Bytes bytes;
            if (!mail_.receive({node, node_, local_rank_, num_received_}, bytes)) return false;
            check(static_cast<std::int64_t>(bytes.size()) == exchange.from_node[node], "the size of a message");
            if (!bytes.empty()) std::memcpy(to, bytes.data(), bytes.size());
            to += bytes.size();
        }
        ++num_received_;
        return true;
    }

    const World& world_;
    Mail& mail_;
    std::byte* memory_;
    std::int64_t rank_, node_, local_rank_;
    std::int64_t num_sent_ = 0, num_received_ = 0;   // messages to, and from, each other node
    Random random_;
    NodeRing ring_;
};

std::byte* shared_memory(std::int64_t num_bytes) {
    void* memory = mmap(nullptr, static_cast<std::size_t>(num_bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    check(memory != MAP_FAILED, "mmap");
    return static_cast<std::byte*>(memory);
}

void run_threads(Random& random, std::uint64_t seed) {
    const World world = World::random(random, false);
    Mail mail;
    std::vector<std::byte*> memories;
    for (const auto& layout : world.layouts) {
        // From the heap, so that AddressSanitizer knows where it ends.
        const auto num_bytes = static_cast<std::size_t>(NodeRing::bytes_needed(layout));
        memories.push_back(static_cast<std::byte*>(std::aligned_alloc(64, (num_bytes + 63) / 64 * 64)));
        std::memset(memories.back(), 0, num_bytes);
    }
    std::vector<std::thread> threads;
    for (std::int64_t rank = 0; rank < world.num_ranks; ++rank)
        threads.emplace_back([&, rank] { Rank(world, mail, memories[world.node_of(rank)], rank, seed).run(); });
    for (auto& thread : threads) thread.join();
    for (auto* memory : memories) std::free(memory);
}

void run_processes(Random& random, std::uint64_t seed) {
    const World world = World::random(random, true);
    std::byte* memory = shared_memory(NodeRing::bytes_needed(world.layouts[0]));
    std::vector<pid_t> processes;
    for (std::int64_t rank = 0; rank < world.num_ranks; ++rank) {
        processes.push_back(fork());
        if (processes.back() != 0) continue;
        Mail mail;
        Rank(world, mail, memory, rank, seed).run();
        std::_Exit(0);
    }
    for (const auto process : processes) {
        int status = 0;
        waitpid(process, &status, 0);
        check(status == 0, "a process");
    }
}

}  // namespace

int main(int argc, char** argv) {
    const std::uint64_t seed = seed_of(argc, argv);
    Random random(seed);
    for (int i = 0; i < 20; ++i) run_threads(random, seed);
#ifndef __SANITIZE_THREAD__
    for (int i = 0; i < 10; ++i) run_processes(random, seed);
#endif
}
