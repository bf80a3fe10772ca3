#include "row_kernel.h"

#include <algorithm>

#include "launch.h"
#include "logp.h"
#include "ptx.h"
#include "values.h"

namespace cpo {
namespace {

constexpr int kWarps = kRowThreads / 32;

// A raw logit after bias and soft-capping; `slope` is its derivative.
__device__ __forceinline__ float transformed(const RowArgs& args, float x, int column,
                                             float* slope) {
  if (args.bias != nullptr) x += args.bias[column];
  if (args.softcap > 0.0f) {
    const float t = tanhf(x / args.softcap);
    *slope = 1.0f - t * t;
    return args.softcap * t;
  }
  *slope = 1.0f;
  return x;
}

// What a thread carries through the first pass over its vectors of a row.
template <typename T, bool kTransform>
struct Scan {
  const RowArgs& args;
  float c;          // log2(e) / temperature
  int label;        // -1: ignored
  Partial part = empty_partial();

  // `vector` holds columns 8 * index .. 8 * index + 7; the label's logit goes to *label_logit.
  __device__ __forceinline__ void add(const uint4& vector, int index, float* label_logit) {
    float z[kVec];
    unpack8<T>(vector, z);
    const int column = index * kVec;
    if constexpr (kTransform) {
      float slope;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (column + i < args.vocab) z[i] = transformed(args, z[i], column + i, &slope);
      }
    }
    // Rare vectors only: the one with the label, which stays out of the sum, and a ragged last one.
    if (label >> 3 == index || column + kVec > args.vocab) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (column + i == label) *label_logit = z[i];
        if (column + i == label || column + i >= args.vocab) z[i] = -INFINITY;
      }
    }
    float highest = z[0];
#pragma unroll
    for (int i = 1; i < kVec; ++i) highest = fmaxf(highest, z[i]);
    if (highest > part.max) {
      part.sum *= exp2_fast((part.max - highest) * c);
      part.max = highest;
    }
    const float from = offset_of(part.max);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += exp2_fast((z[i] - from) * c);
    part.sum += sum;  // eight terms first, then the running sum: a long sum of small terms drifts
  }
};

// The vector's d logp / d logits: onehot - p, times the derivatives of temperature and
// soft-capping.
template <typename T, bool kTransform>
__device__ __forceinline__ uint4 gradient(const uint4& vector, int index, const RowArgs& args,
                                          const RowResult& result, float max, float c, int label) {
  float z[kVec];
  unpack8<T>(vector, z);
  const int column = index * kVec;
  const float from = offset_of(max);
  const float scale = 1.0f / args.temperature;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    float slope = 1.0f;
    if constexpr (kTransform) {
      if (column + i < args.vocab) z[i] = transformed(args, z[i], column + i, &slope);
    }
    z[i] = -exp2_fast((z[i] - from) * c) * result.factor * scale * slope;
  }
  if (label >> 3 == index || column + kVec > args.vocab) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (column + i >= args.vocab) z[i] = 0.0f;
      if (column + i == label) {
        float slope = 1.0f;
        if constexpr (kTransform) {
          float raw[kVec];
          unpack8<T>(vector, raw);
          transformed(args, raw[i], label, &slope);
        }
        z[i] = result.others * scale * slope;
      }
    }
  }
  return pack8<T>(z);
}

__device__ __forceinline__ Partial warp_merge(Partial part, float c) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Partial other{__shfl_xor_sync(0xFFFFFFFFu, part.max, step),
                        __shfl_xor_sync(0xFFFFFFFFu, part.sum, step)};
    part = merge(part, other, c);  // symmetric, so all lanes end with the same bits
  }
  return part;
}

// The merged sum of all threads, in every thread. One barrier: `warps` may be written again only
// after the caller's next barrier.
__device__ __forceinline__ Partial block_merge(Partial part, Partial* warps, float c) {
  part = warp_merge(part, c);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = part;
  __syncthreads();
  return warp_merge(warps[threadIdx.x % 32], c);
}

__device__ __forceinline__ int label_of(const RowArgs& args, int row) {
  const int64_t label = args.labels[row];
  return label >= 0 && label < args.vocab ? static_cast<int>(label) : -1;
}

__device__ __forceinline__ void write_result(const RowArgs& args, int row,
                                             const RowResult& result) {
  args.logps[row] = result.logp;
  if (args.lse != nullptr) args.lse[row] = result.lse;
}

// Portable: one CTA per row, which is read twice, the second time mostly from L2.
template <typename T, bool kTransform>
__global__ void __launch_bounds__(kRowThreads, 1)
    row_portable(const __grid_constant__ RowArgs args) {
  __shared__ Partial warps[kWarps];
  __shared__ float label_logit;
  const float c = kLog2e / args.temperature;
  const int vecs = row_vecs(args.vocab);
  for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
    uint4* line = reinterpret_cast<uint4*>(static_cast<T*>(args.logits) +
                                           offset_2d(row, args.stride, 0));
    const int label = label_of(args, row);
    Scan<T, kTransform> scan{args, c, label};
#pragma unroll 4
    for (int i = threadIdx.x; i < vecs; i += kRowThreads) scan.add(line[i], i, &label_logit);
    const Partial part = block_merge(scan.part, warps, c);  // and publishes label_logit
    const RowResult result = finish_row(part, label_logit, label >= 0, 1.0f / args.temperature);
    if (threadIdx.x == 0) write_result(args, row, result);
    if (row < args.grad_rows) {
#pragma unroll 2
      for (int i = threadIdx.x; i < vecs; i += kRowThreads) {
        line[i] = label < 0 ? make_uint4(0, 0, 0, 0)
                            : gradient<T, kTransform>(line[i], i, args, result, part.max, c, label);
      }
    }
    __syncthreads();  // `warps` and label_logit have been read by all
  }
}

// Hopper: two CTAs share a row, each holding its half in shared memory; the row is read once.
// Pieces of 16 KiB arrive by bulk copies, and each piece's place is refilled with the next row as
// soon as it is written out.
template <typename T, bool kTransform>
__global__ void CPO_CLUSTER_OF(kCluster) __launch_bounds__(kRowThreads, 1)
    row_cluster(const __grid_constant__ RowArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) uint4 tile[];  // [pieces * kPieceVecs]
  __shared__ __align__(8) uint64_t arrived[kMaxPieces];
  __shared__ Partial warps[kWarps];
  __shared__ float label_logit;
  __shared__ float4 from_peer[2];  // by turn & 1: the peer's max, sum, label logit
  __shared__ __align__(8) uint64_t peer_arrived[2];

  const int rank = static_cast<int>(cluster_rank());
  const int clusters = gridDim.x / kCluster;
  const RowShare share = row_share(args.vocab, rank);
  const float c = kLog2e / args.temperature;
  T* const logits = static_cast<T*>(args.logits);

  // Called by thread 0 only. Expects the bytes before copying, in the same thread, so a phase
  // cannot end early.
  const auto load = [&](int row, int piece) {
    const uint32_t bytes = piece_vecs(share, piece) * static_cast<uint32_t>(sizeof(uint4));
    const int64_t column = static_cast<int64_t>(share.first_vec + piece * kPieceVecs) * kVec;
    barrier_expect(&arrived[piece], bytes);
    copy_bulk(tile + piece * kPieceVecs, logits + offset_2d(row, args.stride, column), bytes,
              &arrived[piece]);
  };

  int row = blockIdx.x / kCluster;
  if (threadIdx.x == 0) {
    for (int piece = 0; piece < share.pieces; ++piece) barrier_init(&arrived[piece], 1);
    for (uint64_t& barrier : peer_arrived) barrier_init(&barrier, 1);
    barrier_init_fence();
  }
  cluster_sync();  // the barriers are initialised for all, and the peer CTA runs
  if (threadIdx.x == 0 && row < args.rows) {
    for (int piece = 0; piece < share.pieces; ++piece) load(row, piece);
  }

  // Barrier `piece` completes one phase per row, so its parity is the number of the row's turn,
  // modulo 2.
  for (int turn = 0; row < args.rows; ++turn, row += clusters) {
    const int label = label_of(args, row);
    Scan<T, kTransform> scan{args, c, label};
    for (int piece = 0; piece < share.pieces; ++piece) {
      barrier_wait(&arrived[piece], turn & 1);
      const int i = piece * kPieceVecs + static_cast<int>(threadIdx.x);
      if (i < share.vecs) scan.add(tile[i], share.first_vec + i, &label_logit);
    }
    const Partial mine = block_merge(scan.part, warps, c);  // also publishes label_logit

    // The CTAs send each other their numbers. Places and barriers alternate between turns, so that
    // a place is written for turn n + 2 only after its reader has finished turn n: the sender of n
    // + 2 has received turn n + 1, which the reader sent after all its threads had passed
    // block_merge's barrier of turn n + 1. For the same reason no barrier can run two phases ahead
    // of a thread that waits for it.
    const int place = turn & 1;
    if (threadIdx.x == 0) {
      barrier_expect(&peer_arrived[place], sizeof(float4));
      send_peer(peer_address(shared_address(&from_peer[place]), rank ^ 1), mine.max, mine.sum,
                label_logit,  // means something in the CTA that holds the label
                0.0f, peer_address(shared_address(&peer_arrived[place]), rank ^ 1));
    }
    const float own_logit = label_logit;
    barrier_wait_peer(&peer_arrived[place], turn >> 1 & 1);
    const float4 peer = from_peer[place];

    // Merging is symmetric: both CTAs get the same bits.
    const Partial part = merge(mine, {peer.x, peer.y}, c);
    const int owner = label >= 0 && label / kVec >= row_share(args.vocab, 0).vecs ? 1 : 0;
    const RowResult result = finish_row(part, owner == rank ? own_logit : peer.z, label >= 0,
                                        1.0f / args.temperature);
    if (rank == 0 && threadIdx.x == 0) write_result(args, row, result);
    __syncthreads();  // all have read `warps`, label_logit, from_peer and, in the scan, every piece

    const bool store = row < args.grad_rows;  // the same for all threads
    uint4* const line =
        reinterpret_cast<uint4*>(logits + offset_2d(row, args.stride, 0)) + share.first_vec;
    const int next = row + clusters;
    for (int piece = 0; piece < share.pieces; ++piece) {
      const int i = piece * kPieceVecs + static_cast<int>(threadIdx.x);
      if (store && i < share.vecs) {
        line[i] = label < 0 ? make_uint4(0, 0, 0, 0)
                            : gradient<T, kTransform>(tile[i], share.first_vec + i, args, result,
                                                      part.max, c, label);
      }
      if (store) __syncthreads();  // all have read the piece again
      if (threadIdx.x == 0 && next < args.rows) {
        async_proxy_fence();
        load(next, piece);
      }
    }
  }
  cluster_sync();  // neither CTA ends while the other may still send to it
#endif
}

template <typename T, bool kTransform>
void launch(const RowArgs& args, int device, cudaStream_t stream) {
  const int sms = attribute(cudaDevAttrMultiProcessorCount, device);
  const RowShare share = row_share(args.vocab, 0);  // the larger half
  if (is_hopper(device) && share.pieces <= kMaxPieces) {
    const int bytes = share.pieces * kPieceVecs * static_cast<int>(sizeof(uint4));
    check(cudaFuncSetAttribute(row_cluster<T, kTransform>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "row kernel shared memory");
    const int clusters = std::max(1, std::min(args.rows, sms / kCluster));
    row_cluster<T, kTransform><<<clusters * kCluster, kRowThreads, bytes, stream>>>(args);
  } else {
    row_portable<T, kTransform><<<std::min(args.rows, sms), kRowThreads, 0, stream>>>(args);
  }
  check(cudaGetLastError(), "row kernel");
}

}  // namespace

void launch_row_kernel(const RowArgs& args, Half type, int device, cudaStream_t stream) {
  if (args.rows == 0) return;
  const OnDevice current(device);
  const bool transform = args.bias != nullptr || args.softcap > 0.0f;
  if (type == Half::bfloat16) {
    transform ? launch<__nv_bfloat16, true>(args, device, stream)
              : launch<__nv_bfloat16, false>(args, device, stream);
  } else {
    transform ? launch<__half, true>(args, device, stream)
              : launch<__half, false>(args, device, stream);
  }
}

}  // namespace cpo
