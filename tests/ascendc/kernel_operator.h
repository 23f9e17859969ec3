// The header that device code includes, for a host compiler. Written from the documentation of
// Ascend C: what is not here is not modelled, and does not compile or aborts.
#pragma once

#include "vector.h"

#define LAUNCH(args, ...) shim::Launch(blocks, [&] { __VA_ARGS__ args; })
