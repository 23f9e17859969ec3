"""What Python runs first on a node of the benchmark's cluster: ``NODE_RATE``, bytes a second.

Reads and writes of shards together take as long as storage that gives each node so much would
need; the time that they really took counts. One process of a node works at a time.
"""

import os
import time

RATE = float(os.environ.get("NODE_RATE", 0))

if RATE:
    import threading

    lock, free_at = threading.Lock(), [0.0]

    def slowly(call):
        """The call, which returns the bytes it has moved."""

        def limited(*args):
            began = time.monotonic()
            n = call(*args)
            with lock:
                free_at[0] = max(free_at[0], began) + n / RATE
                wait = free_at[0] - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            return n

        return limited

    os.preadv, os.pwrite = slowly(os.preadv), slowly(os.pwrite)
