// As much of CUDA as csrc/cuda/direct*.cu and route*.cu need, on the CPU. test_direct_emulated.py puts it in front of a source; what is
// declared here and not defined is in cuda_on_cpu.cpp.
#include <math.h>

#include <utility>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __host__

struct Index {
  unsigned x;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct alignas(16) int4 {
  int x, y, z, w;
};

extern Index threadIdx, blockIdx, blockDim, gridDim;
void let_others_run();
long long virtual_time();                                                 // nanoseconds
int meet_block(int vote);                                                 // the votes of all its threads, or'ed
const unsigned* meet_warp(unsigned mask, int operation, unsigned value);  // the values of all its lanes
void* shared_memory(int number, int num_bytes);                           // of this block; -1 bytes: what the launch asked for

template <typename T>
T& shared(int number) {
  return *static_cast<T*>(shared_memory(number, sizeof(T)));
}

// What PTX does with memory is whole in each 8 bytes.
inline unsigned load_word(const volatile unsigned* from, int i) {
  if (i % 2 == 0) let_others_run();
  return from[i];
}
inline void store_word(volatile unsigned* to, int i, unsigned value) {
  if (i > 0 && i % 2 == 0) let_others_run();
  to[i] = value;
}

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline float __logf(float value) { return logf(value); }
inline float __expf(float value) { return expf(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rn(float value) { return static_cast<int>(lrintf(value)); }
inline unsigned long long __float2ull_rn(float value) { return static_cast<unsigned long long>(llrintf(value)); }
inline unsigned short bfloat16_bits(float value) {
  const unsigned bits = __float_as_uint(value);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stcg(T* to, T value) {
  *to = value;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
template <typename T, typename U>
T atomicAdd(T* to, U value) {
  let_others_run();
  const T old = *to;
  *to = old + static_cast<T>(value);
  return old;
}
inline unsigned atomicOr(unsigned* to, unsigned value) {
  let_others_run();
  const unsigned old = *to;
  *to = old | value;
  return old;
}
inline unsigned atomicExch(unsigned* to, unsigned value) {
  let_others_run();
  const unsigned old = *to;
  *to = value;
  return old;
}
inline void __threadfence() { let_others_run(); }
inline void __threadfence_system() { let_others_run(); }

inline int __syncthreads_or(int vote) { return meet_block(vote); }
inline void __syncthreads() { meet_block(0); }
inline void __syncwarp() { meet_warp(~0u, 0, 0); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned from = threadIdx.x % 32 / width * width + lane % width;
  return same_bits<T>(meet_warp(mask, 1, same_bits<unsigned>(value))[from]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return same_bits<T>(meet_warp(mask, 2, same_bits<unsigned>(value))[threadIdx.x % 32 ^ distance]);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const unsigned lane = threadIdx.x % 32, from = lane < static_cast<unsigned>(distance) ? lane : lane - distance;
  return same_bits<T>(meet_warp(mask, 3, same_bits<unsigned>(value))[from]);
}
inline unsigned same_as(const unsigned* values, unsigned value) {
  unsigned lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= static_cast<unsigned>(values[i] == value) << i;
  return lanes;
}
inline int __any_sync(unsigned mask, int vote) { return same_as(meet_warp(mask, 4, vote != 0), 1) != 0; }
inline int __all_sync(unsigned mask, int vote) { return same_as(meet_warp(mask, 5, vote != 0), 0) == 0; }
inline unsigned __ballot_sync(unsigned mask, int vote) { return same_as(meet_warp(mask, 7, vote != 0), 1); }
template <typename Combine>
unsigned over_warp(unsigned mask, int operation, unsigned value, Combine combine) {
  const unsigned* values = meet_warp(mask, operation, value);
  unsigned result = values[0];
  for (int i = 1; i < 32; ++i) result = combine(result, values[i]);
  return result;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return over_warp(mask, 8, value, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return over_warp(mask, 9, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return over_warp(mask, 10, value, [](unsigned a, unsigned b) { return a < b ? b : a; });
}
inline unsigned __match_any_sync(unsigned mask, int value) { return same_as(meet_warp(mask, 6, value), value); }

// Calls a kernel with what the addresses point to, as cuLaunchKernel does.
template <typename... T, std::size_t... I>
void call(void (*kernel)(T...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<T>*>(arguments[I])...);
}
template <typename... T>
void call(void (*kernel)(T...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<T...>{});
}
