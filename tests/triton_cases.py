"""What the Triton kernels are tried on."""

from dataclasses import replace

import numpy as np
from hypothesis import settings
from streamq.kernels.golden import CASES, DTYPES

from streamq.schemes import SCHEMES, Scheme

#: The golden cases without those that only their activations tell apart.
DISTINCT = {replace(s, name="", activation=None): name for name, s in CASES.items()}.values()


#: Of each scheme: 3 in `make test`, 250 in `make soak`; an example takes some 30 ms.
EXAMPLES = max(1, settings.default.max_examples // 20)


#: One scheme for every kernel, and every way in which one walks a matrix.
KERNELS = {
    "integers of groups": SCHEMES["W4A16"],
    "integers with zero points": SCHEMES["W3A16_ASYM"],
    "integers of rows": SCHEMES["W8A8"],
    "integers of rows with zero points": CASES["INT8_CHANNEL_ASYM"],
    "integers, searched": CASES["INT4_SEARCH"],
    "integers of rows, searched": CASES["INT8_CHANNEL_SEARCH"],
    "integers of rows with zero points, searched": replace(
        CASES["INT8_CHANNEL_ASYM"], scales="search"
    ),
    "FP8 of tensors": CASES["FP8_TENSOR"],
    "FP8 of rows": SCHEMES["FP8_DYNAMIC"],
    "FP8 of groups": Scheme("FP8_GROUP", "e4m3", 8, (1, 128), "f32"),
    "FP8 of blocks": SCHEMES["FP8_BLOCK"],
    "FP8 of blocks of other sizes": Scheme("FP8_SMALL", "e4m3", 8, (48, 40), "f32"),
    "MXFP4": SCHEMES["MXFP4"],
    "MXFP4, searched": CASES["MXFP4_SEARCH"],
    "MXFP8": SCHEMES["MXFP8"],
    "NVFP4": SCHEMES["NVFP4"],
    "NVFP4, searched": CASES["NVFP4_SEARCH"],
}


def weights(rows, cols, dtype="bf16"):
    """Ordinary numbers, an outlier, a zero row where there are two."""
    x = np.random.default_rng(cols).standard_normal((rows, cols)) * 0.02
    x[0, -1] = 3
    x[1:2] = 0
    return x.astype(DTYPES[dtype])
