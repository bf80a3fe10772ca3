// Thin wrappers of the PTX instructions that the Hopper kernels use: barriers, clusters, bulk
// copies. PTX ISA sections are named beside each group.
#pragma once

#include <cuda.h>

#include <cstdint>

// Cluster size of a kernel; older architectures compile the kernel too, with an empty body.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CPO_CLUSTER_OF(size) __cluster_dims__(size, 1, 1)
#else
#define CPO_CLUSTER_OF(size)
#endif

namespace cpo {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- clusters (barrier.cluster, mapa) ------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of both CTAs; what was written before it, in either CTA's shared memory, is seen
// after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same shared-memory variable in CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t peer_address(uint32_t address, uint32_t rank) {
  uint32_t peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
  return peer;
}

// Four floats into the peer's shared memory (16-byte aligned addresses of a CTA of the cluster);
// its barrier there counts 16 bytes when they have arrived.
__device__ __forceinline__ void send_peer(uint32_t peer, float x, float y, float z, float w,
                                          uint32_t peer_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(peer),
      "f"(x), "f"(y), "f"(z), "f"(w), "r"(peer_barrier)
      : "memory");
}

// --- mbarriers -----------------------------------------------------------------------------------
// Arrivals and waits keep their default scope, the CTA, with one exception. That is enough for what
// crosses CTAs: bulk copies, whose bytes the barrier itself counts, and releases of a buffer that
// was read by wgmma, which has completed. Cluster scope would cost a memory barrier and an L1
// invalidation in every step (seen in the SASS).

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the cluster and to the copy engine; a cluster_sync must
// follow before anything uses them.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile(
      "fence.mbarrier_init.release.cluster;\n\t"
      "fence.proxy.async.shared::cta;" ::: "memory");
}

// One arrival that also announces how many bytes of bulk copies complete this phase.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// One arrival at the same barrier in CTA `rank` of the cluster (which may be the own one).
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(
                   peer_address(shared_address(barrier), rank))
               : "memory");
}

// Waits until the phase of this parity is complete. On a fresh barrier parity 1 is complete
// already.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The same for what the peer sent with send_peer, which is ordered at cluster scope.
__device__ __forceinline__ void barrier_wait_peer(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --- bulk copies (cp.async.bulk) -----------------------------------------------------------------

// Orders this thread's view of shared memory before bulk copies that overwrite it.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// `bytes` (a multiple of 16) of global memory into this CTA's shared memory, counted by `barrier`.
__device__ __forceinline__ void copy_bulk(void* target, const void* source, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(target)),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// The box of `map` whose first column and row are given, into this CTA's shared memory.
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, int column, int row,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(target),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same into every CTA of `mask`, at the same place, counted by the barrier at the same place
// there.
__device__ __forceinline__ void copy_box_multicast(uint32_t target, const CUtensorMap* map, int column,
                                                   int row, uint64_t* barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(column), "r"(row), "r"(shared_address(barrier)),
      "h"(mask)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

}  // namespace cpo
