// SPDX-License-Identifier: Apache-2.0
#include "gating.h"

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace moecomm::gating {
namespace {

const Kernels& kernels() {
#ifdef MOECOMM_X86
    static const Kernels& chosen = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
                                       ? kernels_avx512
                                   : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? kernels_avx2
                                                                                                     : kernels_baseline;
    return chosen;
#else
    return kernels_baseline;
#endif
}

// Hands out [0, n) piece by piece. Each thread calls body(take), which calls take(first, last) until that says false.
// Threads that come late find nothing left and are not waited for: another library's may be spinning on their cores.
class Pieces {
public:
    Pieces(std::int64_t n, std::int64_t size) : n_(n), size_(size) {}

    bool take(std::int64_t& first, std::int64_t& last) {
        first = next_.fetch_add(size_);
        last = std::min(n_, first + size_);
        return first < n_;
    }

    // False once close() has been called: the caller may have returned, and its lambdas are gone.
    bool enter() {
        const std::lock_guard<std::mutex> lock(mutex_);
        working_ += !closed_;
        return !closed_;
    }

    void leave() {
        const std::lock_guard<std::mutex> lock(mutex_);
        --working_;
        left_.notify_one();
    }

    // Waits for the threads that have entered, and keeps the others out.
    void close() {
        std::unique_lock<std::mutex> lock(mutex_);
        closed_ = true;
        left_.wait(lock, [this] { return working_ == 0; });
    }

private:
    const std::int64_t n_, size_;
    std::atomic<std::int64_t> next_{0};
    std::mutex mutex_;
    std::condition_variable left_;
    int working_ = 0;
    bool closed_ = false;
};

// Uses a thread more for every `grain` of n, up to `threads`: to start one costs up to 100 us.
template <class Body>
void in_parts(std::int64_t n, int threads, std::int64_t grain, const Body& body) {
    const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, n / grain));
    const auto pieces = std::make_shared<Pieces>(n, parts == 1 ? n : std::max<std::int64_t>(1, n / (8 * parts)));
    const auto take = [p = pieces.get()](std::int64_t& first, std::int64_t& last) { return p->take(first, last); };
    for (std::int64_t part = 1; part < parts; ++part)
        // `pieces` is shared: a thread that starts late still asks it whether there is work. Detached, since waiting for such
        // a thread to start could take longer than the work.
        std::thread([pieces, &take, &body] {
            if (!pieces->enter()) return;  // take and body are gone
            body(take);
            pieces->leave();
        }).detach();
    body(take);
    pieces->close();
}

struct Floats {              // aligned to 64 bytes
    explicit Floats(std::int64_t n) : p(new float[static_cast<std::size_t>(n) + 16]) {}
    float* get() const {
        return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(p.get()) + 63) & ~std::uintptr_t{63});
    }
    std::unique_ptr<float[]> p;
};

// The rank of an assignment among those that want one expert: larger stays; among equal keys the lower index.
std::uint64_t priority(const Route& a, std::int64_t i) {
    const unsigned key = a.drop == kByRandom ? random_word(a.generator, kDrop, static_cast<std::uint64_t>(i))
                                             : ordered(a.weight[i]);
    return static_cast<std::uint64_t>(key) << 32 | (0xffffffffu - static_cast<unsigned>(i));
}

// Drops all but the `capacity` assignments of highest priority of every expert.
void drop_by_priority(const Route& a) {
    std::vector<std::int64_t> start(static_cast<std::size_t>(a.E) + 1, 0);
    for (int e = 0; e < a.E; ++e) start[e + 1] = start[e] + (a.load[e] > a.capacity ? a.load[e] : 0);
    if (start[a.E] == 0) return;
    std::vector<std::uint64_t> queued(static_cast<std::size_t>(start[a.E])), least(static_cast<std::size_t>(a.E), 0);
    // Only the queues of overloaded experts are filled; the others keep all they have.
    auto next = start;
    for (std::int64_t i = 0; i < a.T * a.K; ++i)
        if (const int e = a.expert[i]; e >= 0 && a.load[e] > a.capacity) queued[next[e]++] = priority(a, i);
    for (int e = 0; e < a.E; ++e)
        if (a.load[e] > a.capacity) {
            least[e] = ~std::uint64_t{0};
            if (a.capacity == 0) continue;
            const auto first = queued.begin() + start[e], stays = first + (a.capacity - 1);
            // Priorities are all different, so a threshold keeps exactly `capacity` of them.
            std::nth_element(first, stays, queued.begin() + start[e + 1], std::greater<>());
            least[e] = *stays;
        }
    for (std::int64_t i = 0; i < a.T * a.K; ++i)
        if (const int e = a.expert[i]; e >= 0 && a.load[e] > a.capacity && priority(a, i) < least[e]) a.expert[i] = -1;
}

// Hands out the places of the tokens [first, last): next [E], or [K, E] by choice, are the first free ones.
void place(const Route& a, std::int64_t first, std::int64_t last, std::int32_t* next) {
    const int stride = a.drop == kByChoice ? a.E : 0;
    const std::int64_t most = a.capacity < 0 ? INT64_MAX : a.capacity;
    for (std::int64_t t = first; t < last; ++t) {
        float kept_sum = 0;
        for (int k = 0; k < a.K; ++k) {
            const std::int64_t i = t * a.K + k;
            const int e = a.expert[i];
            const std::int32_t slot = e < 0 ? -1 : next[k * stride + e]++;
            const bool kept = e >= 0 && slot < most;
            a.expert[i] = kept ? e : -1;
            a.slot[i] = kept ? slot : -1;
            a.row[i] = kept ? a.offset[e] + slot : -1;
            if (!kept) {
                a.weight[i] = 0;
                continue;
            }
            a.source[a.row[i]] = static_cast<std::int32_t>(i);
            kept_sum = add(kept_sum, a.weight[i]);
        }
        // weight holds scores until here: the sum of those that were kept is complete.
        for (int k = 0; k < a.K; ++k) {
            const std::int64_t i = t * a.K + k;
            if (a.expert[i] >= 0) a.weight[i] = choice_weight(a.weight[i], kept_sum, a.floor, a.scale);
        }
    }
}

void lay_out_rows(const Route& a) {
    a.offset[0] = 0;
    for (int e = 0; e < a.E; ++e) {
        const std::int64_t rows = a.capacity >= 0 ? a.capacity : (a.count[e] + a.align - 1) / a.align * a.align;
        a.offset[e + 1] = a.offset[e] + static_cast<std::int32_t>(rows);
        std::fill(a.source + a.offset[e] + a.count[e], a.source + a.offset[e + 1], -1);
    }
    std::fill(a.source + a.offset[a.E], a.source + a.N, -1);
}

// ---- route: chunks of tokens, counted apart -------------------------------------------------------------------------

// A chunk is one thread's work at a time. What is counted or summed in one is its own, and joined in order of chunks: no
// result depends on the number of threads.
struct Chunks {
    std::int64_t lines;              // in which an expert's assignments stand: one, or with drop by choice K
    std::int64_t counts;             // numbers of a chunk in `next`: lines * E
    std::vector<std::int32_t> next;  // [chunk][line][E]: first how many, then the first free place
    std::vector<float> share;        // [chunk][E]
    std::vector<Chunk> chunk;

    explicit Chunks(const Route& a) : lines(a.drop == kByChoice ? a.K : 1), counts(lines * a.E) {
        const std::int64_t num_chunks = (a.T + kChunk - 1) / kChunk;
        next.resize(static_cast<std::size_t>(num_chunks * counts));
        share.resize(static_cast<std::size_t>(num_chunks * a.E));
        chunk.resize(static_cast<std::size_t>(num_chunks));
        for (std::int64_t c = 0; c < num_chunks; ++c)
            chunk[c] = {c * kChunk, std::min(a.T, (c + 1) * kChunk), &next[c * counts], &share[c * a.E], 0.0, false};
    }

    std::int64_t size() const { return static_cast<std::int64_t>(chunk.size()); }
};

// Scores and choices of all tokens. False if a logit is unusable.
bool select_all(const Route& a, Chunks& chunks) {
    const std::int64_t grain = std::max<std::int64_t>(1, (1 << 18) / (kChunk * a.E));
    in_parts(chunks.size(), a.threads, grain, [&](const auto& take) {
        const Floats scratch(scratch_floats(a.E));
        for (std::int64_t first, last; take(first, last);)
            for (std::int64_t c = first; c < last; ++c) kernels().select(a, chunks.chunk[c], scratch.get());
    });
    return std::none_of(chunks.chunk.begin(), chunks.chunk.end(), [](const Chunk& c) { return c.bad; });
}

// load, aux_loss and z_loss: of what was chosen, before drops.
void write_losses(const Route& a, const Chunks& chunks) {
    for (int e = 0; e < a.E; ++e) {
        std::int32_t chosen = 0;
        for (std::int64_t i = e; i < chunks.size() * chunks.counts; i += a.E) chosen += chunks.next[i];
        a.load[e] = chosen;
    }
    const double num_tokens = std::max(1.0, static_cast<double>(num_counted(a)));
    double lse_squared = 0, balance = 0;
    for (int e = 0; e < a.E; ++e) {
        double sum = 0;
        for (std::int64_t c = 0; c < chunks.size(); ++c) sum += chunks.share[c * a.E + e];
        balance += sum / num_tokens * (a.load[e] / num_tokens);
    }
    for (const Chunk& c : chunks.chunk) lse_squared += c.lse_squared;
    *a.aux_loss = static_cast<float>(balance * a.E / a.K);
    *a.z_loss = static_cast<float>(lse_squared / num_tokens);
}

// Counts what each chunk has left after drops by priority. There is one line then.
void count_again(const Route& a, Chunks& chunks) {
    std::fill(chunks.next.begin(), chunks.next.end(), 0);
    for (std::int64_t i = 0; i < a.T * a.K; ++i)
        if (a.expert[i] >= 0) ++chunks.next[i / (a.K * kChunk) * chunks.counts + a.expert[i]];
}

// Turns each chunk's counts into its first free places: line by line, in each line chunk by chunk. Writes count.
void find_first_places(const Route& a, Chunks& chunks) {
    for (int e = 0; e < a.E; ++e) {
        std::int32_t free = 0;
        for (std::int64_t line = 0; line < chunks.lines; ++line)
            for (std::int64_t c = 0; c < chunks.size(); ++c) {
                std::int32_t& next = chunks.next[c * chunks.counts + line * a.E + e];
                const std::int32_t in_chunk = next;
                next = free;
                free += in_chunk;
            }
        // More may stand in the line than there are places: `place` drops them.
        a.count[e] = a.capacity < 0 ? free : static_cast<std::int32_t>(std::min<std::int64_t>(free, a.capacity));
    }
}

}  // namespace

int route(const Route& a) {
    if (a.bias != nullptr && !std::all_of(a.bias, a.bias + a.E, [](float b) { return std::isfinite(b); })) return 2;
    Chunks chunks(a);
    if (!select_all(a, chunks)) return 1;
    write_losses(a, chunks);
    if (a.capacity >= 0 && (a.drop == kByProbability || a.drop == kByRandom)) {
        drop_by_priority(a);
        count_again(a, chunks);
    }
    find_first_places(a, chunks);
    lay_out_rows(a);
    // Every chunk knows its first places, so chunks need not wait for each other.
    const std::int64_t grain = std::max<std::int64_t>(1, (1 << 16) / (kChunk * a.K));
    in_parts(chunks.size(), a.threads, grain, [&](const auto& take) {
        for (std::int64_t first, last; take(first, last);)
            for (std::int64_t c = first; c < last; ++c) {
                const Chunk& chunk = chunks.chunk[c];
                place(a, chunk.first, chunk.last, chunk.chosen);
            }
    });
    return 0;
}

void route_backward(const RouteBackward& a) {
    in_parts(a.T, a.threads, std::max<std::int64_t>(16, (1 << 18) / a.E), [&](const auto& take) {
        const Floats scratch(scratch_floats(a.E));
        for (std::int64_t first, last; take(first, last);) kernels().route_backward(a, first, last, scratch.get());
    });
}

// ---- rows ----------------------------------------------------------------------------------------------------------

namespace {

constexpr std::int64_t kGrainBytes = 4 << 20;

// The last-level cache as this machine (maybe a virtual one) has it; sysconf tells of the whole processor.
std::int64_t cache_bytes() {
    std::int64_t kib = 0;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
        if (std::fscanf(file, "%" SCNd64 "K", &kib) != 1) kib = 0;
        std::fclose(file);
    }
    return kib > 0 ? kib << 10 : std::int64_t{32} << 20;
}

// Whether a call that reads and writes so many bytes had better write past the caches.
bool streams(std::int64_t bytes) {
    static const std::int64_t cache = cache_bytes();
    return bytes > cache;
}

void clear_empty_rows(const Rows& table, void* rows, std::int64_t row_bytes, std::int64_t first, std::int64_t last) {
    if (row_bytes == 0) return;  // rows may be null, which memset must not be given
    for (std::int64_t n = first; n < last; ++n)
        if (table.source[n] < 0) std::memset(static_cast<char*>(rows) + n * row_bytes, 0, static_cast<std::size_t>(row_bytes));
}

std::int64_t grain(std::int64_t row_bytes) { return std::max<std::int64_t>(1, kGrainBytes / std::max<std::int64_t>(1, row_bytes)); }

std::int64_t bytes_of(Type type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

}  // namespace

void copy_row(void* dst, const void* src, std::int64_t bytes, bool stream) {
#ifdef __SSE2__
    if (stream && bytes >= 128) {
        auto* to = static_cast<char*>(dst);
        const auto* from = static_cast<const char*>(src);
        const auto head = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(to) & 63);
        std::memcpy(to, from, static_cast<std::size_t>(head));
        std::int64_t i = head;
        for (; i + 64 <= bytes; i += 64) {
            const auto* line = reinterpret_cast<const __m128i*>(from + i);
            auto* out = reinterpret_cast<__m128i*>(to + i);
            const __m128i a = _mm_loadu_si128(line), b = _mm_loadu_si128(line + 1);
            const __m128i c = _mm_loadu_si128(line + 2), d = _mm_loadu_si128(line + 3);
            _mm_stream_si128(out, a);
            _mm_stream_si128(out + 1, b);
            _mm_stream_si128(out + 2, c);
            _mm_stream_si128(out + 3, d);
        }
        std::memcpy(to + i, from + i, static_cast<std::size_t>(bytes - i));
        return;
    }
#endif
    (void)stream;
    std::memcpy(dst, src, static_cast<std::size_t>(bytes));
}

static void end_of_stream() {
#ifdef __SSE2__
    _mm_sfence();  // streamed rows are there before anything that follows
#endif
}

void permute(const Rows& table, const void* x, void* rows, std::int64_t row_bytes, int threads) {
    const bool stream = streams((table.T + table.N) * row_bytes);
    in_parts(table.T, threads, grain(row_bytes * (table.K + 1)), [&](const auto& take) {
        for (std::int64_t first, last; take(first, last);)
            kernels().permute(table, x, rows, row_bytes, first, last, stream);
        end_of_stream();
    });
    clear_empty_rows(table, rows, row_bytes, 0, table.N);
}

void permute_fp8(const PermuteFp8& a, int threads) {
    in_parts(a.table.T, threads, grain(4 * a.H), [&](const auto& take) {
        for (std::int64_t first, last; take(first, last);)
            kernels().permute_fp8(a, first, last);
    });
    clear_empty_rows(a.table, a.rows, a.H, 0, a.table.N);
    for (std::int64_t n = 0, blocks = (a.H + 127) / 128; n < a.table.N; ++n)
        if (a.table.source[n] < 0) std::fill(a.scales + n * blocks, a.scales + (n + 1) * blocks, 1.0f);
}

void unpermute(const Unpermute& a, int threads) {
    const std::int64_t row_bytes = a.H * bytes_of(a.type);
    const bool stream = streams((a.table.T + a.table.N) * row_bytes);
    in_parts(a.table.T, threads, grain(row_bytes * (a.table.K + 1)), [&](const auto& take) {
        for (std::int64_t first, last; take(first, last);)
            kernels().unpermute(a, first, last, stream);
        end_of_stream();
    });
}

void unpermute_backward(const UnpermuteBackward& a, int threads) {
    const std::int64_t row_bytes = a.H * bytes_of(a.type);
    const bool stream = streams(2 * a.table.N * row_bytes);
    in_parts(a.table.T, threads, grain(row_bytes * (2 * a.table.K + 1)), [&](const auto& take) {
        for (std::int64_t first, last; take(first, last);)
            kernels().unpermute_backward(a, first, last, stream);
        end_of_stream();
    });
    clear_empty_rows(a.table, a.grad_rows, row_bytes, 0, a.table.N);
}

}  // namespace moecomm::gating
