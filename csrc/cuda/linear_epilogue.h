// The epilogue of the linear kernel: a logits tile in registers into sums, or E, or both.
#pragma once

#include <cuda_runtime.h>

#include "linear_lse.h"
#include "logp.h"
#include "values.h"
#include "wgmma.h"

namespace cpo {

constexpr int kGroup = 128;  // threads of a warpgroup

struct Job {
  LinearArgs args;
  LinearPlan plan;
  int k_tiles;
  float2* partials;     // [rows, splits] Partial of a split, without the label
  float* label_logits;  // [rows] raw logit of the label, written by the one thread that meets it
  int* redo;            // [row_pairs] 1: some row's offset is out of reach; null without E
};

// The outputs of a launch of linear_kernel.
enum class Make {
  kSums,      // log-probs only
  kSumsAndE,  // and E under the given offsets; clears the redo flags
  kRedoneE,   // E of the row pairs with a redo flag, under their LSE; does nothing without a flag
};

// Lane q of a quad holds word q of each of four 16-byte vectors; afterwards, vector q.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int q) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const QuadSwap swap = quad_swap(i);
    const bool upper = (q & swap.step) != 0;
    const uint32_t got =
        __shfl_xor_sync(0xFFFFFFFFu, upper ? word[swap.low] : word[swap.high], swap.step);
    if (upper) {
      word[swap.low] = got;
    } else {
      word[swap.high] = got;
    }
  }
}

// A consumer thread's two rows of a unit: register pairs 0, 1 of each four are row 0, pairs 2, 3
// row 1.
struct Rows {
  int row[2];
  int label[2];
  float offset[2];    // times log2(e); with E only
  float at_label[2];  // E at the label; of kRedoneE only
  Partial part[2];
};

// The accumulators of row h: one of these per pair of columns, in the order of the columns.
#define CPO_EACH_OF_ROW(i, h) int i = 2 * (h); i < kAccumulators; i += i % 2 == 0 ? 1 : 3

// Calls found(acc[i]) for the logit of the row's label. At most one tile of a row holds its label,
// and one of the four lanes that share the row. The branch keeps the 64 comparisons (registers
// cannot be indexed at run time) out of all other tiles.
template <typename Found>
__device__ __forceinline__ void at_label(float (&acc)[kAccumulators], int h, int local,
                                         const Found& found) {
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  if (local < 0 || local >= kTileN || local / 2 % 4 != thread % 4) return;
#pragma unroll
  for (CPO_EACH_OF_ROW(i, h)) {
    if (acc_column(thread, i) == local) found(acc[i]);
  }
}

// Stores acc times `factor` as row h of E.
__device__ __forceinline__ void store(const float (&acc)[kAccumulators], const Rows& rows, int h,
                                      float factor, const LinearArgs& args, int tile_column) {
  const int q = static_cast<int>(threadIdx.x) % 4;
  uint4* const line = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(args.exp) +
                                               offset_2d(rows.row[h], args.exp_stride, 0));
#pragma unroll
  for (int four = 0; four < kAccumulators / 16; ++four) {  // four vectors of eight columns
    uint32_t word[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int i = 4 * (4 * four + v) + 2 * h;
      word[v] = pack<__nv_bfloat16>(acc[i] * factor, acc[i + 1] * factor);
      if (rows.label[h] < 0) word[v] = 0;  // no gradient of an ignored row, whatever it holds
    }
    transpose_quad(word, q);
    const int vector = tile_column / kVec + 4 * four + q;
    if (rows.row[h] < args.rows && vector < row_vecs(args.vocab)) {
      line[vector] = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

// Takes one logits tile from the registers into the running sums, or E, or both.
template <Make kMake>
__device__ __forceinline__ void epilogue(float (&acc)[kAccumulators], Rows& rows, const Job& job,
                                         int tile, float c) {
  const LinearArgs& args = job.args;
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  const int tile_column = tile * kTileN;
  const bool ragged = tile_column + kTileN > args.vocab;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int local = rows.label[h] - tile_column;
    if constexpr (kMake != Make::kRedoneE) {
      at_label(acc, h, local, [&](float& logit) {
        job.label_logits[rows.row[h]] = logit;
        logit = -INFINITY;
      });
    }
    if (ragged) {
#pragma unroll
      for (CPO_EACH_OF_ROW(i, h)) {
        if (tile_column + acc_column(thread, i) >= args.vocab) acc[i] = -INFINITY;
      }
    }
    if constexpr (kMake == Make::kRedoneE) {
#pragma unroll
      for (CPO_EACH_OF_ROW(i, h)) acc[i] = exp2_fast(fmaf(acc[i], c, -rows.offset[h]));
      at_label(acc, h, local, [&](float& value) { value = rows.at_label[h]; });
      store(acc, rows, h, 1.0f, args, tile_column);
    } else {
      float highest[2] = {-INFINITY, -INFINITY};  // in two chains each: of odd and even columns
#pragma unroll
      for (CPO_EACH_OF_ROW(i, h)) highest[i % 2] = fmaxf(highest[i % 2], acc[i]);
      const float top = fmaxf(rows.part[h].top, fmaxf(highest[0], highest[1]) * c);
      float sums[2] = {0.0f, 0.0f};
#pragma unroll
      for (CPO_EACH_OF_ROW(i, h)) {
        acc[i] = exp2_fast(fmaf(acc[i], c, -top));
        sums[i % 2] += acc[i];
      }
      // Explicit fmaf: equal bits with and without E, whatever the compiler contracts.
      rows.part[h] = {top, fmaf(rows.part[h].sum, exp2_fast(rows.part[h].top - top),
                                sums[0] + sums[1])};
      if constexpr (kMake == Make::kSumsAndE) {
        // E from the terms of the sum, without a second exponential. What vanishes in a term,
        // 2^-126 below the highest logit so far, has no weight in the row either. Where the offset
        // is in reach the factor is finite, since `top` is not above the LSE, and 0 where nothing
        // was counted: no 0 x inf.
        const float factor = exp2_fast(top - rows.offset[h]);
        store(acc, rows, h, factor, args, tile_column);
      }
    }
  }
}
#undef CPO_EACH_OF_ROW

}  // namespace cpo
