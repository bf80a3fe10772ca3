// Fused bfloat16 kernel for processors with AMX: the logits never reach memory.
//
// For a vocabulary block of 320 entries and a chunk of 256 tokens, Z^T = W H^T is made in 32 x 32 tiles
// with float32 accumulators; each tile is turned into E = 2^(z - k), summed, and kept as bfloat16 in a
// buffer that stays in the L2 cache, from which G^T += W^T E follows at once. W is read once per chunk for
// policy and reference together. The vocabulary is cut into slots of fixed size with sums of their own,
// which threads take one after the other and which are merged in order: the result depends neither on
// the number of threads nor on who was first. For a trained head, amx_residual computes p - onehot again,
// as bfloat16 from float32 logits, block by block, for a vendor GEMM to multiply with the hidden states.
#pragma once

#include <cstdint>

#include "rows.h"

namespace cpo {

struct Fold {
  const uint16_t* hidden;  // [n, D] bfloat16
  const uint16_t* ref;     // [n, D], or nullptr
  const uint16_t* weight;  // [V, D]
  const int64_t* labels;   // [n]
  const int64_t* index;    // [n] rows of grad
  int64_t n, D, V;
  float scale;      // 1 / temperature
  State state;      // of the policy: k, sum, label are written, [n]
  State ref_state;  // of the reference, where there is one
  float* grad;      // [*, D]: the sum E W of row index[r], for `finish`; nullptr: not wanted
  void* workspace;  // amx_workspace() bytes, aligned to 64
  int threads;
};

struct Residual {          // p - onehot of a vocabulary block for all tokens, from fp32 logits
  const uint16_t* packed;  // [n, D] hidden states as amx_pack leaves them
  const uint16_t* weight;  // [cols, D] rows first .. of W
  const int64_t* labels;   // [n]
  const double *lse, *others;  // [n] log-sum-exp of the logits times scale, 1 - p of the label
  int64_t first, n, D, cols;
  float scale;
  uint16_t* out;     // [cols, n] bfloat16
  uint16_t* padded;  // [threads][32][D rounded up to 32], aligned to 64
  int threads;
};

bool amx_available();  // has the processor AMX, and the kernel's leave to use it?
int64_t amx_workspace(int64_t D, int64_t V, bool ref, bool grad, int threads);
void amx_fold(const Fold& fold);

// A trained head's second pass: the right operand once, then block after block of the residual.
int64_t amx_packed_size(int64_t n, int64_t D);
void amx_pack(const uint16_t* hidden, int64_t n, int64_t D, uint16_t* packed, int threads);
void amx_residual(const Residual& residual);

}  // namespace cpo
