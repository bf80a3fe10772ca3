#include "linear_lse.h"

#include <cudaTypedefs.h>

#include <algorithm>

#include "launch.h"
#include "linear_epilogue.h"
#include "logp.h"
#include "ptx.h"
#include "values.h"
#include "wgmma.h"

#pragma nv_diag_suppress 177  // what only Hopper code uses looks unused in the sm_80 pass

namespace cpo {
namespace {

constexpr int kConsumers = kTileM / 64;              // warpgroups that multiply, 64 rows each
constexpr int kThreads = kGroup * (1 + kConsumers);  // warpgroup 0 loads
constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // 1024 to align the tiles
constexpr int kReleases = kCluster * kConsumers * kGroup / 32;  // one per consumer warp
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

template <Make kMake>
__device__ __forceinline__ bool skipped(const Job& job, const LinearUnit& unit) {
  if constexpr (kMake != Make::kRedoneE) return false;
  return job.redo[unit.row_pair] == 0;  // the same answer in a whole cluster
}

__device__ __forceinline__ int label_of(const LinearArgs& args, int row) {
  if (row >= args.rows) return -1;
  const int64_t label = args.labels[row];
  return label >= 0 && label < args.vocab ? static_cast<int>(label) : -1;
}

// Persistent clusters of two CTAs. CTA r of a cluster multiplies row tile 2 * row_pair + r with
// every vocabulary tile of the unit; both need the same W tile, so each loads half of it into both.
//
// A stage (ring of kStages) holds an H tile and a W tile. Its two barriers in each CTA:
//   full   1 arrival (this CTA's producer, which announces kStageBytes) and the bytes themselves:
//          the H tile, the own half of W and the peer's half. The peer's bytes may come before the
//          announcement; the phase stays open until the arrival.
//   empty  kReleases arrivals: the consumer warps of *both* CTAs, because both producers write here
//          and a producer may write its half into both CTAs only when both are done with it.
// Stage and phase advance in the same way in all roles: the n-th use of a stage is phase n of its
// barriers, parity n & 1. A producer waits for the release of use n - 1, parity (n - 1) & 1, which
// a fresh barrier passes.
template <typename T, Make kMake>
__global__ void CPO_CLUSTER_OF(kCluster) __launch_bounds__(kThreads, 1)
    linear_kernel(const __grid_constant__ CUtensorMap map_h,
                  const __grid_constant__ CUtensorMap map_w, const __grid_constant__ Job job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ __align__(8) uint64_t full[kStages];
  __shared__ __align__(8) uint64_t empty[kStages];
  const uint32_t tiles = (shared_address(dynamic_shared) + 1023) / 1024 * 1024;
  const LinearArgs& args = job.args;
  const int group = static_cast<int>(threadIdx.x) / kGroup;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = static_cast<int>(cluster_rank());
  const int64_t cluster = blockIdx.x / kCluster;
  const int64_t clusters = gridDim.x / kCluster;

  if constexpr (kMake == Make::kRedoneE) {
    // Mostly there is nothing to do: a look at all flags at once, a few microseconds, instead of one
    // per unit. Both CTAs of a cluster see the same flags, and nobody else waits for either.
    bool any = false;
    for (int pair = static_cast<int>(threadIdx.x); pair < job.plan.row_pairs; pair += kThreads) {
      any |= job.redo[pair] != 0;
    }
    if (!__syncthreads_or(any)) return;
  }

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], kReleases);
    }
    barrier_init_fence();
  }
  cluster_sync();  // no copy and no release may reach a CTA whose barriers are not initialised

  int stage = 0;
  uint32_t phase = 0;
  const auto advance = [&] {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  };

  if (group == 0) {  // producer: one thread issues all copies
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      prefetch_map(&map_h);
      prefetch_map(&map_w);
      for (int64_t u = cluster; u < job.plan.units; u += clusters) {
        const LinearUnit unit = linear_unit(job.plan, u);
        if (skipped<kMake>(job, unit)) continue;
        const int64_t row_tile = static_cast<int64_t>(unit.row_pair) * kCluster + rank;
        const int row_h = box_row(row_tile * kTileM, args.rows);
        for (int tile = unit.first_tile; tile < unit.end_tile; ++tile) {
          const int64_t column = static_cast<int64_t>(tile) * kTileN + rank * kHalfN;
          const int row_w = box_row(column, args.vocab);
          for (int k = 0; k < job.k_tiles; ++k) {
            barrier_wait(&empty[stage], phase ^ 1);
            barrier_expect(&full[stage], kStageBytes);
            const uint32_t target = tiles + stage * kStageBytes;
            copy_box(target, &map_h, k * kTileK, row_h, &full[stage]);
            copy_box_multicast(target + kBytesH + rank * (kBytesW / kCluster), &map_w, k * kTileK,
                               row_w, &full[stage], (1 << kCluster) - 1);
            advance();
          }
        }
      }
    }
    __syncwarp();
  } else {  // consumers: 64 rows each
    take_registers<kConsumerRegisters>();
    const int thread = static_cast<int>(threadIdx.x) % kGroup;
    const Scaling scale = scaling(args.temperature);
    const float c = scale.c;
    // One arrival per warp in each CTA of the cluster; all lanes have passed the wait for the
    // products.
    const auto release = [&](int used) {
      if (lane < kCluster) barrier_arrive(&empty[used], lane);
    };
    // The second group begins its first step when the data of the first group's step kLag are
    // there (index.h).
    bool starts_behind = group == kConsumers && kLag > 0;
    float acc[kAccumulators];
    for (int64_t u = cluster; u < job.plan.units; u += clusters) {
      const LinearUnit unit = linear_unit(job.plan, u);
      if (skipped<kMake>(job, unit)) continue;
      if constexpr (kMake == Make::kSumsAndE) {
        if (threadIdx.x == kGroup && rank == 0 && unit.split == 0) {
          job.redo[unit.row_pair] = 0;  // once per row pair, for `combine` to set
        }
      }
      Rows rows;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = (unit.row_pair * kCluster + rank) * kTileM + (group - 1) * 64 +
                        acc_row(thread, 2 * h);
        rows.row[h] = row;
        rows.label[h] = label_of(args, row);
        rows.part[h] = empty_partial(scale);
        rows.offset[h] = 0.0f;
        if constexpr (kMake != Make::kSums) {
          if (row < args.rows) rows.offset[h] = args.offsets[row] * kLog2e;
        }
        if constexpr (kMake == Make::kRedoneE) {
          // As patch_label would make them for an offset that is the LSE.
          rows.at_label[h] = row < args.rows ? expm1f(args.logps[row]) : 0.0f;
          if (row < args.rows && unit.split == 0 && thread % 4 == 0) {
            args.factors[row] = rows.label[h] < 0 ? 0.0f : -1.0f / args.temperature;
          }
        }
      }
      if (starts_behind) {
        barrier_wait(&full[job.k_tiles <= kLag ? job.k_tiles - 1 : kLag], 0);
        starts_behind = false;
      }
      for (int tile = unit.first_tile; tile < unit.end_tile; ++tile) {
        for (int k = 0; k < job.k_tiles; ++k) {
          barrier_wait(&full[stage], phase);
          const uint32_t h = tiles + stage * kStageBytes + (group - 1) * (kBytesH / kConsumers);
          const uint32_t w = tiles + stage * kStageBytes + kBytesH;
          wgmma_fence();
#pragma unroll
          for (int s = 0; s < kTileK / 16; ++s) {
            wgmma<T>(acc, operand_descriptor(h, s), operand_descriptor(w, s), k > 0 || s > 0);
          }
          wgmma_commit();
          if (k > 0) {  // the products of the stage before this one have read it; these still run
            wgmma_wait<1>();
            release((stage + kStages - 1) % kStages);
          }
          advance();
        }
        wgmma_wait<0>();
        pin(acc);
        release((stage + kStages - 1) % kStages);
        epilogue<kMake>(acc, rows, job, tile, c);
      }
      if constexpr (kMake != Make::kRedoneE) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // the four lanes that share a row
          Partial part = rows.part[h];
#pragma unroll
          for (int step = 1; step < 4; step *= 2) {
            part = merge(part, {__shfl_xor_sync(0xFFFFFFFFu, part.top, step),
                                __shfl_xor_sync(0xFFFFFFFFu, part.sum, step)});
          }
          if (thread % 4 == 0 && rows.row[h] < args.rows) {
            job.partials[offset_2d(rows.row[h], job.plan.splits, unit.split)] = {part.top,
                                                                                 part.sum};
          }
        }
      }
    }
  }
  cluster_sync();  // the peer may still copy into this CTA and arrive at its barriers
#endif
}

// E's label column and the row's factor: with E = exp(z - offset), p_v = E_v exp(offset - lse), so
// that -exp(offset - lse) (E W) is the gradient when E_y = -(1 - p_y) exp(lse - offset), minus the
// sum of the others.
__device__ __forceinline__ void patch_label(const LinearArgs& args, int row, int label, float lse,
                                            float offset, float others) {
  args.factors[row] = label < 0 ? 0.0f : -expf(offset - lse) / args.temperature;
  if (label >= 0) {
    static_cast<__nv_bfloat16*>(args.exp)[offset_2d(row, args.exp_stride, label)] =
        __float2bfloat16_rn(-others * expf(lse - offset));
  }
}

constexpr int kCombineWarps = 8;

// One warp per row merges the splits in a fixed order.
__global__ void __launch_bounds__(kCombineWarps * 32) combine(const Job job) {
  const LinearArgs& args = job.args;
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * kCombineWarps + threadIdx.x / 32;
  if (row >= args.rows) return;  // the whole warp
  const Scaling scale = scaling(args.temperature);
  Partial part = empty_partial(scale);
  for (int split = lane; split < job.plan.splits; split += 32) {
    const float2 one = job.partials[offset_2d(row, job.plan.splits, split)];
    part = merge(part, {one.x, one.y});
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    part = merge(part, {__shfl_xor_sync(0xFFFFFFFFu, part.top, step),
                        __shfl_xor_sync(0xFFFFFFFFu, part.sum, step)});
  }
  if (lane != 0) return;
  const int label = label_of(args, row);
  const float logit = label >= 0 ? job.label_logits[row] : 0.0f;
  const RowResult result = finish_row(part, logit, label >= 0, scale);
  args.logps[row] = result.logp;
  args.lse[row] = result.lse;
  if (job.redo != nullptr) {
    const float offset = args.offsets[row];
    if (label < 0 || fabsf(offset - result.lse) <= kOffsetReach) {
      patch_label(args, row, label, result.lse, offset, result.others);
    } else {  // also for NaN
      job.redo[row / kPairRows] = 1;
    }
  }
}

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  // The driver's library is not linked, so that the module loads on a machine without one.
  static PFN_cuTensorMapEncodeTiled_v12000 function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
    if (status != cudaDriverEntryPointSuccess || found == nullptr) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: update it to 12.0");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return function;
}

// Boxes of 128 rows x kTileK columns of a row-major matrix, swizzled; zeros outside the matrix.
CUtensorMap tensor_map(const void* base, int rows, int columns, int64_t stride, Half type) {
  static_assert(kTileM == kHalfN, "H and W boxes are alike");
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kTileK, kTileM};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = tensor_map_encoder()(
      &map,
      type == Half::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with " + std::to_string(result));
  }
  return map;
}

template <typename T, Make kMake>
void launch(const Job& job, const CUtensorMap& map_h, const CUtensorMap& map_w, int device,
            cudaStream_t stream) {
  check(cudaFuncSetAttribute(linear_kernel<T, kMake>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kSharedBytes),
        "linear kernel shared memory");
  const int sms = attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t clusters = std::max<int64_t>(1, std::min<int64_t>(job.plan.units, sms / kCluster));
  linear_kernel<T, kMake><<<static_cast<unsigned>(clusters * kCluster), kThreads, kSharedBytes,
                           stream>>>(map_h, map_w, job);
  check(cudaGetLastError(), "linear kernel");
}

// Parts of the workspace; each starts at a multiple of 16 bytes.
int64_t padded(int64_t bytes) { return ceil_div(bytes, 16) * 16; }
int64_t partial_bytes(const LinearPlan& plan, int rows) {
  return padded(static_cast<int64_t>(rows) * plan.splits * sizeof(float2));
}
int64_t label_bytes(int rows) { return padded(static_cast<int64_t>(rows) * sizeof(float)); }
int64_t redo_bytes(const LinearPlan& plan) {
  return padded(static_cast<int64_t>(plan.row_pairs) * sizeof(int));
}

}  // namespace

int64_t linear_workspace_bytes(int rows, int vocab) {
  const LinearPlan plan = linear_plan(rows, vocab);
  return partial_bytes(plan, rows) + label_bytes(rows) + redo_bytes(plan);
}

void launch_linear_lse(const LinearArgs& args, Half type, int device, cudaStream_t stream) {
  if (args.rows == 0) return;
  const OnDevice current(device);
  if (!is_hopper(device)) throw std::runtime_error("linear_lse needs compute capability 9.0");
  const LinearPlan plan = linear_plan(args.rows, args.vocab);
  auto* const workspace = static_cast<uint8_t*>(args.workspace);
  Job job{};
  job.args = args;
  job.plan = plan;
  job.k_tiles = static_cast<int>(ceil_div(args.width, kTileK));
  job.partials = reinterpret_cast<float2*>(workspace);
  job.label_logits = reinterpret_cast<float*>(workspace + partial_bytes(plan, args.rows));
  const CUtensorMap map_h =
      tensor_map(args.hidden, args.rows, args.width, args.hidden_stride, type);
  const CUtensorMap map_w =
      tensor_map(args.weight, args.vocab, args.width, args.weight_stride, type);
  const auto combine_blocks = static_cast<unsigned>(ceil_div(args.rows, kCombineWarps));

  if (args.exp == nullptr) {
    type == Half::bfloat16
        ? launch<__nv_bfloat16, Make::kSums>(job, map_h, map_w, device, stream)
        : launch<__half, Make::kSums>(job, map_h, map_w, device, stream);
    combine<<<combine_blocks, kCombineWarps * 32, 0, stream>>>(job);
    check(cudaGetLastError(), "combine");
    return;
  }
  if (type != Half::bfloat16) throw std::runtime_error("E needs bfloat16 inputs");
  job.redo =
      reinterpret_cast<int*>(workspace + partial_bytes(plan, args.rows) + label_bytes(args.rows));
  launch<__nv_bfloat16, Make::kSumsAndE>(job, map_h, map_w, device, stream);
  combine<<<combine_blocks, kCombineWarps * 32, 0, stream>>>(job);
  check(cudaGetLastError(), "combine");
  // Always, because only the device knows the flags, and the host must not wait for it. Without a
  // flag every CTA ends after one look at them.
  job.args.offsets = args.lse;
  launch<__nv_bfloat16, Make::kRedoneE>(job, map_h, map_w, device, stream);
}

}  // namespace cpo
