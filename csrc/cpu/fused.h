// Fused bfloat16 kernels: the logits never reach memory and are float32 sums.
//
// For a vocabulary block and a chunk of tokens, Z^T = W H^T is computed in 32 x 32 tiles with float32
// accumulators; each tile is turned into E = 2^(z - k), summed, and kept as bfloat16 in a buffer that stays
// in the L2 cache, from which G^T += W^T E follows at once. W is read once per chunk for policy and
// reference together. The vocabulary is cut into slots of fixed size with sums of their own, which threads
// process one after another and which are merged in order: the result is independent of the number of
// threads and of their timing. For a trained head E can be stored, transposed, as it is computed; else
// fused_residual recomputes p - onehot, block by block. A vendor GEMM computes dW from either.
//
// Two engines multiply the tiles: AMX (engine_amx.h), and vdpbf16ps of AVX512-BF16 (engine_avx512.h).
#pragma once

#include <cstdint>

#include "rows.h"

namespace cpo {

enum class Engine : int { avx512_bf16 = 0, amx = 1 };

struct Fold {
  const uint16_t* hidden;  // [n, D] bfloat16
  const uint16_t* ref;     // [n, D], or nullptr
  const uint16_t* weight;  // [V, D]
  const int64_t* labels;   // [n]
  const int64_t* index;    // [n] rows of grad
  int64_t n, D, V;
  Transform how;
  State state;      // of the policy: k, sum, label, slope are written, [n]
  State ref_state;  // of the reference, if given
  float* grad;      // [*, D]: the sum E W of row index[r], for `finish`; nullptr: not wanted
  uint16_t* kept;   // [V, n] E, with minus the sum of the others at the label; nullptr: not wanted
  double* offsets;  // [slots, n] k of a slot's rows of `kept`
  void* workspace;  // fused_workspace() bytes, aligned to 64
  int slots, threads;
};

struct Residual {          // p - onehot of a vocabulary block for all tokens, from fp32 logits
  const uint16_t* packed;  // [n, D] hidden states, packed by fused_pack
  const uint16_t* weight;  // [cols, D] rows first .. of W
  const int64_t* labels;   // [n]
  const double *lse, *others, *slope;  // [n] log-sum-exp, 1 - p of the label, the soft cap's slope there
  int64_t first, n, D, cols;
  Transform how;
  uint16_t* out;     // [cols, n] bfloat16
  uint16_t* padded;  // [threads][32][D rounded up to 32], aligned to 64
  int threads;
};

bool fused_available(Engine engine);  // whether processor and operating system support it

// Bytes; slots can be any number >= 1, slots beyond V stay empty.
int64_t fused_workspace(int64_t D, int slots, bool ref, bool grad, bool kept, int threads);
void fused_fold(Engine engine, const Fold& fold);
int64_t fused_slot(int64_t V, int slots, int slot);  // its first entry

// Second pass for a trained head: pack the right operand once, then compute the residual block by block.
int64_t fused_packed_size(int64_t n, int64_t D);
void fused_pack(const uint16_t* hidden, int64_t n, int64_t D, uint16_t* packed, int threads);
void fused_residual(Engine engine, const Residual& residual);

}  // namespace cpo
