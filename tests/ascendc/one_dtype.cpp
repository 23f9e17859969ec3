// The kernels for bf16 weights alone, which compiles in half the time: for mutants.
#include "kernel_operator.h"

#define FOR_DTYPE(dtype, args, ...)    \
    {                                  \
        using T = bfloat16_t;          \
        LAUNCH(args, __VA_ARGS__);     \
        return dtype != streamq::BF16; \
    }
#include "kernels.asc"
