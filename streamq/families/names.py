"""Names of modules: patterns over them, and what layers have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from functools import lru_cache

from streamq.errors import PlanError

#: What the compiler raises for a text that is no regex: also for ``a{9999999999}`` and for
#: thousands of brackets.
BAD_REGEX = (re.error, OverflowError, RecursionError)


def matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """One test for several patterns over module names: globs, or ``re:`` and a regex.

    A regex must match from the start, as ``re.match`` does in the readers of ``ignore``.
    Raises PlanError for a regex that does not compile.
    """
    tests = [_compile(p) for p in patterns]
    return lambda name: any(t.match(name) for t in tests)


@lru_cache(4096)  # the tables have the same patterns for every model: 4 ms each time
def _compile(pattern: str) -> re.Pattern[str]:
    try:
        if pattern.startswith("re:"):
            return re.compile(pattern[3:])
        return re.compile(translate(pattern))
    except BAD_REGEX as e:
        raise PlanError(f"the pattern {pattern!r} is not a valid regex: {e}.") from None


_NUMBERS = re.compile(r"\.[0-9]+(?![^.])")


def collapse(name: str) -> str:
    """``model.layers.12.mlp`` as ``model.layers.*.mlp``: what layers have in common."""
    return _NUMBERS.sub(".*", name)
