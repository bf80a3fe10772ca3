// p - onehot of a vocabulary block, transposed, for dW = (p - onehot)^T H. See amx.h.
#include <omp.h>

#include <cmath>

#include "amx.h"
#include "amx_tiles.h"

namespace cpo {
namespace {

// z [32 entries][32 tokens] = W H^T.
AMX_TARGET void product_tile(const uint16_t* w, int64_t stride, const uint16_t* h, int64_t D,
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

// Rows of z -> rows of out: p of 16 tokens, of which the first `tokens` are stored.
AMX_TARGET void probabilities(const float* z, int64_t rows, int64_t tokens, const float* lse, float scale,
                              uint16_t* out, int64_t stride) {
  __m512 slope = _mm512_set1_ps(kLog2e * scale), k = _mm512_load_ps(lse);
  __mmask16 here = __mmask16((1u << tokens) - 1);
  for (int64_t row = 0; row < rows; row++) {
    __m512 p = exp2_vector(_mm512_fmsub_ps(_mm512_load_ps(z + 32 * row), slope, k));
    _mm256_mask_storeu_epi16(out + row * stride, here, (__m256i)_mm512_cvtneps_pbh(p));
  }
}

uint16_t bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

int64_t amx_packed_size(int64_t n, int64_t D) { return round_up(n, 32) * round_up(D, 32); }

void amx_pack(const uint16_t* hidden, int64_t n, int64_t D, uint16_t* packed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < round_up(n, 32) / 16; group++)
    pack_hidden(hidden, n, D, round_up(D, 32), group, packed);
}

void amx_residual(const Residual& r) {
  int64_t D = round_up(r.D, 32);
#pragma omp parallel num_threads(r.threads)
  {
    unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);  // flush denormals
    configure_tiles();
    alignas(64) float z[32 * 32], lse[32];
    uint16_t* padded = r.padded + omp_get_thread_num() * 32 * D;
#pragma omp for schedule(dynamic, 4)
    for (int64_t entry = 0; entry < r.cols; entry += 32) {
      int64_t rows = r.cols - entry < 32 ? r.cols - entry : 32, stride = r.D;
      const uint16_t* w = r.weight + entry * r.D;
      if (rows < 32 || D != r.D) {
        std::memset(padded, 0, 32 * D * 2);
        for (int64_t row = 0; row < rows; row++)
          std::memcpy(padded + row * D, w + row * r.D, r.D * 2);
        w = padded, stride = D;
      }
      for (int64_t token = 0; token < r.n; token += 32) {
        int64_t tokens = r.n - token < 32 ? r.n - token : 32;
        product_tile(w, stride, r.packed + token * D, D, z);
        for (int64_t t = 0; t < 32; t++)
          lse[t] = t < tokens ? float(r.lse[token + t] * 1.4426950408889634) : 0;
        uint16_t* out = r.out + entry * r.n + token;
        probabilities(z, rows, tokens < 16 ? tokens : 16, lse, r.scale, out, r.n);
        if (tokens > 16)
          probabilities(z + 16, rows, tokens - 16, lse + 16, r.scale, out + 16, r.n);
        for (int64_t t = 0; t < tokens; t++) {
          int64_t row = r.labels[token + t] - r.first - entry;
          if (row >= 0 && row < rows) out[row * r.n + t] = bfloat16(float(-r.others[token + t]));
        }
      }
    }
    release_tiles();
    _mm_setcsr(mode);
  }
}

}  // namespace cpo
