// Per-thread work of the row kernel on its vectors: logits, sums of exponentials, gradients.
#pragma once

#include "logp.h"
#include "row_kernel.h"
#include "values.h"

namespace cpo {

// t = tanh(x / cap) and cap t, each to a few ulp, and the derivative of cap t. 1 - t^2 would lose
// the derivative's digits where the cap is reached.
__device__ __forceinline__ float soft_cap(float x, float cap, float inverse, float* slope) {
  x *= inverse;
  const float e = expf(-2.0f * fabsf(x));
  const float r = __fdividef(1.0f, 1.0f + e);
  *slope = 4.0f * e * r * r;
  // Near zero 1 - e cancels; the Taylor series has a relative error of 1e-8 below 0.25.
  const float q = x * x;
  const float series =
      fmaf(q, fmaf(q, fmaf(q, fmaf(q, 62.0f / 2835, -17.0f / 315), 2.0f / 15), -1.0f / 3), 1.0f);
  return cap * (q < 0.0625f ? x * series : copysignf((1.0f - e) * r, x));
}

// How raw values become logits, before the temperature; kTransform: with a bias or a soft cap.
template <typename T, bool kTransform>
struct Head {
  const float* bias;
  float softcap;
  float inverse;  // 1 / softcap
  int vocab;

  __device__ __forceinline__ explicit Head(const RowArgs& args)
      : bias(args.bias),
        softcap(args.softcap),
        inverse(args.softcap > 0.0f ? 1.0f / args.softcap : 0.0f),
        vocab(args.vocab) {}

  // Columns column .. column + 7, the first a multiple of 8; without kWhole some of them may lie
  // beyond the vocabulary, where values are unspecified. Slopes are 1 without kTransform.
  template <bool kWhole>
  __device__ __forceinline__ void logits(const uint4& vector, int column, float (&z)[kVec],
                                         float (&slope)[kVec]) const {
    unpack8<T>(vector, z);
#pragma unroll
    for (int i = 0; i < kVec; ++i) slope[i] = 1.0f;
    if constexpr (kTransform) {
      if (bias != nullptr) {
        if constexpr (kWhole) {
          const float4 low = reinterpret_cast<const float4*>(bias + column)[0];
          const float4 high = reinterpret_cast<const float4*>(bias + column)[1];
          const float b[kVec] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int i = 0; i < kVec; ++i) z[i] += b[i];
        } else {
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            if (column + i < vocab) z[i] += bias[column + i];
          }
        }
      }
      if (softcap > 0.0f) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) z[i] = soft_cap(z[i], softcap, inverse, &slope[i]);
      }
    }
  }
};

// State of a thread in the first pass over its vectors of a row.
template <typename T, bool kTransform>
struct Scan {
  const Head<T, kTransform>& head;
  float c;       // Scaling::c
  Partial part;  // at first empty

  // Branch-free, without waiting for the maximum: each call rescales the sum, mostly by 1.
  template <int kCount>
  __device__ __forceinline__ void add(float (&z)[kCount], float highest) {
    const float top = fmaxf(part.top, highest * c);
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = exp2_fast(fmaf(z[i], c, -top));
    // The new terms first, then the running sum: a long sum of small terms drifts.
    part.sum = fmaf(part.sum, exp2_fast(part.top - top), sum_of(z));
    part.top = top;
  }

  // Whole vectors without the label; their columns start at `column` and are `step` apart.
  template <int kCount>
  __device__ __forceinline__ void add_whole(const uint4 (&vectors)[kCount], int column, int step) {
    float z[kCount * kVec];
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      float one[kVec], slope[kVec];
      head.template logits<true>(vectors[v], column + v * step, one, slope);
#pragma unroll
      for (int i = 0; i < kVec; ++i) z[v * kVec + i] = one[i];
    }
    float highest;
    if constexpr (kTransform) {
      float copy[kCount * kVec];
#pragma unroll
      for (int i = 0; i < kCount * kVec; ++i) copy[i] = z[i];
      highest = highest_of(copy);
    } else {
      highest = highest_of<T>(vectors);
    }
    add(z, highest);
  }

  // Any vector. The sum excludes the label; the thread that holds it stores its logit and slope.
  __device__ __forceinline__ void add_masked(const uint4& vector, int column, int label,
                                             float* label_logit, float* label_slope) {
    float z[kVec], slope[kVec], copy[kVec];
    head.template logits<false>(vector, column, z, slope);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (column + i == label) {
        *label_logit = z[i];
        *label_slope = slope[i];
      }
      if (column + i == label || column + i >= head.vocab) z[i] = -INFINITY;
      copy[i] = z[i];
    }
    add(z, highest_of(copy));
  }
};

// -p_v times the derivatives of temperature and soft-capping: d logp / d logits except at the
// label. `multiplier` is -factor / temperature.
template <typename T, bool kTransform, bool kWhole>
__device__ __forceinline__ uint4 gradient(const Head<T, kTransform>& head, const uint4& vector,
                                          int column, float c, float top, float multiplier) {
  float z[kVec], slope[kVec];
  head.template logits<kWhole>(vector, column, z, slope);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    z[i] = exp2_fast(fmaf(z[i], c, -top)) * multiplier;
    if constexpr (kTransform) z[i] *= slope[i];
    if (!kWhole && column + i >= head.vocab) z[i] = 0.0f;
  }
  return pack8<T>(z);
}

// A compile-time number of rounds.
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// The rounds of a share: batch(round, Count<n>) for n whole rounds without the label, and
// masked(round) for the label's round and those that are not whole. All threads of a CTA take the
// same path, so that neither the label nor the end of the row costs anything per vector.
template <int kBatch, typename Batch, typename Masked>
__device__ __forceinline__ void for_rounds(const RowRounds& rounds, int label_round,
                                           const Batch& batch, const Masked& masked) {
  int round = 0;
  while (true) {
    const int end =
        round <= label_round && label_round < rounds.whole ? label_round : rounds.whole;
    for (; round + kBatch <= end; round += kBatch) batch(round, Count<kBatch>());
    for (; round < end; ++round) batch(round, Count<1>());
    if (round >= rounds.all) break;
    masked(round);
    ++round;
  }
}

}  // namespace cpo
