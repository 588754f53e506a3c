// Runs kernels of several ranks at a time on one thread: each CUDA thread is a coroutine that gives way wherever it looks
// at memory that others write. Blocks, and whole ranks, fall behind each other at random, the same way for the same seed.
#include "cuda_on_cpu.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr int STACK = 1 << 17, ROUND = 1000;  // bytes, nanoseconds
constexpr unsigned char FRESH = 0xcd;          // what shared memory holds at first, and what lies behind it

struct Launch {
  void (*entry)(void**);
  void** arguments;
  int blocks, threads, shared_bytes;
};

struct Warp {
  unsigned value[2][32];  // of this meeting and of the one before, which some lanes may still be reading
  unsigned meetings = 0, arrived = 0;
  int operation = 0;
};

struct Thread {
  ucontext_t first;
  jmp_buf place;
  bool started = false, done = true;
  unsigned index;
  const unsigned* awaited;  // it sleeps while *awaited == seen
  unsigned seen;
};

struct Block {
  unsigned index;
  const Launch* launch;
  std::vector<Thread*> threads;  // in the order in which they run
  std::vector<Warp> warps;
  unsigned meetings = 0, arrived = 0, alive;
  int votes = 0, result = 0;
  std::map<int, std::vector<unsigned char>> shared;
};

struct Rank {
  std::deque<Launch> queue;
  std::vector<std::unique_ptr<Block>> blocks;  // of the kernel that runs
};

Rank ranks[8];
std::vector<Thread*> idle;
long long rounds;
jmp_buf scheduler;
Block* block;
Thread* thread;
char problem[200];

void sleep_while(const unsigned* word, unsigned value) {
  thread->awaited = word, thread->seen = value;
  if (!_setjmp(thread->place)) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    block->launch->entry(block->launch->arguments);
    thread->done = true;
    --block->alive;
    sleep_while(nullptr, 0);
  }
}

Thread* new_thread() {
  if (idle.empty()) {
    auto* created = new Thread;
    getcontext(&created->first);
    created->first.uc_stack.ss_sp = malloc(STACK);
    created->first.uc_stack.ss_size = STACK;
    makecontext(&created->first, live, 0);
    idle.push_back(created);
  }
  Thread* taken = idle.back();
  idle.pop_back();
  taken->done = false, taken->awaited = nullptr;
  return taken;
}

void start(Rank& rank, std::mt19937& random) {
  const Launch& launch = rank.queue.front();
  for (int b = 0; b < launch.blocks; ++b) {
    auto created = std::make_unique<Block>();
    created->index = b, created->launch = &launch, created->alive = launch.threads;
    created->warps.resize(launch.threads / 32);
    for (int i = 0; i < launch.threads; ++i) {
      created->threads.push_back(new_thread());
      created->threads.back()->index = i;
    }
    for (int i = launch.threads; i > 1; --i) std::swap(created->threads[i - 1], created->threads[random() % i]);
    rank.blocks.push_back(std::move(created));
  }
}

void resume(Thread* taken) {
  thread = taken;
  threadIdx.x = taken->index;
  if (_setjmp(scheduler)) return;
  if (taken->started) _longjmp(taken->place, 1);
  taken->started = true;
  setcontext(&taken->first);
}

// Lets every thread that can go on do so until it gives way. Returns how many could.
int run_block(Block& of) {
  int ran = 0;
  block = &of;
  blockIdx.x = of.index, blockDim.x = of.launch->threads, gridDim.x = of.launch->blocks;
  for (Thread* each : of.threads) {
    if (each->done || (each->awaited && *each->awaited == each->seen)) continue;
    ++ran;
    resume(each);
  }
  return ran;
}

void end(Rank& rank) {
  for (auto& each : rank.blocks) {
    for (auto& [number, bytes] : each->shared)
      for (int i = 0; i < 64; ++i)
        if (bytes[bytes.size() - 64 + i] != FRESH) snprintf(problem, sizeof(problem), "written beyond shared memory %d", number);
    idle.insert(idle.end(), each->threads.begin(), each->threads.end());
  }
  rank.blocks.clear();
  rank.queue.pop_front();
}

}  // namespace

void let_others_run() { sleep_while(nullptr, 0); }

long long virtual_time() { return rounds * ROUND; }

int meet_block(int vote) {
  block->votes |= vote;
  if (++block->arrived == block->threads.size()) {
    block->result = block->votes;
    block->arrived = block->votes = 0;
    ++block->meetings;
    let_others_run();
  } else {
    sleep_while(&block->meetings, block->meetings);
  }
  return block->result;
}

const unsigned* meet_warp(unsigned mask, int operation, unsigned value) {
  Warp& warp = block->warps[threadIdx.x / 32];
  if (mask != ~0u || (warp.arrived && warp.operation != operation))
    snprintf(problem, sizeof(problem), "lanes of a warp meet in operations %d and %d, mask %x", warp.operation, operation, mask);
  warp.operation = operation;
  const unsigned meeting = warp.meetings;
  warp.value[meeting % 2][threadIdx.x % 32] = value;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.meetings;
  } else {
    sleep_while(&warp.meetings, meeting);
  }
  return warp.value[meeting % 2];
}

void* shared_memory(int number, int num_bytes) {
  auto& bytes = block->shared[number];
  if (bytes.empty()) bytes.assign((num_bytes < 0 ? block->launch->shared_bytes : num_bytes) + 64, FRESH);
  return bytes.data();
}

// Queues a kernel of a rank, or with 0 blocks something that runs at once, between the kernels before and after it.
extern "C" void enqueue(int rank, void (*entry)(void**), void** arguments, int blocks, int threads, int shared_bytes) {
  ranks[rank].queue.push_back({entry, arguments, blocks, threads, shared_bytes});
}

// Runs all that is queued. Returns what went wrong, "" if nothing.
extern "C" const char* run(unsigned seed, long long most_rounds) {
  std::mt19937 random(seed);
  bool slow[8] = {};
  int still = 0;
  problem[0] = 0;
  for (const long long begin = rounds; !problem[0]; ++rounds) {
    bool busy = false;
    int ran = 0;
    for (Rank& rank : ranks) {
      if (rounds % 128 == 0) slow[&rank - ranks] = random() % 3 == 0;
      if (rank.queue.empty()) continue;
      busy = true;
      if (slow[&rank - ranks]) continue;
      bool alive = false;
      if (rank.blocks.empty()) start(rank, random);
      if (rank.blocks.empty()) rank.queue.front().entry(nullptr);
      for (auto& each : rank.blocks) {
        if (random() % 4) ran += run_block(*each);
        alive |= each->alive > 0;
      }
      if (!alive) end(rank), ++ran;
    }
    if (!busy) break;
    still = ran ? 0 : still + 1;
    if (still > 10000) snprintf(problem, sizeof(problem), "threads of a block wait where not all of them come");
    if (rounds - begin > most_rounds) snprintf(problem, sizeof(problem), "not done after %lld rounds", most_rounds);
  }
  for (Rank& rank : ranks) rank.queue.clear(), rank.blocks.clear();
  return problem;
}
