// From the sum over the others to the log-prob of the label; shared by the kernels and the CPU
// tests.
//
// The label's own term is left out of every sum of exponentials, so that
//   logp = -log1p(S_others / e_y) <= 0  and  1 - p_y = S_others / (S_others + e_y)
// keep their digits for confident tokens.
#pragma once

#include <cmath>

#include "index.h"

namespace cpo {

constexpr float kLog2e = 1.4426950408889634f;

// sum = sum over some columns of exp2((z - max) * c), c = log2(e) / temperature; empty: max -inf,
// sum 0.
struct Partial {
  float max;
  float sum;
};

CPO_HD Partial empty_partial() { return {-INFINITY, 0.0f}; }

// An empty partial has no maximum that could be subtracted; 0 serves, since all its terms are
// exp2(-inf).
CPO_HD float offset_of(float max) { return max == -INFINITY ? 0.0f : max; }

// Rounded before it is added: a fused multiply-add would make merge(a, b) differ from merge(b, a),
// and the lanes of a butterfly from one another.
CPO_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

CPO_HD Partial merge(Partial a, Partial b, float c) {
  const float max = fmaxf(a.max, b.max);
  const float from = offset_of(max);
  return {max, rounded_product(a.sum, exp2f((a.max - from) * c)) +
                   rounded_product(b.sum, exp2f((b.max - from) * c))};
}

struct RowResult {
  float logp;    // 0 where the label is ignored
  float lse;     // of all columns, natural units, after the temperature
  float others;  // 1 - p_y
  float factor;  // p_v = exp2((z_v - max) * c) * factor
};

CPO_HD RowResult finish_row(Partial part, float label_logit, bool has_label,
                            float inv_temperature) {
  if (!has_label) {
    const float lse = part.max * inv_temperature + logf(part.sum);
    return {0.0f, lse, 0.0f, 1.0f / part.sum};
  }
  // d = log(S_others / e_y); -inf where the label is the only column that counts
  const float d = (part.max - label_logit) * inv_temperature + logf(part.sum);
  const float softplus = d > 0.0f ? d + log1pf(expf(-d)) : log1pf(expf(d));
  const float others = 1.0f / (1.0f + expf(-d));
  return {-softplus, label_logit * inv_temperature + softplus, others,
          part.sum > 0.0f ? others / part.sum : 0.0f};
}

}  // namespace cpo
