// float8 e4m3: each 128 values of a row share a scale.
#pragma once

constexpr int GROUP = 128;         // values that share a scale
constexpr float LARGEST = 448.0f;  // of e4m3

// Rounded to nearest, ties to even. What is larger than LARGEST becomes LARGEST, NaN becomes NaN.
__device__ inline unsigned char to_e4m3(float value) {
#if __CUDA_ARCH__ >= 890
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
  return static_cast<unsigned char>(pair);
#else
  const unsigned sign = __float_as_uint(value) >> 24 & 0x80;
  const float size = fminf(fabsf(value), LARGEST);
  if (value != value) return sign | 0x7f;
  if (size < 0.015625f) return sign | __float2int_rn(size * 512.0f);  // below 2^-6: steps of 2^-9
  const unsigned bits = __float_as_uint(size);
  return sign | ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
#endif
}

// The factor that makes a group's largest value LARGEST; never so small that it rounds to 0.
__device__ inline float scale_of(float amax) { return amax > 0 ? fmaxf(amax, 0x1p-100f) / LARGEST : 1; }

// x / scale, the same bits, for many x: by Markstein's theorem two steps from the rounded reciprocal are enough, unless
// a remainder could be too small for a float.
struct Divisor {
  float scale, reciprocal;

  __device__ explicit Divisor(float scale) : scale(scale), reciprocal(1.0f / scale) {}
  __device__ float operator()(float x) const {
    if (scale < 0x1p-60f) return x / scale;
    const float q = x * reciprocal;
    return fmaf(fmaf(-q, scale, x), reciprocal, q);
  }
};

// Two values, the first in the low byte.
__device__ inline unsigned short to_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return to_e4m3(low) | to_e4m3(high) << 8;
#endif
}
