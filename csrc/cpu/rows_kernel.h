// The row kernels, written once with GCC vector extensions. Each rows_<isa>.cpp sets its compiler target,
// WIDTH (floats per vector) and NAME, then includes this. Everything is in an unnamed namespace and no
// library template is used, so that the linker cannot merge code of different targets.

#include <omp.h>
#include <xmmintrin.h>

#include "rows.h"

namespace {

using cpo::Block;
using cpo::State;
using cpo::Transform;
using cpo::Type;

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

constexpr float kInf = __builtin_inff();
// exp(x) below this is written as 0: it is negligible relative to a sum >= exp(-kRaise), and this avoids
// denormal products with weights, which slow a GEMM fifty-fold.
constexpr float kNothing = -60.0f;

// Denormals are flushed inside a parallel region and the thread's mode restored at its end.
struct FlushDenormals {
  unsigned int saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved); }
};

inline Floats splat(float x) { return x - Floats{}; }

inline Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

inline Floats load(const uint16_t* p) {  // bfloat16 is the upper half of a float32
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

// Round to nearest even. A NaN from bfloat16 logits has zero low bits and stays NaN.
inline void store(uint16_t* p, Floats v) {
  Words bits = (Words)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if WIDTH == 16
  Halves h = (Halves)_mm512_cvtepi32_epi16((__m512i)bits);  // GCC 12 does not generate this instruction itself
#else
  Halves h = __builtin_convertvector(bits, Halves);
#endif
  __builtin_memcpy(p, &h, sizeof h);
}

inline float load1(const float* p) { return *p; }
inline float load1(const uint16_t* p) {
  uint32_t bits = uint32_t(*p) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline void store1(float* p, float x) { *p = x; }
inline void store1(uint16_t* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  *p = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// exp(x) = scale * (1 + part): scale = 2^n, part = exp(r) - 1, x = n ln 2 + r, |r| <= ln 2 / 2.
struct Exponential {
  Floats scale, part;
};

// part = r + r^2 q(r), with a minimax q (relative error of part 1.4e-8).
inline Exponential exponential(Floats x) {  // for -87 <= x <= 88; relative error below 1e-7
  Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 leaves n in the low bits
  Floats n = shifted - 12582912.0f;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats q = splat(0.0013882517f);
  q = q * r + 0.0083665475f;
  q = q * r + 0.0416672f;
  q = q * r + 0.16666543f;
  q = q * r + 0.49999997f;
  return {(Floats)(((Ints)shifted + 127) << 23), r + q * r * r};
}

inline Floats exp_vector(Floats x) {  // 0 below kNothing; NaN stays NaN
  Exponential e = exponential(x < kNothing ? splat(kNothing) : x);
  return x < kNothing ? Floats{} : e.scale + e.scale * e.part;
}

// With e = exp(-2 |x|): |tanh(x)| = (1 - e) / (1 + e), accurate near 0, or 1 - 2 e / (1 + e), accurate
// near 1. The derivative 4 e / (1 + e)^2 is accurate everywhere; 1 - tanh^2 is not.
inline Floats tanh_vector(Floats x, Floats* derivative) {
  Floats size = x < 0.0f ? -x : x;
  size = size > 20.0f ? splat(20.0f) : size;
  Exponential exp = exponential(-2.0f * size);
  Floats e = exp.scale + exp.scale * exp.part, below1 = (1.0f - exp.scale) - exp.scale * exp.part;
  Floats quotient = (size < 0.5f ? below1 : 2.0f * e) / (1.0f + e);
  Floats t = size < 0.5f ? quotient : 1.0f - quotient;
  if (derivative) *derivative = 4.0f * e / ((1.0f + e) * (1.0f + e));
  return x < 0.0f ? -t : t;
}

inline Floats transformed(Floats z, const float* bias, const Transform& how, Floats* slope) {
  if (bias) z += load(bias);
  if (how.softcap > 0) z = how.softcap * tanh_vector(z / how.softcap, slope);
  return z * how.scale;
}

inline float lanes_max(Floats v) {
  float m = v[0];
  for (int i = 1; i < WIDTH; i++) m = v[i] > m ? v[i] : m;
  return m;
}

inline double lanes_sum(Floats v) {
  double s = 0;
  for (int i = 0; i < WIDTH; i++) s += v[i];
  return s;
}

// One vector; at the end of a row from a padded copy with `fill` beyond the last column.
template <typename T>
inline Floats load_part(const T* p, int64_t n, float fill) {
  if (n >= WIDTH) return load(p);
  Floats v = splat(fill);
  for (int i = 0; i < n; i++) v[i] = load1(p + i);
  return v;
}

template <typename T>
inline void store_part(T* p, Floats v, int64_t n) {
  if (n >= WIDTH) return store(p, v);
  for (int i = 0; i < n; i++) store1(p + i, v[i]);
}

// The head's logits of one vector of columns, -inf beyond the last column; PLAIN: no bias, soft cap or
// scale.
template <bool PLAIN, typename T>
inline Floats logits(const T* z, int64_t column, const Block& block, const Transform& how,
                     Floats* slope) {
  int64_t n = block.cols - column;
  Floats raw = load_part(z + column, n, -kInf);
  if (PLAIN) return raw;
  const float* bias = how.bias ? how.bias + block.first + column : nullptr;
  float padded[WIDTH] = {};
  if (bias && n < WIDTH) {
    for (int i = 0; i < n; i++) padded[i] = bias[i];
    bias = padded;
  }
  Floats v = transformed(raw, bias, how, slope);
  for (int i = int(n); i < WIDTH; i++) v[i] = -kInf;
  return v;
}

template <bool PLAIN, typename T>
void softmax_row(T* z, int64_t row, const Block& block, const Transform& how, const State& state,
                 bool write) {
  int64_t label = block.labels[row] - block.first;
  if (label >= 0 && label < block.cols) {  // save the label's logit and mask it
    Floats raw = splat(load1(z + label)), slope = splat(1.0f);
    float bias[WIDTH] = {};
    if (how.bias) bias[0] = how.bias[block.labels[row]];
    state.label[row] = transformed(raw, bias, how, &slope)[0];
    state.slope[row] = slope[0];
    store1(z + label, -kInf);
  }
  // A soft cap maps the label's -inf to -softcap: it is masked again at every use.
  bool capped = !PLAIN && how.softcap > 0;
  auto others = [&](int64_t c, Floats* slope) {
    Floats v = logits<PLAIN>(z, c, block, how, slope);
    if (capped && label >= c && label < c + WIDTH) v[label - c] = -kInf;
    return v;
  };

  Floats top = splat(-kInf);
  for (int64_t c = 0; c < block.cols; c += WIDTH) {
    Floats v = others(c, nullptr);
    top = v > top ? v : top;
  }
  double k = state.k[row], raised = 1;
  float peak = lanes_max(top);
  if (peak > k + cpo::kRaise) {
    raised = __builtin_exp(k - peak);
    state.k[row] = k = peak;
  }
  float offset = float(k);

  Floats sums[4] = {};
  auto exponentials = [&](int64_t c, Floats& sum) {
    Floats slope = splat(1.0f);
    Floats e = exp_vector(others(c, &slope) - offset);
    sum += e;
    if (write) store_part(z + c, PLAIN ? e : e * slope, block.cols - c);
  };
  int64_t c = 0;
  for (; c + 4 * WIDTH <= block.cols; c += 4 * WIDTH) {
    exponentials(c, sums[0]);
    exponentials(c + WIDTH, sums[1]);
    exponentials(c + 2 * WIDTH, sums[2]);
    exponentials(c + 3 * WIDTH, sums[3]);
  }
  for (; c < block.cols; c += WIDTH) exponentials(c, sums[0]);
  state.sum[row] = state.sum[row] * raised + lanes_sum(sums[0]) + lanes_sum(sums[1]) +
                   lanes_sum(sums[2]) + lanes_sum(sums[3]);
  state.raised[row] = raised;
}

template <typename T>
void softmax_rows(const Block& block, const Transform& how, const State& state, bool write) {
  bool plain = !how.bias && how.softcap == 0 && how.scale == 1;
#pragma omp for schedule(static)
  for (int64_t r = 0; r < block.rows; r++) {
    T* z = (T*)block.z + r * block.stride;
    if (plain)
      softmax_row<true>(z, r, block, how, state, write);
    else
      softmax_row<false>(z, r, block, how, state, write);
  }
}

void softmax_block(const Block& block, const Transform& how, const State& state, bool write,
                   int threads) {
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    if (block.type == Type::bf16)
      softmax_rows<uint16_t>(block, how, state, write);
    else
      softmax_rows<float>(block, how, state, write);
  }
}

template <typename T>
void residual_row(T* z, int64_t row, const Block& block, const Transform& how, float lse,
                  double others, double label_slope) {
  for (int64_t c = 0; c < block.cols; c += WIDTH) {
    Floats slope = splat(1.0f);
    Floats p = exp_vector(logits<false>(z, c, block, how, &slope) - lse);
    store_part(z + c, p * slope, block.cols - c);
  }
  int64_t label = block.labels[row] - block.first;
  if (label >= 0 && label < block.cols) store1(z + label, float(-others * label_slope));
}

void residual_block(const Block& block, const Transform& how, const double* lse,
                    const double* others, const double* slope, int threads) {
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < block.rows; r++) {
      if (block.type == Type::bf16)
        residual_row((uint16_t*)block.z + r * block.stride, r, block, how, float(lse[r]), others[r],
                     slope[r]);
      else
        residual_row((float*)block.z + r * block.stride, r, block, how, float(lse[r]), others[r],
                     slope[r]);
    }
  }
}

template <typename T>
void accumulate_row(float* sums, const T* part, int64_t width, float raised) {
  int64_t i = 0;
  for (; i + WIDTH <= width; i += WIDTH) store(sums + i, load(sums + i) * raised + load(part + i));
  for (; i < width; i++) sums[i] = sums[i] * raised + load1(part + i);
}

void accumulate(float* sums, const int64_t* index, const void* part, Type type, int64_t rows,
                int64_t width, const double* raised, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    if (type == Type::bf16)
      accumulate_row(sums + index[r] * width, (const uint16_t*)part + r * width, width,
                     float(raised[r]));
    else
      accumulate_row(sums + index[r] * width, (const float*)part + r * width, width,
                     float(raised[r]));
  }
}

template <typename T>
void column_sums_range(const Block& block, const float* coef, float* sums, int64_t begin,
                       int64_t end) {
  for (int64_t r = 0; r < block.rows; r++) {
    const T* z = (const T*)block.z + r * block.stride;
    int64_t c = begin;
    for (; c + WIDTH <= end; c += WIDTH) store(sums + c, load(sums + c) + load(z + c) * coef[r]);
    for (; c < end; c++) sums[c] += load1(z + c) * coef[r];
  }
}

void column_sums(const Block& block, const float* coef, float* sums, int threads) {
  constexpr int64_t kStep = 1024;
  int64_t steps = (block.cols + kStep - 1) / kStep;
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t s = 0; s < steps; s++) {
      int64_t begin = s * kStep, end = begin + kStep < block.cols ? begin + kStep : block.cols;
      if (block.type == Type::bf16)
        column_sums_range<uint16_t>(block, coef, sums, begin, end);
      else
        column_sums_range<float>(block, coef, sums, begin, end);
    }
  }
}

}  // namespace

namespace cpo {
extern const Isa ISA = {NAME, softmax_block, residual_block, accumulate, column_sums};
}
