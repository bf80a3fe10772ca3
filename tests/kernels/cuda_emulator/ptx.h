// Stands in for csrc/cuda/ptx.h in the emulator: the same names, each doing what its instruction is
// documented to do.
#pragma once

#include "emulator.h"

namespace cpo {

inline uint32_t shared_address(const void* pointer) { return emu::address(pointer); }
inline uint32_t cluster_rank() { return emu::rank(); }
inline void cluster_sync() { emu::cluster_sync(); }
inline uint32_t peer_address(uint32_t address, uint32_t rank) { return emu::peer(address, rank); }

inline void send_peer(uint32_t peer, float x, float y, float z, float w, uint32_t peer_barrier) {
  emu::later([=] {
    const float values[4] = {x, y, z, w};
    std::memcpy(emu::pointer(peer), values, 16);
    emu::copied(peer_barrier, 16);
  });
}

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  emu::barrier_init(emu::address(barrier), arrivals);
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emu::barrier_expect(emu::address(barrier), bytes);
}
inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  emu::barrier_arrive(emu::peer(emu::address(barrier), rank));
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emu::barrier_wait(emu::address(barrier), parity);
}
inline void barrier_wait_peer(uint64_t* barrier, uint32_t parity) { barrier_wait(barrier, parity); }

inline void async_proxy_fence() {}

inline void copy_bulk(void* target, const void* source, uint32_t bytes, uint64_t* barrier) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(source) % 16) std::abort();
  const uint32_t to = emu::address(target), count = emu::address(barrier);
  emu::later([=] {
    std::memcpy(emu::pointer(to), source, bytes);
    emu::copied(count, bytes);
  });
}

inline void copy_box_multicast(uint32_t target, const CUtensorMap* map, int column, int row,
                               uint64_t* barrier, uint16_t mask) {
  const uint32_t count = emu::address(barrier);
  for (uint32_t rank = 0; rank < 2; ++rank) {
    if (!(mask >> rank & 1)) continue;
    const uint32_t to = emu::peer(target, rank), there = emu::peer(count, rank);
    emu::later([=] {
      emu::read_box(to, map, column, row);
      emu::copied(there, 128 * 128);
    });
  }
}
inline void copy_box(uint32_t target, const CUtensorMap* map, int column, int row,
                     uint64_t* barrier) {
  copy_box_multicast(target, map, column, row, barrier, uint16_t(1) << emu::rank());
}
inline void prefetch_map(const CUtensorMap*) {}

}  // namespace cpo
