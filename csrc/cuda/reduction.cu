#include "reduction.h"

#include <algorithm>

#include "launch.h"
#include "values.h"

namespace cpo {
namespace {

constexpr int kThreads = 256;

// One CTA per segment reads all tokens. That is S x T reads of ids, which stay in L2: less than
// a launch costs for tens of segments, and no order of tokens has to be assumed.
__global__ void __launch_bounds__(kThreads) segment_sums(const SegmentArgs args) {
  __shared__ double sums[kThreads];
  __shared__ int counts[kThreads];
  const int segment = blockIdx.x;
  double sum = 0.0;
  int count = 0;
  for (int t = threadIdx.x; t < args.tokens; t += kThreads) {
    if (args.segment_ids[t] == segment) {
      sum += static_cast<double>(args.logps[t]);
      count += args.labels[t] != args.ignore_index;
    }
  }
  sums[threadIdx.x] = sum;
  counts[threadIdx.x] = count;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) {
      sums[threadIdx.x] += sums[threadIdx.x + step];
      counts[threadIdx.x] += counts[threadIdx.x + step];
    }
    __syncthreads();  // a level is complete before the next one reads it
  }
  if (threadIdx.x == 0) {
    args.sums[segment] = sums[0];
    args.counts[segment] = counts[0];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) row_scale(const ScaleArgs args) {
  const int vecs = args.width / kVec;
  for (int row = blockIdx.x; row < args.tokens; row += gridDim.x) {
    const float coefficient = args.coefficients[row];
    const int64_t first = offset_2d(row, vecs, 0);
    const uint4* in = static_cast<const uint4*>(args.rows) + first;
    uint4* out = static_cast<uint4*>(args.out) + first;
    for (int i = threadIdx.x; i < vecs; i += kThreads) {
      float values[kVec];
      unpack8<T>(in[i], values);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        values[j] = coefficient == 0.0f ? 0.0f : values[j] * coefficient;
      }
      out[i] = pack8<T>(values);
    }
  }
}

}  // namespace

void launch_segment_sums(const SegmentArgs& args, int device, cudaStream_t stream) {
  if (args.segments == 0) return;
  const OnDevice current(device);
  segment_sums<<<args.segments, kThreads, 0, stream>>>(args);
  check(cudaGetLastError(), "segment sums");
}

void launch_row_scale(const ScaleArgs& args, Half type, int device, cudaStream_t stream) {
  if (args.tokens == 0) return;
  const OnDevice current(device);
  const int blocks = std::min(args.tokens, 8 * attribute(cudaDevAttrMultiProcessorCount, device));
  if (type == Half::bfloat16) {
    row_scale<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    row_scale<__half><<<blocks, kThreads, 0, stream>>>(args);
  }
  check(cudaGetLastError(), "row scale");
}

}  // namespace cpo
