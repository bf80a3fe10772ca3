// 16-bit values in vectors of eight, and the fast exponential.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "index.h"

namespace cpo {

__device__ __forceinline__ float exp2_fast(float x) {  // 2 ulp; results below 2^-126 are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The larger of each half of two words; a NaN counts as missing, as in fmaxf.
template <typename T>
__device__ __forceinline__ uint32_t max2(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t larger;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  }
  return larger;
#else
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return pack<T>(fmaxf(x.x, y.x), fmaxf(x.y, y.y));
#endif
}

template <typename T>
__device__ __forceinline__ void unpack8(const uint4& vector, float (&values)[kVec]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack<T>(words[i]);
    values[2 * i] = two.x;
    values[2 * i + 1] = two.y;
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack8(const float (&values)[kVec]) {
  return {pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
          pack<T>(values[4], values[5]), pack<T>(values[6], values[7])};
}

// Trees, not chains: terms of like size, and few steps that wait for one another. They overwrite
// what they reduce. Recursive, so that every index is a constant and nothing leaves the registers.
template <int kCount, typename Value, typename Operation>
__device__ __forceinline__ Value tree(Value* values, const Operation& operation) {
  if constexpr (kCount > 1) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      values[i] = operation(values[i], values[i + kCount / 2]);
    }
    return tree<kCount / 2>(values, operation);
  }
  return values[0];
}

template <int kCount>
__device__ __forceinline__ float sum_of(float (&values)[kCount]) {
  return tree<kCount>(values, [](float a, float b) { return a + b; });
}

// A NaN counts as missing, as in fmaxf.
template <int kCount>
__device__ __forceinline__ float highest_of(float (&values)[kCount]) {
  return tree<kCount>(values, [](float a, float b) { return fmaxf(a, b); });
}

// Of the values in vectors, by 16-bit pairs: half the comparisons of float32.
template <typename T, int kCount>
__device__ __forceinline__ float highest_of(const uint4 (&vectors)[kCount]) {
  uint32_t words[4 * kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    words[4 * i] = vectors[i].x;
    words[4 * i + 1] = vectors[i].y;
    words[4 * i + 2] = vectors[i].z;
    words[4 * i + 3] = vectors[i].w;
  }
  const float2 two = unpack<T>(
      tree<4 * kCount>(words, [](uint32_t a, uint32_t b) { return max2<T>(a, b); }));
  return fmaxf(two.x, two.y);
}

}  // namespace cpo
