// What the AMX kernels share: tile set-up, the packing of hidden states, exponentials.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define AMX_TARGET \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
// GCC 12 lets loads and stores pass its tile intrinsics.
#define FENCE() __asm__ volatile("" ::: "memory")

namespace cpo {

constexpr int64_t kTile = 512;  // bfloat16 numbers of a tile
constexpr float kLog2e = 1.44269504f;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

AMX_TARGET inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
  __asm__ volatile("" ::"r"(&config) : "memory");  // GCC 12 thinks that 8 bytes of it are read
  _tile_loadconfig(&config);
}

AMX_TARGET inline void release_tiles() { _tile_release(); }

// [n, D] -> right operand; what lies beyond n or D is zero. One group of 16 tokens.
inline void pack_hidden(const uint16_t* hidden, int64_t n, int64_t D, int64_t padded_D, int64_t group,
                 uint16_t* h) {
  uint16_t* tile = h + group * (padded_D / 32) * kTile;
  std::memset(tile, 0, padded_D / 32 * kTile * 2);
  for (int64_t t = 0; t < 16 && group * 16 + t < n; t++) {
    const uint16_t* row = hidden + (group * 16 + t) * D;
    for (int64_t d = 0; d < D; d++)
      tile[d / 32 * kTile + (d % 32) / 2 * 32 + t * 2 + d % 2] = row[d];
  }
}

// 2^x, 0 far below; relative error 2e-7.
AMX_TARGET inline __m512 exp2_vector(__m512 x) {
  __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.5403530393e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558146e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291076e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504108665e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022650696e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718056e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

}  // namespace cpo
