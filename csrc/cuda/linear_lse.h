// Linear LSE: log-probs of labels under softmax(H W^T / temperature) straight from fp32
// accumulators, on Hopper.
//
// A GEMM whose epilogue reduces its tile and writes no logits: the reference pass and evaluation.
// With `exp` set the epilogue also stores E = exp(z - offset) as bf16, from which one plain GEMM
// makes the gradient:
//   d logp_t / d H_t = factors[t] * (E W)[t],
// because E's label column holds minus the sum of the others.
//
// A row with a logit / temperature above 7e8, or all of them below -7e8, has the log-prob NaN: its
// sums overflow (logp.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "row_kernel.h"

namespace cpo {

struct LinearArgs {
  const void* hidden;     // H [rows, width]
  int64_t hidden_stride;  // in values, a multiple of 8; the base is aligned to 16 bytes
  const void* weight;     // W [vocab, width]
  int64_t weight_stride;
  int rows;   // T
  int vocab;  // V
  int width;  // D
  const int64_t* labels;  // [rows]; anything outside 0..vocab-1 is ignored: logp 0
  float temperature;
  float* logps;     // [rows]
  float* lse;       // [rows]
  void* workspace;  // linear_workspace_bytes(...), aligned to 16 bytes
  // Only with E; all of them or none. bfloat16 inputs only: float16 has no range for exp(z -
  // offset).
  void* exp;             // E [rows, exp_stride] bf16; columns vocab.. rounded up to 8 are set to 0,
                         // and the rows whose label is ignored
  int64_t exp_stride;    // in values, a multiple of 8
  const float* offsets;  // [rows] any estimate of the LSE, such as the reference model's
  float* factors;        // [rows] out; 0 where the label is ignored
};

// Rows whose LSE is further than this from their offset are computed again with the LSE as offset
// (on the device, with all rows of their row pair), so that E neither overflows nor vanishes.
constexpr float kOffsetReach = 60.0f;

int64_t linear_workspace_bytes(int rows, int vocab);

// Throws std::runtime_error on a CUDA error or a device that is not of compute capability 9.0.
void launch_linear_lse(const LinearArgs& args, Half type, int device, cudaStream_t stream);

}  // namespace cpo
