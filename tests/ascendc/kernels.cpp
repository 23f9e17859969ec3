// The kernels as they are, for a host compiler.
#include "kernels.asc"
