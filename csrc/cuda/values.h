// 16-bit values in vectors of eight, and the fast exponential.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

}  // namespace cpo
