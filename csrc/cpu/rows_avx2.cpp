// Row kernels for AVX2 with FMA; called only where the processor supports it.
#include <omp.h>
#include <xmmintrin.h>

#include "rows.h"
#pragma GCC target("avx2,fma")
#define WIDTH 8
#define NAME "avx2"
#define ISA kAvx2
#include "rows_kernel.h"
