"""Functions that are made for numbers known to the compiler.

A kernel that calls what this makes closes over numbers alone, which name the file that keeps it.
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
