// This rank has read the compact rows that a buffer holds, without a combine.
#include "direct.cuh"

extern "C" __global__ void direct_free(const __grid_constant__ Peers peers, const Counters* done, long long done_credit) {
  // Credit is counted by blocks of the kernel that used the buffer: one thread here stands for each of them.
  for (int block = threadIdx.x; block < BLOCKS; block += blockDim.x)
    give_credit(peers, done_credit, block, done->uses[block]);
}
