"""Functions that are made for numbers known to the compiler, found by its cache on disk.

A kernel that closes over other compiled functions is never found there: numba's key for it holds an
identifier that each process draws anew, so every one compiled it again, for two seconds, and left
another file. One that closes over numbers alone, and calls what this makes, is found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba.extending import overload


def of_literals(make: Callable[..., Any]) -> Any:
    """A function to call in kernels as ``f(numbers, *arguments)``.

    ``numbers``: a tuple of what the kernel closes over, which ``make`` takes; what it returns, a
    Python function that numba can compile, takes the same tuple and the ``arguments``.
    """
    made = cache(make)

    def called(numbers: Any, *arguments: Any) -> Any:
        raise NotImplementedError("called outside of a kernel")

    @overload(called, prefer_literal=True, strict=False, jit_options={"error_model": "numpy"})
    def _called(numbers: Any, *arguments: Any) -> Any:
        return made(*(number.literal_value for number in numbers))

    return called
