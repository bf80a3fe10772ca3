// Index arithmetic of the CUDA kernels: plain integers, shared by device code, launchers and the
// CPU tests. Everything that may pass 2^31 (rows x columns) is int64; single coordinates are int.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CPO_HD __host__ __device__ __forceinline__
#else
#define CPO_HD inline
#endif

namespace cpo {

CPO_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

CPO_HD constexpr int64_t offset_2d(int64_t row, int64_t stride, int64_t column) {
  return row * stride + column;
}

// --- row kernel: one row as 16-byte vectors of 8 values, shared by the two CTAs of a cluster -----

constexpr int kVec = 8;               // 16-bit values in a vector
constexpr int kRowThreads = 1024;     // one vector per thread and piece
constexpr int kPieceVecs = kRowThreads;
constexpr int kMaxPieces = 14;        // 14 x 16 KiB of the 227 KiB available to a CTA

CPO_HD constexpr int row_vecs(int vocab) { return static_cast<int>(ceil_div(vocab, kVec)); }

struct RowShare {
  int first_vec;  // of the row
  int vecs;       // of this CTA
  int pieces;     // of kPieceVecs vectors, the last one shorter
};

// CTA 0 takes the first half of the vectors, rounded up; CTA 1 the rest (none when there is one
// vector).
CPO_HD constexpr RowShare row_share(int vocab, int rank) {
  const int all = row_vecs(vocab);
  const int half = (all + 1) / 2;
  const int vecs = rank == 0 ? half : all - half;
  return {rank == 0 ? 0 : half, vecs, static_cast<int>(ceil_div(vecs, kPieceVecs))};
}

CPO_HD constexpr int piece_vecs(const RowShare& share, int piece) {
  const int left = share.vecs - piece * kPieceVecs;
  return left < kPieceVecs ? left : kPieceVecs;
}

// A share in rounds of kPieceVecs vectors, one per thread. In the rounds before `whole` every thread
// has a vector, and every vector lies inside the vocabulary.
struct RowRounds {
  int whole;
  int all;
};
CPO_HD constexpr RowRounds row_rounds(int vocab, const RowShare& share) {
  const int left = vocab / kVec - share.first_vec;
  return {(left < share.vecs ? left : share.vecs) / kPieceVecs, share.pieces};
}

// Where in a share the label is: its round and thread; round -1 where it is elsewhere or ignored.
struct LabelPlace {
  int round;
  int thread;
};
CPO_HD constexpr LabelPlace label_place(int label, const RowShare& share) {
  const int vec = label / kVec - share.first_vec;
  return label >= 0 && vec >= 0 && vec < share.vecs
             ? LabelPlace{vec / kPieceVecs, vec % kPieceVecs}
             : LabelPlace{-1, -1};
}

// --- linear kernel: logits tile [128 rows, 256 columns] = H tile [128, D] x (W tile [256, D])^T --

constexpr int kTileM = 128;                 // rows of a CTA: two warpgroups of 64
constexpr int kTileN = 256;                 // vocabulary columns, one wgmma wide
constexpr int kTileK = 64;                  // 128 bytes of bf16: one row of the 128-byte swizzle
constexpr int kCluster = 2;                 // CTAs that share a W tile, each loading half of it
constexpr int kPairRows = kCluster * kTileM;  // a cluster's "row pair": two row tiles
constexpr int kHalfN = kTileN / kCluster;
constexpr int kStages = 4;
constexpr int kBytesH = kTileM * kTileK * 2;
constexpr int kBytesW = kTileN * kTileK * 2;
constexpr int kStageBytes = kBytesH + kBytesW;

// Tuning parameters, set by -DCPO_BAND=... and so on.
#ifndef CPO_BAND
#define CPO_BAND 8
#endif
#ifndef CPO_SPLIT_TILES
#define CPO_SPLIT_TILES 2
#endif
#ifndef CPO_LAG
#define CPO_LAG 2
#endif

// Row pairs side by side: 2048 rows of H stay in L2 while W streams by.
constexpr int kBand = CPO_BAND;

// Vocabulary tiles of a split, whose sums one CTA forms in registers. A constant, so that a token's
// log-prob has the same bits whatever else is in the batch. With 2, V = 152064 and an even number of
// row pairs the waves of 66 clusters (132 multiprocessors) come out even: 297 splits = 4.5 x 66.
constexpr int kSplitTiles = CPO_SPLIT_TILES;

// Steps of kTileK by which the second warpgroup starts behind the first. While one is in its
// epilogue, the other should have the tensor cores; but a stage is free only when both have used
// it, so that a lag of n leaves kStages - 1 - n stages to load ahead of the first.
constexpr int kLag = CPO_LAG;
static_assert(kBand > 0 && kSplitTiles > 0 && kLag >= 0 && kLag < kStages, "see CPO_BAND");

// Work is cut into units: a row pair x a split.
struct LinearPlan {
  int row_pairs;
  int vocab_tiles;
  int splits;
  int64_t units;
};

CPO_HD constexpr LinearPlan linear_plan(int rows, int vocab) {
  const int row_pairs = static_cast<int>(ceil_div(rows, kPairRows));
  const int vocab_tiles = static_cast<int>(ceil_div(vocab, kTileN));
  const int splits = static_cast<int>(ceil_div(vocab_tiles, kSplitTiles));
  return {row_pairs, vocab_tiles, splits, static_cast<int64_t>(row_pairs) * splits};
}

struct LinearUnit {
  int row_pair;
  int split;
  int first_tile;  // vocabulary tiles first_tile .. end_tile - 1
  int end_tile;
};

// Inside a band of kBand row pairs the row pair runs fastest, so that clusters that run together
// read the same W tiles; bands follow one another.
CPO_HD constexpr LinearUnit linear_unit(const LinearPlan& plan, int64_t unit) {
  const int64_t band_units = static_cast<int64_t>(kBand) * plan.splits;
  const int band = static_cast<int>(unit / band_units);
  const int within = static_cast<int>(unit - band * band_units);
  const int left = plan.row_pairs - band * kBand;
  const int height = left < kBand ? left : kBand;
  const int split = within / height;
  const int first = split * kSplitTiles;
  const int end = first + kSplitTiles;
  return {band * kBand + within % height, split, first,
          end < plan.vocab_tiles ? end : plan.vocab_tiles};
}

// Transposing a 4 x 4 block of words over the four lanes of a quad, in four swaps between lanes q
// and q ^ step: the lane whose bit `step` is set gives its word `low` and receives the other lane's
// `high`; the other lane does the reverse. Word w of lane q ends as word q of lane w.
struct QuadSwap {
  int low;
  int high;
  int step;
};
CPO_HD constexpr QuadSwap quad_swap(int i) {
  return i == 0   ? QuadSwap{0, 1, 1}
         : i == 1 ? QuadSwap{2, 3, 1}
         : i == 2 ? QuadSwap{0, 2, 2}
                  : QuadSwap{1, 3, 2};
}

// First row of the box that the copy engine reads. A box that lies wholly outside reads row 0
// instead: its results are never used, and only boxes that are partly outside rely on zero fill.
CPO_HD constexpr int box_row(int64_t row, int rows) {
  return row < rows ? static_cast<int>(row) : 0;
}

// Accumulators of wgmma m64nNk16: the place of register `i` of thread `thread` (0..127) in the 64 x
// N tile.
CPO_HD constexpr int acc_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2);
}
CPO_HD constexpr int acc_column(int thread, int i) { return thread % 4 * 2 + i % 2 + 8 * (i / 4); }

// wgmma's description of a K-major operand in shared memory, as the copy engine lays it down with
// its 128-byte swizzle. Rows are 128 bytes, groups of eight rows follow each other at 1024 bytes,
// tiles start at multiples of 1024; the leading offset is not used with a swizzle. `k` steps of 16
// values move the start by 32 bytes inside the swizzled row.
CPO_HD constexpr uint64_t operand_descriptor(uint32_t address, int k) {
  return (static_cast<uint64_t>(address + 32 * k) & 0x3FFFF) >> 4 | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

}  // namespace cpo
