// What the kernels that move rows share: element types, pieces of a row in registers, and zero rows.
//
// NVRTC compiles these files at run time, without the toolkit's headers: conversions are PTX instructions of sm_80.
#pragma once

using int64 = long long;

// From here on memory may be read and written: the kernel before on the stream has ended, and what it wrote is visible.
// Until then this one has been started beside it, as the next one is from now on.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

// A bfloat16 is the upper half of a float32.
__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bfloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
__device__ inline float to_float(float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// Rounded to nearest, ties to even.
__device__ inline void from_float(float value, float& result) { result = value; }
__device__ inline void from_float(float value, bfloat16& result) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}
__device__ inline void from_float(float value, float16& result) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}

// As many elements as one thread moves at once: 16 bytes where every row starts at a multiple of 16, else one element.
template <typename T, int N>
struct alignas(sizeof(T) * N) Piece {
  T value[N];
};

// *from, or zeros if not wanted. There is no branch, so that a thread starts all its loads before it waits for one.
// With ONCE the line is the first to leave the second cache: it makes room for what is written.
template <bool ONCE, typename P>
__device__ inline P load_if(bool wanted, const P* from) {
  if constexpr (sizeof(P) == 16) {
    // As assembly, since the compiler makes a branch of a condition: a predicated load is skipped and waits for nothing.
    // .nc: x and rows are not written while the kernel runs.
    uint4 bits = {};
    if constexpr (ONCE) {
      unsigned long long evict_first;
      asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(evict_first));
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.ne.u32 wanted, %4, 0;\n"
          "@wanted ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%5], %6;\n"
          "}\n"
          : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)
          : "r"(static_cast<unsigned>(wanted)), "l"(from), "l"(evict_first));
    } else {
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.ne.u32 wanted, %4, 0;\n"
          "@wanted ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%5];\n"
          "}\n"
          : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)
          : "r"(static_cast<unsigned>(wanted)), "l"(from));
    }
    return *reinterpret_cast<P*>(&bits);
  } else {
    return wanted ? *from : P{};
  }
}

// With STAY the line remains in the second cache as long as any other.
template <bool STAY, typename P>
__device__ inline void store(P* to, P piece) {
  if constexpr (sizeof(P) == 16 && !STAY)
    __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<uint4*>(&piece));
  else if constexpr (sizeof(P) == 16)
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4*>(&piece);
  else
    *to = piece;
}

// The pieces of rows that a thread works on: `column`, column + stride, .. of one token's row. A block works on
// blockDim.x / stride tokens; `slices` blocks share a row. stride: a power of two, at most blockDim.x.
struct Place {
  int token, column;

  __device__ Place(int stride, int slices, int pieces_per_thread) {
    const int group = static_cast<int>(blockIdx.x) / slices, slice = static_cast<int>(blockIdx.x) % slices;
    const int within = __ffs(stride) - 1;
    token = group * static_cast<int>(blockDim.x >> within) + static_cast<int>(threadIdx.x >> within);
    column = slice * stride * pieces_per_thread + static_cast<int>(threadIdx.x & (stride - 1));
  }
};

// Rounds WIDTH sums into a piece.
template <typename P, int N>
__device__ inline P from_floats(const float (&value)[N]) {
  P piece;
#pragma unroll
  for (int n = 0; n < N; ++n) from_float(value[n], piece.value[n]);
  return piece;
}

// The BATCH values from `first` on; `none` beyond `count`. With WHOLE there is one batch, and those of 4 and 8 values
// start at a multiple of 16 bytes.
template <int BATCH, bool WHOLE, typename T>
__device__ inline void load_batch(const T* from, int first, int count, T none, T (&value)[BATCH]) {
  if constexpr (WHOLE && BATCH % 4 == 0) {
#pragma unroll
    for (int j = 0; j < BATCH; j += 4)
      *reinterpret_cast<int4*>(&value[j]) = *reinterpret_cast<const int4*>(from + j);
  } else {
#pragma unroll
    for (int j = 0; j < BATCH; ++j) value[j] = WHOLE || first + j < count ? from[first + j] : none;
  }
}

// Each block looks at ROWS_PER_BLOCK entries of `source`. For those that are -1, a warp each calls fill(row, lane).
constexpr int ROWS_PER_BLOCK = 256;

template <typename Fill>
__device__ inline void fill_empty_rows(const int* source, int num_rows, int block, Fill fill) {
  // Empty rows are few and scattered: they are listed first, so that warps share the work evenly.
  __shared__ int empty[ROWS_PER_BLOCK];
  __shared__ int num_empty;
  if (threadIdx.x == 0) num_empty = 0;
  __syncthreads();
  const int64 first = static_cast<int64>(block) * ROWS_PER_BLOCK;
  for (int i = threadIdx.x; i < ROWS_PER_BLOCK; i += blockDim.x)
    if (first + i < num_rows && source[first + i] < 0) empty[atomicAdd(&num_empty, 1)] = i;
  __syncthreads();
  for (int i = threadIdx.x / 32; i < num_empty; i += blockDim.x / 32) fill(first + empty[i], threadIdx.x % 32);
}

template <typename P>
__device__ inline void zero_empty_rows(const int* source, int num_rows, int pieces_per_row, P* rows, int block) {
  fill_empty_rows(source, num_rows, block, [&](int64 row, int lane) {
    for (int i = lane; i < pieces_per_row; i += 32) store<false>(rows + row * pieces_per_row + i, P{});
  });
}
