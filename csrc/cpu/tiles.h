// Shared by the fused kernels: layouts, packing, vector functions.
//
// A tile is 1 KiB. "Packed" operands are arrays of whole tiles, of full cache lines:
//   h   [token / 16][d / 32] tiles of [16 d-pairs][16 tokens][2]     right operand of Z^T = W H^T
//   e   [token / 16][entry / 32] tiles of [16 entry-pairs][16 tokens][2]  right operand of G^T += W^T E
//   wt  [d / 16][entry / 32] tiles of [16 d][32 entries]             left operand of G^T += W^T E
//   g   [d / 16][token / 16] tiles of [16 d][16 tokens] float32
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "rows.h"

// Includes AMX, so that one source serves both engines; compilers use AMX only through intrinsics.
#define FUSED_TARGET \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define FUSED_INLINE FUSED_TARGET inline __attribute__((always_inline))

namespace cpo {

constexpr int64_t kTile = 512;  // bfloat16 numbers per tile
constexpr float kLog2e = 1.44269504f;
constexpr float kNever = -1e30f;  // a masked logit

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// [n, D] -> right operand; zero beyond n and D. One group of 16 tokens.
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

FUSED_TARGET inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// 2^x, 0 on underflow; relative error 2e-7.
FUSED_TARGET inline __m512 exp2_vector(__m512 x) {
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

// tanh(x), with an absolute error of 2e-7, and its derivative, accurate also where tanh is near 1.
FUSED_TARGET inline __m512 tanh_vector(__m512 x, __m512* derivative) {
  x = _mm512_min_ps(_mm512_set1_ps(20), _mm512_max_ps(_mm512_set1_ps(-20), x));  // NaN passes
  __m512 e = exp2_vector(_mm512_mul_ps(x, _mm512_set1_ps(2 * kLog2e)));
  __m512 one = _mm512_set1_ps(1), above = _mm512_add_ps(e, one);
  if (derivative) {
    __m512 four = _mm512_set1_ps(4);
    *derivative = _mm512_div_ps(_mm512_mul_ps(four, e), _mm512_mul_ps(above, above));
  }
  return _mm512_div_ps(_mm512_sub_ps(e, one), above);
}

// z [32 entries][32 tokens], of which `rows` are entries first .. of the vocabulary, becomes the head's
// logits without `how.scale`; slopes, of the same shape: the soft cap's derivative, if requested.
FUSED_TARGET inline void transform_tile(const Transform& how, int64_t first, int64_t rows, float* z,
                                        float* slopes) {
  __m512 cap = _mm512_set1_ps(how.softcap), part = _mm512_set1_ps(1 / how.softcap);
  __m512 lowest = _mm512_set1_ps(kNever), slope;
  for (int64_t i = 0; i < 64 && i < 2 * rows; i++) {
    __m512 x = _mm512_load_ps(z + 16 * i);
    if (how.bias) x = _mm512_add_ps(x, _mm512_set1_ps(how.bias[first + i / 2]));
    x = _mm512_max_ps(lowest, x);  // a bias can be -Inf; NaN passes
    if (how.softcap > 0) {
      x = _mm512_mul_ps(tanh_vector(_mm512_mul_ps(x, part), slopes ? &slope : nullptr), cap);
      if (slopes) _mm512_store_ps(slopes + 16 * i, slope);
    }
    _mm512_store_ps(z + 16 * i, x);
  }
}

}  // namespace cpo
