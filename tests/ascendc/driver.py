"""Runs kernels of a library that was built against the shim, in a process that they may abort.

``python driver.py LIBRARY``: reads pickled calls from stdin, ``(function, blocks, arrays, argument
types, arguments)`` with arrays as ``(bytes, known)``, and answers each with what the launcher
returned, how many bytes nobody wrote, and the bytes of the arrays afterwards.
"""

import ctypes
import pickle
import sys


def main(path):
    """Serve calls until stdin ends."""
    library = ctypes.CDLL(path)
    library.shim_memory.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
    library.shim_unwritten.restype = ctypes.c_uint64
    while True:
        try:
            function, blocks, arrays, types, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        library.shim_clear()
        buffers = []
        for content, known in arrays:
            buffers.append(ctypes.create_string_buffer(content, len(content)))
            library.shim_memory(buffers[-1], len(content), known)
        launcher = getattr(library, function)
        launcher.argtypes = types
        code = launcher(blocks, None, *map(ctypes.addressof, buffers), *arguments)
        answer = code, library.shim_unwritten(), [b.raw for b in buffers]
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
