// The two small kernels around the row kernel: sums of log-probs per segment, and the backward's
// row scale.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "row_kernel.h"

namespace cpo {

// sums[s] = sum of logps[t] over the tokens t with segment_ids[t] == s, in float64, in a fixed
// order (the same bits from run to run, which atomics would not give); counts[s] = those with a
// label other than ignore_index.
struct SegmentArgs {
  const float* logps;          // [tokens]
  const int64_t* segment_ids;  // [tokens]; -1 belongs to none
  const int64_t* labels;       // [tokens]
  int64_t ignore_index;
  int tokens;
  int segments;
  double* sums;     // [segments]
  int64_t* counts;  // [segments]
};
void launch_segment_sums(const SegmentArgs& args, int device, cudaStream_t stream);

// out[t, :] = coefficients[t] * rows[t, :]; a coefficient of 0 gives zeros whatever the row holds.
struct ScaleArgs {
  const void* rows;           // [tokens, width] contiguous
  const float* coefficients;  // [tokens]
  void* out;                  // [tokens, width] contiguous; not `rows`
  int tokens;
  int width;  // a multiple of 8
};
void launch_row_scale(const ScaleArgs& args, Half type, int device, cudaStream_t stream);

}  // namespace cpo
