// Row kernels for any x86-64 (or, by the compiler's own lowering, any) processor.
#define WIDTH 4
#define NAME "portable"
#define ISA kPortable
#include "rows_kernel.h"
