#include "row_kernel.h"

#include <algorithm>
#include <cstring>

#include "launch.h"
#include "logp.h"
#include "ptx.h"
#include "row_parts.h"
#include "values.h"

namespace cpo {
namespace {

constexpr int kWarps = kRowThreads / 32;

__device__ __forceinline__ Partial warp_merge(Partial part) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Partial other{__shfl_xor_sync(0xFFFFFFFFu, part.top, step),
                        __shfl_xor_sync(0xFFFFFFFFu, part.sum, step)};
    part = merge(part, other);  // symmetric, so all lanes end with the same bits
  }
  return part;
}

// The merged sum of all threads, in every thread. One barrier: `warps` may be written again only
// after the caller's next barrier.
__device__ __forceinline__ Partial block_merge(Partial part, Partial* warps) {
  part = warp_merge(part);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = part;
  __syncthreads();
  return warp_merge(warps[threadIdx.x % 32]);
}

__device__ __forceinline__ int label_in(int64_t label, int vocab) {
  return label >= 0 && label < vocab ? static_cast<int>(label) : -1;
}

__device__ __forceinline__ void write_result(const RowArgs& args, int row,
                                             const RowResult& result) {
  args.logps[row] = result.logp;
  if (args.lse != nullptr) args.lse[row] = result.lse;
}

// The label's gradient, over the 16 bits that the calling thread wrote with its vector. A copy of
// bytes: a store through T* might be moved before that of the vector, which has another type.
template <typename T>
__device__ __forceinline__ void write_label(uint4* line, int label, float value) {
  const uint16_t bits = static_cast<uint16_t>(pack<T>(value, 0.0f) & 0xFFFFu);
  char* const target = reinterpret_cast<char*>(line) + 2 * static_cast<int64_t>(label);
  memcpy(__builtin_assume_aligned(target, 2), &bits, sizeof(bits));
}

// Portable: one CTA per row, which is read twice, the second time mostly from L2.
template <typename T, bool kTransform>
__global__ void __launch_bounds__(kRowThreads, 1)
    row_portable(const __grid_constant__ RowArgs args) {
  __shared__ Partial warps[kWarps];
  __shared__ float label_logit;
  const Head<T, kTransform> head(args);
  const int thread = static_cast<int>(threadIdx.x);
  const RowShare share{0, row_vecs(args.vocab),
                       static_cast<int>(ceil_div(row_vecs(args.vocab), kPieceVecs))};
  const RowRounds rounds = row_rounds(args.vocab, share);
  const int step = kPieceVecs * kVec;  // columns of a round
  for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
    uint4* const line = reinterpret_cast<uint4*>(static_cast<T*>(args.logits) +
                                                 offset_2d(row, args.stride, 0));
    const int label = label_in(args.labels[row], args.vocab);
    const LabelPlace at = label_place(label, share);
    Scaling scale = scaling(args.temperature);
    Partial part;
    float label_slope = 1.0f;
    for (int rescue = 1;; ++rescue) {
      Scan<T, kTransform> scan{head, scale.c, empty_partial(scale)};
      for_rounds<kTransform ? 2 : 4>(
          rounds, at.round,
          [&](int round, auto count) {
            constexpr int kCount = decltype(count)::value;
            uint4 vectors[kCount];
            const int first = round * kPieceVecs + thread;
#pragma unroll
            for (int v = 0; v < kCount; ++v) vectors[v] = line[first + v * kPieceVecs];
            // By two: sixteen logits and exponentials are what the registers hold.
            if constexpr (kCount == 4) {
              scan.add_whole({vectors[0], vectors[1]}, first * kVec, step);
              scan.add_whole({vectors[2], vectors[3]}, first * kVec + 2 * step, step);
            } else {
              scan.add_whole(vectors, first * kVec, step);
            }
          },
          [&](int round) {
            const int i = round * kPieceVecs + thread;
            if (i >= share.vecs) return;
            scan.add_masked(line[i], i * kVec, label, &label_logit, &label_slope);
          });
      part = block_merge(scan.part, warps);  // and publishes label_logit
      if (rescue > kRescues || counted(part, scale)) break;
      scale = rescue_scaling(args.temperature, rescue);
      __syncthreads();  // `warps` has been read by all
    }
    const RowResult result = finish_row(part, label_logit, label >= 0, scale);
    if (thread == 0) write_result(args, row, result);
    if (row < args.grad_rows) {
      if (label < 0) {
        for (int i = thread; i < share.vecs; i += kRowThreads) line[i] = make_uint4(0, 0, 0, 0);
      } else {
        const float multiplier = -result.factor / args.temperature;
        for_rounds<2>(
            rounds, -1,
            [&](int round, auto count) {
              constexpr int kCount = decltype(count)::value;
              uint4 vectors[kCount];
              const int first = round * kPieceVecs + thread;
#pragma unroll
              for (int v = 0; v < kCount; ++v) vectors[v] = line[first + v * kPieceVecs];
#pragma unroll
              for (int v = 0; v < kCount; ++v) {
                line[first + v * kPieceVecs] =
                    gradient<T, kTransform, true>(head, vectors[v], first * kVec + v * step,
                                                  scale.c, part.top, multiplier);
              }
            },
            [&](int round) {
              const int i = round * kPieceVecs + thread;
              if (i >= share.vecs) return;
              line[i] = gradient<T, kTransform, false>(head, line[i], i * kVec, scale.c, part.top,
                                                       multiplier);
            });
        if (thread == at.thread) {
          write_label<T>(line, label, result.others / args.temperature * label_slope);
        }
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
  __shared__ float4 from_peer[2];  // by exchange & 1: the peer's top, sum, label logit
  __shared__ __align__(8) uint64_t peer_arrived[2];

  const Head<T, kTransform> head(args);
  const int thread = static_cast<int>(threadIdx.x);
  const int rank = static_cast<int>(cluster_rank());
  const int clusters = gridDim.x / kCluster;
  const RowShare share = row_share(args.vocab, rank);
  const RowRounds rounds = row_rounds(args.vocab, share);  // a round is a piece
  const int step = kPieceVecs * kVec;
  T* const logits = static_cast<T*>(args.logits);

  // Called by thread 0 only. Expects the bytes before copying, in the same thread, so a phase
  // cannot end early. `source` is the share's first vector of a row.
  const auto copy = [&](const uint4* source, int piece, uint32_t bytes) {
    barrier_expect(&arrived[piece], bytes);
    copy_bulk(tile + piece * kPieceVecs, source + piece * kPieceVecs, bytes, &arrived[piece]);
  };
  const auto load = [&](const uint4* source, int first_piece) {
    for (int piece = first_piece; piece < share.pieces; ++piece) {
      copy(source, piece, piece_vecs(share, piece) * static_cast<uint32_t>(sizeof(uint4)));
    }
  };
  const auto share_of = [&](int row) {
    return reinterpret_cast<uint4*>(logits + offset_2d(row, args.stride, 0)) + share.first_vec;
  };

  int row = blockIdx.x / kCluster;
  if (thread == 0) {
    for (int piece = 0; piece < share.pieces; ++piece) barrier_init(&arrived[piece], 1);
    for (uint64_t& barrier : peer_arrived) barrier_init(&barrier, 1);
    barrier_init_fence();
  }
  cluster_sync();  // the barriers are initialised for all, and the peer CTA runs
  if (thread == 0 && row < args.rows) load(share_of(row), 0);

  // Read a row ahead: the label decides the path through the row from its first piece.
  int64_t next_label = row < args.rows ? args.labels[row] : -1;
  int exchange = 0;  // between the two CTAs: one per row, more for a row that is scanned again
  // Barrier `piece` completes one phase per row, so its parity is the number of the row's turn,
  // modulo 2.
  for (int turn = 0; row < args.rows; ++turn, row += clusters) {
    const int next = row + clusters;
    const int label = label_in(next_label, args.vocab);
    if (next < args.rows) next_label = args.labels[next];
    const LabelPlace at = label_place(label, share);
    const bool owner = label >= 0 && (rank == 1) == (label / kVec >= row_share(args.vocab, 0).vecs);
    Scaling scale = scaling(args.temperature);
    Partial part;
    float peer_logit, own_logit, label_slope = 1.0f;
    for (int rescue = 1;; ++rescue, ++exchange) {
      Scan<T, kTransform> scan{head, scale.c, empty_partial(scale)};
      for_rounds<2>(
          rounds, at.round,
          [&](int round, auto count) {
            constexpr int kCount = decltype(count)::value;
            uint4 vectors[kCount];
            const int first = round * kPieceVecs + thread;
#pragma unroll
            for (int v = 0; v < kCount; ++v) {
              barrier_wait(&arrived[round + v], turn & 1);
              vectors[v] = tile[first + v * kPieceVecs];
            }
            scan.add_whole(vectors, (share.first_vec + first) * kVec, step);
          },
          [&](int round) {
            barrier_wait(&arrived[round], turn & 1);
            const int i = round * kPieceVecs + thread;
            if (i >= share.vecs) return;
            scan.add_masked(tile[i], (share.first_vec + i) * kVec, label, &label_logit,
                            &label_slope);
          });
      const Partial mine = block_merge(scan.part, warps);  // also publishes label_logit

      // The CTAs send each other their numbers. Places and barriers alternate between exchanges, so
      // that a place is written for exchange n + 2 only after its reader has finished exchange n:
      // the sender of n + 2 has received n + 1, which the reader sent after all its threads had
      // passed block_merge's barrier before n + 1. For the same reason no barrier can run two
      // phases ahead of a thread that waits for it.
      const int place = exchange & 1;
      own_logit = label_logit;
      if (thread == 0) {
        barrier_expect(&peer_arrived[place], sizeof(float4));
        send_peer(peer_address(shared_address(&from_peer[place]), rank ^ 1), mine.top, mine.sum,
                  own_logit,  // means something in the CTA that holds the label
                  0.0f, peer_address(shared_address(&peer_arrived[place]), rank ^ 1));
      }
      barrier_wait_peer(&peer_arrived[place], exchange >> 1 & 1);
      const float4 peer = from_peer[place];
      peer_logit = peer.z;
      part = merge(mine, {peer.x, peer.y});  // symmetric: both CTAs get the same bits
      if (rescue > kRescues || counted(part, scale)) break;  // and go the same way
      scale = rescue_scaling(args.temperature, rescue);
      __syncthreads();  // all have read `warps`, label_logit and from_peer
    }
    ++exchange;
    const RowResult result =
        finish_row(part, owner ? own_logit : peer_logit, label >= 0, scale);
    if (rank == 0 && thread == 0) write_result(args, row, result);
    __syncthreads();  // all have read `warps`, label_logit, from_peer and, in the scan, every piece

    // Refilled by thread 0 when all threads are done with a piece.
    const bool refills = thread == 0 && next < args.rows;
    const uint4* const source = share_of(refills ? next : row);
    uint4* const line = share_of(row);
    if (row >= args.grad_rows || label < 0) {
      if (refills) {
        async_proxy_fence();
        load(source, 0);
      }
      if (row < args.grad_rows) {
        for (int i = thread; i < share.vecs; i += kRowThreads) line[i] = make_uint4(0, 0, 0, 0);
      }
      continue;
    }
    const float multiplier = -result.factor / args.temperature;
    for_rounds<2>(
        rounds, -1,
        [&](int round, auto count) {
          constexpr int kCount = decltype(count)::value;
          const int first = round * kPieceVecs + thread;
#pragma unroll
          for (int v = 0; v < kCount; ++v) {
            line[first + v * kPieceVecs] = gradient<T, kTransform, true>(
                head, tile[first + v * kPieceVecs], (share.first_vec + first) * kVec + v * step,
                scale.c, part.top, multiplier);
          }
          __syncthreads();  // all have read the pieces again
          if (refills) {
            async_proxy_fence();
#pragma unroll
            for (int v = 0; v < kCount; ++v) {
              copy(source, round + v, kPieceVecs * static_cast<uint32_t>(sizeof(uint4)));
            }
          }
        },
        [&](int round) {
          const int i = round * kPieceVecs + thread;
          if (i < share.vecs) {
            line[i] = gradient<T, kTransform, false>(head, tile[i], (share.first_vec + i) * kVec,
                                                     scale.c, part.top, multiplier);
          }
        });
    if (rounds.whole < rounds.all) {
      __syncthreads();
      if (refills) {
        async_proxy_fence();
        load(source, rounds.whole);
      }
    }
    if (thread == at.thread) {
      write_label<T>(line - share.first_vec, label,
                     result.others / args.temperature * label_slope);
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
