"""What Python runs first on a node of the test's cluster: storage that is slow, or not there.

``RAY_NODE``: beginning of the names of some files. ``.log`` gets a line for each shard that is
begun on this node. While ``.hangs`` exists they hang there, while ``.slow`` exists they take
longer. ``.lacks`` names a directory that this node does not see.
"""

import builtins
import os
import time

stat, opened, allocate = os.stat, builtins.open, os.posix_fallocate
NODE = os.environ["RAY_NODE"]


def is_there(suffix):
    try:
        stat(NODE + suffix)
    except FileNotFoundError:
        return False
    return True


def begun(fd, offset, size):
    """The first call for each shard that is written."""
    with opened(NODE + ".log", "a") as log:
        log.write(os.readlink(f"/proc/self/fd/{fd}") + "\n")
    while is_there(".hangs"):
        time.sleep(0.1)
    if is_there(".slow"):
        time.sleep(0.3)
    allocate(fd, offset, size)


def but_for_what_is_lacking(call):
    def seen(path, *args, **kw):
        if is_there(".lacks"):
            with opened(NODE + ".lacks") as file:
                if str(path).startswith(file.read()):
                    raise FileNotFoundError(2, "No such file or directory", str(path))
        return call(path, *args, **kw)

    return seen


os.posix_fallocate = begun
os.stat, builtins.open = but_for_what_is_lacking(stat), but_for_what_is_lacking(opened)
