// Row kernels for any x86-64 processor, or any other by the compiler's lowering.
#define WIDTH 4
#define NAME "portable"
#define ISA kPortable
#include "rows_kernel.h"
