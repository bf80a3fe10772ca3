// Python bindings: take addresses and sizes, compute nothing. cpo_fast/loss/cpu_rows.py owns all memory.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "fused.h"
#include "rows.h"

namespace py = pybind11;
using namespace cpo;

namespace {

const Isa& isa_of(const std::string& name) {
  const Isa* isa = choose(name.c_str());
  if (!isa) throw std::invalid_argument("this processor has no instruction set '" + name + "'");
  return *isa;
}

Engine engine_of(const std::string& name) {
  if (name == "amx") return Engine::amx;
  if (name == "avx512_bf16") return Engine::avx512_bf16;
  throw std::invalid_argument("no engine '" + name + "'");
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The state's five rows of `stride` doubles, from entry `start`.
State state_at(uintptr_t address, int64_t stride, int64_t start) {
  double* p = at<double>(address) + start;
  return {p, p + stride, p + 2 * stride, p + 3 * stride, p + 4 * stride};
}

Block block_at(uintptr_t z, int type, int64_t rows, int64_t cols, int64_t first, uintptr_t labels) {
  return {at<void>(z), Type(type), rows, cols, cols, first, at<const int64_t>(labels)};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of cpo_fast.loss; use them through cpo_fast.loss.";
  using release = py::call_guard<py::gil_scoped_release>;

  m.def("isa", [](const std::string& name) { return std::string(isa_of(name).name); });

  m.def(
      "softmax_block",
      [](uintptr_t z, int type, int64_t rows, int64_t cols, int64_t first, uintptr_t labels,
         uintptr_t bias, float softcap, float scale, uintptr_t state, int64_t stride, int64_t start,
         bool write, int threads, const std::string& isa) {
        isa_of(isa).softmax_block(block_at(z, type, rows, cols, first, labels),
                                  {at<const float>(bias), softcap, scale},
                                  state_at(state, stride, start), write, threads);
      },
      release());

  m.def(
      "residual_block",
      [](uintptr_t z, int type, int64_t rows, int64_t cols, int64_t first, uintptr_t labels,
         uintptr_t bias, float softcap, float scale, uintptr_t lse, uintptr_t others,
         uintptr_t slope, int threads, const std::string& isa) {
        isa_of(isa).residual_block(block_at(z, type, rows, cols, first, labels),
                                   {at<const float>(bias), softcap, scale}, at<const double>(lse),
                                   at<const double>(others), at<const double>(slope), threads);
      },
      release());

  m.def(
      "accumulate",
      [](uintptr_t sums, uintptr_t index, uintptr_t part, int type, int64_t rows, int64_t width,
         uintptr_t raised, int threads, const std::string& isa) {
        isa_of(isa).accumulate(at<float>(sums), at<const int64_t>(index), at<void>(part),
                               Type(type), rows, width, at<const double>(raised), threads);
      },
      release());

  m.def(
      "column_sums",
      [](uintptr_t z, int type, int64_t rows, int64_t cols, uintptr_t coef, uintptr_t sums,
         int threads, const std::string& isa) {
        isa_of(isa).column_sums(block_at(z, type, rows, cols, 0, 0), at<const float>(coef),
                                at<float>(sums), threads);
      },
      release());

  m.def(
      "finish",
      [](uintptr_t state, int64_t stride, float scale, uintptr_t labels, uintptr_t index,
         int64_t rows, uintptr_t logps, uintptr_t lse, uintptr_t others, uintptr_t slope,
         uintptr_t grad, uintptr_t weight, int type, int64_t width, int threads) {
        finish(state_at(state, stride, 0), scale, at<const int64_t>(labels),
               at<const int64_t>(index), rows, at<float>(logps), at<double>(lse),
               at<double>(others), at<double>(slope), at<float>(grad), at<void>(weight), Type(type),
               width, threads);
      },
      release());

  m.def("fused_available", [](const std::string& engine) { return fused_available(engine_of(engine)); });

  m.def("fused_workspace", fused_workspace);

  m.def("fused_slot", fused_slot);

  m.def(
      "fused_fold",
      [](const std::string& engine, uintptr_t hidden, uintptr_t ref, uintptr_t weight,
         uintptr_t labels, uintptr_t index, int64_t n, int64_t D, int64_t V, uintptr_t bias,
         float softcap, float scale, uintptr_t state, uintptr_t ref_state, uintptr_t grad,
         uintptr_t kept, uintptr_t offsets, uintptr_t workspace, int slots, int threads) {
        fused_fold(engine_of(engine),
                   {at<const uint16_t>(hidden), at<const uint16_t>(ref), at<const uint16_t>(weight),
                    at<const int64_t>(labels), at<const int64_t>(index), n, D, V,
                    {at<const float>(bias), softcap, scale}, state_at(state, n, 0),
                    state_at(ref_state, n, 0), at<float>(grad), at<uint16_t>(kept),
                    at<double>(offsets), at<void>(workspace), slots, threads});
      },
      release());

  m.def("fused_packed_size", fused_packed_size);

  m.def(
      "fused_pack",
      [](uintptr_t hidden, int64_t n, int64_t D, uintptr_t packed, int threads) {
        fused_pack(at<const uint16_t>(hidden), n, D, at<uint16_t>(packed), threads);
      },
      release());

  m.def(
      "fused_residual",
      [](const std::string& engine, uintptr_t packed, uintptr_t weight, uintptr_t labels,
         uintptr_t bias, float softcap, float scale, uintptr_t lse, uintptr_t others,
         uintptr_t slope, int64_t first, int64_t n, int64_t D, int64_t cols, uintptr_t out,
         uintptr_t padded, int threads) {
        fused_residual(engine_of(engine),
                       {at<const uint16_t>(packed), at<const uint16_t>(weight),
                        at<const int64_t>(labels), at<const double>(lse), at<const double>(others),
                        at<const double>(slope), first, n, D, cols,
                        {at<const float>(bias), softcap, scale}, at<uint16_t>(out),
                        at<uint16_t>(padded), threads});
      },
      release());
}
