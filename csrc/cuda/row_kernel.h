// Row kernel: log-prob of the label, LSE, and in place d logp / d logits over a chunk of logits.
//
// Replaces log_softmax + gather and their backward around a vendor GEMM. Each row is read once by a
// cluster of two CTAs that keeps it in shared memory (compute capability 9.0), or twice by one CTA.
// Finite logits of any size; rows out of range for exp2 are scanned again (logp.h). NaN and +inf
// make a row NaN; -inf counts as masked out.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace cpo {

enum class Half { bfloat16, float16 };  // the 16-bit float types

struct RowArgs {
  void* logits;           // [rows, stride] 16-bit; columns vocab..stride-1 are scratch
  int64_t stride;         // in values; a multiple of 8, at least vocab rounded up to 8
  int rows;               // C
  int vocab;              // V
  int grad_rows;          // rows 0..grad_rows-1 become d logp / d logits, the others stay
  const int64_t* labels;  // [rows]; anything outside 0..vocab-1 is ignored: logp 0, gradient 0
  const float* bias;      // [vocab], aligned to 16 bytes, or null
  float softcap;          // 0: none
  float temperature;
  float* logps;           // [rows]
  float* lse;             // [rows] or null
};

// Logits are softcap * tanh((x + bias) / softcap) / temperature. Throws std::runtime_error on a
// CUDA error.
void launch_row_kernel(const RowArgs& args, Half type, int device, cudaStream_t stream);

}  // namespace cpo
