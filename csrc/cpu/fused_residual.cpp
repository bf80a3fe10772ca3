// p - onehot of a vocabulary block, transposed, for dW = (p - onehot)^T H. See fused.h.
#include <omp.h>

#include "engine_amx.h"
#include "engine_avx512.h"

namespace cpo {
namespace {

// Rows of z -> rows of out: p of 16 tokens, of which the first `tokens` are stored.
FUSED_TARGET void probabilities(const float* z, const float* slopes, int64_t rows, int64_t tokens,
                                const float* lse, float scale, uint16_t* out, int64_t stride) {
  __m512 slope = _mm512_set1_ps(kLog2e * scale), k = _mm512_load_ps(lse);
  __mmask16 here = __mmask16((1u << tokens) - 1);
  for (int64_t row = 0; row < rows; row++) {
    __m512 p = exp2_vector(_mm512_fmsub_ps(_mm512_load_ps(z + 32 * row), slope, k));
    if (slopes) p = _mm512_mul_ps(p, _mm512_load_ps(slopes + 32 * row));
    _mm256_mask_storeu_epi16(out + row * stride, here, (__m256i)_mm512_cvtneps_pbh(p));
  }
}

template <class Engine>
void residual_with(const Residual& r) {
  int64_t D = round_up(r.D, 32);
#pragma omp parallel num_threads(r.threads)
  {
    unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);  // flush denormals
    Engine::begin();
    alignas(64) float z[2 * 32 * 32], lse[32];
    float* slopes = r.how.softcap > 0 ? z + 1024 : nullptr;
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
        Engine::product(w, stride, r.packed + token * D, D, z);
        if (r.how.bias || slopes) transform_tile(r.how, r.first + entry, rows, z, slopes);
        for (int64_t t = 0; t < 32; t++)
          lse[t] = t < tokens ? float(r.lse[token + t] * 1.4426950408889634) : 0;
        uint16_t* out = r.out + entry * r.n + token;
        probabilities(z, slopes, rows, tokens < 16 ? tokens : 16, lse, r.how.scale, out, r.n);
        if (tokens > 16)
          probabilities(z + 16, slopes ? slopes + 16 : nullptr, rows, tokens - 16, lse + 16,
                        r.how.scale, out + 16, r.n);
        for (int64_t t = 0; t < tokens; t++) {
          int64_t row = r.labels[token + t] - r.first - entry;
          if (row >= 0 && row < rows) 
            out[row * r.n + t] = bfloat16(float(-r.others[token + t] * r.slope[token + t]));
        }
      }
    }
    Engine::end();
    _mm_setcsr(mode);
  }
}

}  // namespace

int64_t fused_packed_size(int64_t n, int64_t D) { return round_up(n, 32) * round_up(D, 32); }

void fused_pack(const uint16_t* hidden, int64_t n, int64_t D, uint16_t* packed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < round_up(n, 32) / 16; group++)
    pack_hidden(hidden, n, D, round_up(D, 32), group, packed);
}

void fused_residual(Engine engine, const Residual& residual) {
  engine == Engine::amx ? residual_with<Amx>(residual) : residual_with<Avx512Bf16>(residual);
}

}  // namespace cpo
