// From the sum over the others to the log-prob of the label; shared by the kernels and the CPU
// tests.
//
// The label's own term is left out of every sum of exponentials, so that
//   logp = -log1p(S_others / e_y) <= 0  and  1 - p_y = S_others / (S_others + e_y)
// keep their digits for confident tokens.
//
// Exponents are in powers of two: exp2(z c - top), one fused multiply-add per logit, with
// c = log2(e) / temperature and top the rounded product max(z) c. The rounding of `top` cancels,
// because the label's exponent is formed with the same `top`.
#pragma once

#include <cmath>

#include "index.h"

namespace cpo {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// sum = sum over some columns of exp2(z c - top)
struct Partial {
  float top;
  float sum;
};

// From logits to exponents: z c is in powers of two, and z c natural = z inverse.
struct Scaling {
  float c;
  float natural;
  float inverse;  // 1 / temperature
  float lowest;   // the top of an empty sum; finite, so that top - top is 0
  float highest;  // from here on sums may overflow
};

// Beyond 2^30 the rounding error of the product z c is too large for exp2.
CPO_HD Scaling scaling(float temperature) {
  return {kLog2e / temperature, kLn2, 1.0f / temperature, -1073741824.0f, 1073741824.0f};
}

// For rows whose logits are all below `lowest`, or some above `highest`. Two float32 numbers of
// that size are so far apart that the lower one has no weight, under c as under any larger factor.
// With a power of two products are exact; under the second one, 1/2, nothing overflows.
constexpr int kRescues = 2;
CPO_HD Scaling rescue_scaling(float temperature, int rescue) {
  int exponent;
  frexpf(kLog2e / temperature, &exponent);
  const float c = rescue == 1 ? ldexpf(1.0f, exponent) : 0.5f;
  const float inverse = 1.0f / temperature;
  return {c, inverse / c, inverse, -3e38f, INFINITY};
}

CPO_HD Partial empty_partial(Scaling scaling) { return {scaling.lowest, 0.0f}; }

CPO_HD bool counted(Partial part, Scaling scaling) {
  return part.top > scaling.lowest && part.top < scaling.highest;
}

// Rounded before it is added: a fused multiply-add would make merge(a, b) differ from merge(b, a),
// and the lanes of a butterfly from one another.
CPO_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

CPO_HD Partial merge(Partial a, Partial b) {
  const float top = fmaxf(a.top, b.top);
  return {top, rounded_product(a.sum, exp2f(a.top - top)) +
                   rounded_product(b.sum, exp2f(b.top - top))};
}

struct RowResult {
  float logp;    // 0 where the label is ignored
  float lse;     // of all columns, natural units, after the temperature
  float others;  // 1 - p_y
  float factor;  // p_v = exp2(z_v c - top) factor; 0 where the label is ignored
};

CPO_HD RowResult finish_row(Partial part, float label_logit, bool has_label, Scaling scaling) {
  const float others_lse = part.top * scaling.natural + logf(part.sum);
  if (!has_label) return {0.0f, others_lse, 0.0f, 0.0f};
  // The label's exponent over `top`. Halves, which are exact, keep it finite where it has a value.
  const float over = fmaf(label_logit, 0.5f * scaling.c, -0.5f * part.top) * (2.0f * scaling.natural);
  // d = log(S_others / e_y); -inf where the label is the only column that counts
  float d = logf(part.sum) - over;
  // NaN on overflow: an infinite label, sums beyond their range, or nothing counted and a
  // label equally low.
  const bool uncounted = part.sum == 0.0f && label_logit * scaling.c <= scaling.lowest;
  if (label_logit == INFINITY || part.top >= scaling.highest || uncounted) d = NAN;
  const float rest = log1pf(expf(-fabsf(d)));
  const float softplus = d > 0.0f ? d + rest : rest;
  const float others = 1.0f / (1.0f + expf(-d));
  // From the others where the label is so far below them that it may be infinite.
  const float lse = d > 64.0f ? others_lse : label_logit * scaling.inverse + softplus;
  return {-softplus, lse, others, part.sum > 0.0f ? others / part.sum : 0.0f};
}

}  // namespace cpo
