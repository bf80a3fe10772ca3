// A CPU that behaves like a few GPU multiprocessors, slowly: enough of CUDA to run the very source
// of csrc/cuda.
//
// A CTA is an OS thread whose CUDA threads are fibers; the CTAs of a cluster run at the same time,
// clusters one after another. __shared__ variables are thread_local statics, so each CTA has its
// own at the same offset, as distributed shared memory needs. Everything asynchronous is as late as
// it may be: bulk copies happen at a random moment while somebody waits for a barrier, matrix
// products when they are waited for. A buffer that is released or read too early therefore gives
// wrong numbers, and a wrong phase a deadlock, which is reported. test_cuda_kernels.py translates
// launches and dynamic shared memory, the two things that are not C++.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __shared__
#define __shared__ static thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __global__
#define __global__
#undef __device__
#define __device__
#define CPO_CLUSTER_OF(size)
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#define threadIdx (emu::fiber().thread)
#define blockIdx (emu::fiber().block)
#define blockDim (emu::fiber().block_size)
#define gridDim (emu::fiber().grid)

namespace emu {

constexpr uint32_t kDynamicStart = 0x410;  // of dynamic shared memory: not a multiple of 1024

struct Fiber {
  uint3 thread, block;
  dim3 block_size, grid;
};
Fiber& fiber();
uint8_t* dynamic_shared();
void yield();

// Runs body() as every CUDA thread of a grid; `name` tells whether its CTAs come in clusters of
// two.
void launch(const std::function<void()>& body, const char* name, unsigned grid, unsigned block,
            size_t shared = 0, cudaStream_t stream = nullptr);

uint32_t shuffle_xor(uint32_t value, int step);

// Shared memory by its 32-bit address; a peer's has the peer's rank in the top byte.
uint32_t address(const void* pointer);
uint8_t* pointer(uint32_t address);
uint32_t rank();
uint32_t peer(uint32_t address, uint32_t rank);
void cluster_sync();

void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_arrive(uint32_t barrier);
void barrier_wait(uint32_t barrier, uint32_t parity);
void later(const std::function<void()>& copy);           // an asynchronous copy
void copied(uint32_t barrier, uint32_t bytes);           // counted by a barrier; inside a copy only
void read_box(uint32_t target, const CUtensorMap* map, int column, int row);

}  // namespace emu

void __syncthreads();
int __syncthreads_or(int predicate);
inline float __fdividef(float a, float b) { return a / b; }
inline void __syncwarp() { emu::shuffle_xor(0, 0); }
inline float __shfl_xor_sync(unsigned, float value, int step) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word = emu::shuffle_xor(word, step);
  std::memcpy(&value, &word, 4);
  return value;
}
inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int step) {
  return emu::shuffle_xor(value, step);
}
inline float __uint_as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
