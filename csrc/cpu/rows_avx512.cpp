// Row kernels for AVX-512; called only where the processor supports it.
#include <immintrin.h>
#include <omp.h>

#include "rows.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define WIDTH 16
#define NAME "avx512"
#define ISA kAvx512
#include "rows_kernel.h"
