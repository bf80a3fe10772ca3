// The tile products of the fused kernel by vdpbf16ps (AVX512-BF16). See tiles.h for the layouts.
//
// A step loads a pair of bfloat16 numbers of 8 rows of the left operand, each broadcast, and the same pair
// of 32 columns of the right one: 16 independent vdpbf16ps on 10 loads. This saturates the multipliers;
// compared with the vendor's GEMM, the time of packing is saved.
#pragma once

#include "exponentials.h"

namespace cpo {

struct Avx512Bf16 {
  FUSED_TARGET static void begin() {}
  FUSED_TARGET static void end() {}

  // out [8][32] = a [8][32 * steps] b. Of a, rows are `stride` and blocks of 32 columns `step` apart; b is
  // two halves of 16 columns. A separate function that stores only at its end: with more code around the
  // loop GCC 12 keeps one of the sums in memory, which halves the speed.
  FUSED_TARGET __attribute__((noinline)) static void rows8(const uint16_t* a, int64_t stride,
                                                           int64_t step, const uint16_t* b0,
                                                           const uint16_t* b1, int64_t steps,
                                                           float* out) {
    __m512 sum[8][2];
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 4
      for (int pair = 0; pair < 16; pair++) {
        __m512bh left = (__m512bh)_mm512_load_si512(b0 + s * kTile + 32 * pair);
        __m512bh right = (__m512bh)_mm512_load_si512(b1 + s * kTile + 32 * pair);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
          int32_t both;
          std::memcpy(&both, a + r * stride + s * step + 2 * pair, 4);
          __m512bh w = (__m512bh)_mm512_set1_epi32(both);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], w, left);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], w, right);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      _mm512_store_ps(out + 32 * r, sum[r][0]);
      _mm512_store_ps(out + 32 * r + 16, sum[r][1]);
    }
  }

  // z [32 entries][32 tokens] = W H^T.
  FUSED_TARGET static void product(const uint16_t* w, int64_t stride, const uint16_t* h, int64_t D,
                                   float* z) {
    int64_t steps = D / 32;
    for (int r = 0; r < 32; r += 8)
      rows8(w + r * stride, stride, 32, h, h + steps * kTile, steps, z + 32 * r);
  }

  // The same, and the exponentials of the previous tile.
  template <Use USE>
  FUSED_TARGET static void product_and_exponentials(const uint16_t* w, int64_t stride,
                                                    const uint16_t* h, int64_t D, float* z,
                                                    const Pending& before, Job& job,
                                                    const char*& ahead) {
    product(w, stride, h, D, z);
    for (int64_t line = 0; line < 2 * (D / 32); line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    if (before.side) Exponentials<USE>(before, job).finish();
  }

  // G^T += W^T E over the groups of a block; `fresh`: G is empty.
  FUSED_TARGET static void gradient(const Job& job, const uint16_t* wt, const uint16_t* e,
                                    int64_t groups, bool fresh, float* g) {
    int64_t columns = job.padded / 16;
    alignas(64) float part[16 * 32];
    for (int64_t t = 0; t < columns; t += 2) {  // E of 32 tokens stays in L1
      for (int64_t d = 0; d < job.D / 16; d++) {
        const uint16_t *a = wt + d * kGroups * kTile, *b = e + t * kGroups * kTile;
        float* to = g + (d * columns + t) * 256;  // two tiles
        for (int line = 0; line < 32 && !fresh; line++) _mm_prefetch(to + 16 * line, _MM_HINT_T0);
        for (int r = 0; r < 16; r += 8)
          rows8(a + 32 * r, 32, kTile, b, b + kGroups * kTile, groups, part + 32 * r);
        for (int i = 0; i < 32; i++) {
          float* at = to + i / 2 * 16 + i % 2 * 256;
          __m512 sum = _mm512_load_ps(part + 16 * i);
          _mm512_store_ps(at, fresh ? sum : _mm512_add_ps(_mm512_load_ps(at), sum));
        }
      }
    }
  }
};

}  // namespace cpo
