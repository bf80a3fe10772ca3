// Stands in for csrc/cuda/wgmma.h in the emulator. A thread computes its own sums, reading the
// operands through their descriptors, and not before it waits for them. Accumulator places are
// written from the PTX ISA's figure of wgmma m64nNk16 D, not with index.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <deque>
#include <vector>

#include "emulator.h"

namespace cpo {

constexpr int kAccumulators = 128;

struct Products {
  std::deque<std::vector<std::function<void()>>> groups{1};
};
Products& products();  // of this fiber

inline void wgmma_fence() {}
inline void wgmma_commit() { products().groups.emplace_back(); }
template <int kPending>
inline void wgmma_wait() {
  auto& groups = products().groups;  // the last one is not committed
  while (groups.size() > kPending + 1) {
    for (const auto& product : groups.front()) product();
    groups.pop_front();
  }
  emu::shuffle_xor(0, 0);  // .sync: the warp goes on together
}
inline void pin(float (&)[kAccumulators]) {}

template <typename T>
float element(uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1) std::abort();  // 128-byte swizzle
  const uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  uint32_t at = start + row / 8 * stride + row % 8 * 128 + 2 * k;
  at ^= (at >> 7 & 7) << 4;
  return static_cast<float>(*reinterpret_cast<const T*>(emu::pointer(emu::peer(at, emu::rank()))));
}

template <typename T>
void wgmma(float (&acc)[kAccumulators], uint64_t a, uint64_t b, int accumulate) {
  float* const sums = acc;
  const int thread = static_cast<int>(threadIdx.x % 128), warp = thread / 32, lane = thread % 32;
  products().groups.back().push_back([=] {
    float left[2][16];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) left[half][k] = element<T>(a, 16 * warp + lane / 4 + 8 * half, k);
    }
    for (int column8 = 0; column8 < 32; ++column8) {
      for (int pair = 0; pair < 2; ++pair) {
        float right[16];
        for (int k = 0; k < 16; ++k) right[k] = element<T>(b, 8 * column8 + lane % 4 * 2 + pair, k);
        for (int half = 0; half < 2; ++half) {
          float& sum = sums[4 * column8 + 2 * half + pair];
          if (!accumulate) sum = 0;
          for (int k = 0; k < 16; ++k) sum += left[half][k] * right[k];
        }
      }
    }
  });
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

}  // namespace cpo
