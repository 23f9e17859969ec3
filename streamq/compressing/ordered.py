"""Work that is done by many at once and comes back in the order in which it was given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
#: Results that may wait for each worker: one that is made, one that is to be written.
WINDOW = 2


def in_order(tasks: Iterable[Callable[[], T]], workers: int) -> Generator[T, None, None]:
    """The results of ``tasks`` in their order, at most ``WINDOW`` for each worker at a time.

    An error of a task is raised where its result would have been; tasks behind it that have not
    begun never do.
    """
    with ThreadPoolExecutor(workers, "code") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) >= WINDOW * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
