// This rank has read the compact rows that a buffer holds, without a combine.
#include "direct.cuh"

extern "C" __global__ void direct_free(const __grid_constant__ Memory memory, const Counters* done, long long done_credit) {
  for (int block = threadIdx.x; block < BLOCKS; block += blockDim.x)
    give_credit(memory, done_credit, block, done->uses[block]);
}
