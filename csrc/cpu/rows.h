// Row kernels between the two matrix products of the loss op: interface, one implementation per ISA.
//
// The vocabulary is processed in blocks. For each block a GEMM (done by the caller) gives the logits
// z [rows, cols]; `softmax_block` folds them into running per-row state and, when a gradient is wanted,
// overwrites them with E = exp(z - k) (times the soft cap's derivative); a second GEMM gives E W, which
// `accumulate` adds up in float32; `finish` computes log-probs from state and sum and the unscaled gradient
//     g = d logp / d h = (1 - p_y) W[y] - sum over the others p_j W[j].
// The label is left out of the exponentials, so a log-prob can never be positive and 1 - p_y is exact.
// k is an offset per row that is raised only when a block exceeds it by more than kRaise: E stays in the
// range of bfloat16 and float32, and sums are rescaled only once or twice in total.
#pragma once

#include <cstdint>

namespace cpo {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };  // f16: weight rows only

constexpr float kRaise = 32.0f;

struct Transform {  // logits of the head: (softcap * tanh((z + bias) / softcap)) * scale
  const float* bias;  // [V] or nullptr
  float softcap;      // 0: none
  float scale;        // 1 / temperature
};

// Running state, one entry per row, all [rows].
struct State {
  double* k;       // offset of the exponentials
  double* sum;     // sum over the other entries of exp(z - k)
  double* label;   // the label's logit
  double* slope;   // the soft cap's derivative at the label
  double* raised;  // exp(old k - new k) of the last block: the factor for earlier sums
};

struct Block {  // logits of vocabulary entries first .. first + cols - 1
  void* z;      // [rows, cols], row stride `stride` elements, float32 or bfloat16
  Type type;
  int64_t rows, cols, stride, first;
  const int64_t* labels;  // [rows]
};

using SoftmaxBlock = void (*)(const Block&, const Transform&, const State&, bool write, int threads);

// z <- p - onehot, from a known log-sum-exp: p for the others and -(1 - p_y) at the label.
using ResidualBlock = void (*)(const Block&, const Transform&, const double* lse,
                               const double* others, const double* slope, int threads);

// sums[index[r]] = raised[r] * sums[index[r]] + part[r], [rows, width]; index maps to rows of `sums`.
using Accumulate = void (*)(float* sums, const int64_t* index, const void* part, Type type,
                            int64_t rows, int64_t width, const double* raised, int threads);

// grad[c] += sum over rows of coef[r] * z[r, c], [cols].
using ColumnSums = void (*)(const Block&, const float* coef, float* sums, int threads);

struct Isa {
  const char* name;
  SoftmaxBlock softmax_block;
  ResidualBlock residual_block;
  Accumulate accumulate;
  ColumnSums column_sums;
};

extern const Isa kPortable, kAvx2, kAvx512;

// The widest ISA of this processor, or the named one; nullptr if the processor lacks it.
const Isa* choose(const char* name);

// Log-probs and gradients from the final state; outputs at index[r]. `grad` [*, width] float32 holds the
// accumulated E W on entry (nullptr: no gradient).
void finish(const State& state, float scale, const int64_t* labels, const int64_t* index,
            int64_t rows, float* logps, double* lse, double* others, double* slope, float* grad,
            const void* weight, Type type, int64_t width, int threads);

}  // namespace cpo
