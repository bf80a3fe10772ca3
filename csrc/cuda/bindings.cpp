// cpo_fast._cuda: the launchers of csrc/cuda for Python, by addresses. Independent of torch, computes
// nothing; the caller, cpo_fast/loss/cuda_launch.py, ensures shapes and types. Importing it does not
// touch the CUDA driver.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "linear_lse.h"
#include "reduction.h"
#include "row_kernel.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;  // of device memory, or of a stream; 0 is null

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cpo::Half half(const std::string& dtype) {
  if (dtype == "bfloat16") return cpo::Half::bfloat16;
  if (dtype == "float16") return cpo::Half::float16;
  throw std::invalid_argument("dtype must be bfloat16 or float16, got " + dtype);
}

void row_kernel(const std::string& dtype, Address logits, int64_t stride, int rows, int vocab,
                int grad_rows, Address labels, Address bias, float softcap, float temperature,
                Address logps, Address lse, int device, Address stream) {
  cpo::RowArgs args{};
  args.logits = pointer<void>(logits);
  args.stride = stride;
  args.rows = rows;
  args.vocab = vocab;
  args.grad_rows = grad_rows;
  args.labels = pointer<const int64_t>(labels);
  args.bias = pointer<const float>(bias);
  args.softcap = softcap;
  args.temperature = temperature;
  args.logps = pointer<float>(logps);
  args.lse = pointer<float>(lse);
  cpo::launch_row_kernel(args, half(dtype), device, pointer<CUstream_st>(stream));
}

void linear_lse(const std::string& dtype, Address hidden, int64_t hidden_stride, Address weight,
                int64_t weight_stride, int rows, int vocab, int width, Address labels,
                float temperature, Address logps, Address lse, Address workspace, Address exp,
                int64_t exp_stride, Address offsets, Address factors, int device, Address stream) {
  cpo::LinearArgs args{};
  args.hidden = pointer<const void>(hidden);
  args.hidden_stride = hidden_stride;
  args.weight = pointer<const void>(weight);
  args.weight_stride = weight_stride;
  args.rows = rows;
  args.vocab = vocab;
  args.width = width;
  args.labels = pointer<const int64_t>(labels);
  args.temperature = temperature;
  args.logps = pointer<float>(logps);
  args.lse = pointer<float>(lse);
  args.workspace = pointer<void>(workspace);
  args.exp = pointer<void>(exp);
  args.exp_stride = exp_stride;
  args.offsets = pointer<const float>(offsets);
  args.factors = pointer<float>(factors);
  cpo::launch_linear_lse(args, half(dtype), device, pointer<CUstream_st>(stream));
}

void segment_sums(Address logps, Address segment_ids, Address labels, int64_t ignore_index,
                  int tokens, int segments, Address sums, Address counts, int device,
                  Address stream) {
  cpo::launch_segment_sums(
      {pointer<const float>(logps), pointer<const int64_t>(segment_ids),
       pointer<const int64_t>(labels), ignore_index, tokens, segments, pointer<double>(sums),
       pointer<int64_t>(counts)},
      device, pointer<CUstream_st>(stream));
}

void row_scale(const std::string& dtype, Address rows, Address coefficients, Address out,
               int tokens, int width, int device, Address stream) {
  cpo::launch_row_scale({pointer<const void>(rows), pointer<const float>(coefficients),
                         pointer<void>(out), tokens, width},
                        half(dtype), device, pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using py::arg;
  module.doc() = "CUDA kernels of cpo_fast: addresses in, nothing out. See csrc/cuda/*.h.";
  module.def("row_kernel", &row_kernel, py::kw_only(), arg("dtype"), arg("logits"), arg("stride"),
             arg("rows"), arg("vocab"), arg("grad_rows"), arg("labels"), arg("bias"),
             arg("softcap"), arg("temperature"), arg("logps"), arg("lse"), arg("device"),
             arg("stream"));
  module.def("linear_lse", &linear_lse, py::kw_only(), arg("dtype"), arg("hidden"),
             arg("hidden_stride"), arg("weight"), arg("weight_stride"), arg("rows"), arg("vocab"),
             arg("width"), arg("labels"), arg("temperature"), arg("logps"), arg("lse"),
             arg("workspace"), arg("exp"), arg("exp_stride"), arg("offsets"), arg("factors"),
             arg("device"), arg("stream"));
  module.def("linear_workspace_bytes", &cpo::linear_workspace_bytes, py::kw_only(), arg("rows"),
             arg("vocab"));
  module.def("segment_sums", &segment_sums, py::kw_only(), arg("logps"), arg("segment_ids"),
             arg("labels"), arg("ignore_index"), arg("tokens"), arg("segments"), arg("sums"),
             arg("counts"), arg("device"), arg("stream"));
  module.def("row_scale", &row_scale, py::kw_only(), arg("dtype"), arg("rows"),
             arg("coefficients"), arg("out"), arg("tokens"), arg("width"), arg("device"),
             arg("stream"));
}
