// The tile products of the fused kernel by AMX. See tiles.h for the layouts.
#pragma once

#include "exponentials.h"

// GCC 12 reorders loads and stores across its tile intrinsics.
#define FENCE() __asm__ volatile("" ::: "memory")

namespace cpo {

struct Amx {
  FUSED_TARGET static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" ::"r"(&config) : "memory");  // GCC 12 assumes that only 8 bytes of it are read
    _tile_loadconfig(&config);
  }

  FUSED_TARGET static void end() { _tile_release(); }  // oneDNN expects released tiles

  // z [32 entries][32 tokens] = W H^T.
  FUSED_TARGET static void product(const uint16_t* w, int64_t stride, const uint16_t* h, int64_t D,
                               float* z) {
    const uint16_t *w1 = w + 16 * stride, *h1 = h + D / 32 * kTile;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    FENCE();
    for (int64_t s = 0; s < D / 32; s++) {
      _tile_loadd(4, w + 32 * s, stride * 2);
      _tile_loadd(6, h + kTile * s, 64);
      _tile_loadd(7, h1 + kTile * s, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, w1 + 32 * s, stride * 2);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    FENCE();
    _tile_stored(0, z, 128);
    _tile_stored(1, z + 16, 128);
    _tile_stored(2, z + 16 * 32, 128);
    _tile_stored(3, z + 16 * 32 + 16, 128);
    FENCE();
  }

  // z [32 entries][32 tokens] = W H^T, and, between the tile products, the exponentials of the previous tile:
  // vector units and tile unit work in parallel.
  template <Use USE>
  FUSED_TARGET static void product_and_exponentials(const uint16_t* w, int64_t stride, const uint16_t* h, int64_t D,
                              float* z, const Pending& before, Job& job, const char*& ahead) {
    int64_t steps = D / 32;
    const uint16_t *w1 = w + 16 * stride, *h1 = h + steps * kTile;
    Exponentials<USE> side(before, job);
    bool busy = before.side;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    FENCE();
    for (int64_t s = 0; s < steps; s++) {
      _tile_loadd(4, w + 32 * s, stride * 2);
      _tile_loadd(6, h + kTile * s, 64);
      _tile_loadd(7, h1 + kTile * s, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, w1 + 32 * s, stride * 2);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      _mm_prefetch(ahead, _MM_HINT_T1);
      _mm_prefetch(ahead + 64, _MM_HINT_T1);
      ahead += 128;
      if (busy && side.pair < 16) side.step();
    }
    FENCE();
    _tile_stored(0, z, 128);
    _tile_stored(1, z + 16, 128);
    _tile_stored(2, z + 16 * 32, 128);
    _tile_stored(3, z + 16 * 32 + 16, 128);
    FENCE();
    if (busy) side.finish();
  }

  // G^T += W^T E over the groups of a block; `fresh`: G is empty.
  FUSED_TARGET static void gradient(const Job& job, const uint16_t* wt, const uint16_t* e, int64_t groups, bool fresh,
                                 float* g) {
    int64_t columns = job.padded / 16;
    for (int64_t d = 0; d < job.D / 16; d += 2) {
      for (int64_t t = 0; t < columns; t += 2) {
        float *g0 = g + (d * columns + t) * 256, *g1 = g0 + columns * 256;
        FENCE();
        if (fresh) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          _tile_loadd(0, g0, 64);
          _tile_loadd(1, g0 + 256, 64);
          _tile_loadd(2, g1, 64);
          _tile_loadd(3, g1 + 256, 64);
        }
        const uint16_t *a = wt + d * kGroups * kTile, *b = e + t * kGroups * kTile;
        for (int64_t group = 0; group < groups; group++) {
          _tile_loadd(4, a + group * kTile, 64);
          _tile_loadd(6, b + group * kTile, 64);
          _tile_loadd(7, b + (kGroups + group) * kTile, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(5, a + (kGroups + group) * kTile, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, g0, 64);
        _tile_stored(1, g0 + 256, 64);
        _tile_stored(2, g1, 64);
        _tile_stored(3, g1 + 256, 64);
        FENCE();
      }
    }
  }
};

}  // namespace cpo
