// Choice of the ISA, and the work of the row kernels on a few numbers per row.
#include "rows.h"

#include <cmath>
#include <cstring>

namespace cpo {

const Isa* choose(const char* name) {
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (*name == 0) return avx512 ? &kAvx512 : avx2 ? &kAvx2 : &kPortable;
  if (!std::strcmp(name, kAvx512.name)) return avx512 ? &kAvx512 : nullptr;
  if (!std::strcmp(name, kAvx2.name)) return avx2 ? &kAvx2 : nullptr;
  return std::strcmp(name, kPortable.name) ? nullptr : &kPortable;
}

namespace {

float to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float weight_at(const void* weight, Type type, int64_t i) {
  if (type == Type::f32) return static_cast<const float*>(weight)[i];
  uint32_t half = static_cast<const uint16_t*>(weight)[i];
  if (type == Type::bf16) return to_float(half << 16);
  uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude < 0x400) return std::copysign(std::ldexp(float(magnitude), -24), to_float(sign));
  uint32_t exponent = magnitude >= 0x7c00 ? 0x7f800000 : ((magnitude >> 10) + 112) << 23;
  return to_float(sign | exponent | (magnitude & 0x3ff) << 13);
}

}  // namespace

void finish(const State& state, float scale, const int64_t* labels, const int64_t* index,
            int64_t rows, float* logps, double* lse, double* others, double* slope, float* grad,
            const void* weight, Type type, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    // With d = label's logit - offset, total = sum + e^d: each branch is exact where the other overflows.
    double d = state.label[r] - state.k[r], sum = state.sum[r], other, per_e;
    int64_t at = index[r];
    if (d > 0) {
      double small = std::exp(-d);  // relative to the label, to avoid overflow
      logps[at] = float(-std::log1p(sum * small));
      lse[at] = state.label[r] + std::log1p(sum * small);
      other = sum * small / (1 + sum * small);
      per_e = small / (1 + sum * small);
    } else {
      double total = sum + std::exp(d);
      logps[at] = float(std::fmin(d - std::log(total), 0.0));
      if (std::isnan(d) || std::isnan(sum)) logps[at] = NAN;
      lse[at] = state.k[r] + std::log(total);
      other = sum / total;
      per_e = 1 / total;
    }
    others[at] = other;
    slope[at] = state.slope[r];
    if (!grad) continue;
    float* g = grad + at * width;
    float of_label = float(other * state.slope[r] * scale), of_sum = float(per_e * scale);
    for (int64_t i = 0; i < width; i++)
      g[i] = of_label * weight_at(weight, type, labels[r] * width + i) - of_sum * g[i];
  }
}

}  // namespace cpo
