"""Runs kernels of a library that was built against the shim, in a process that they may abort.

``python driver.py LIBRARY``: reads pickled calls from stdin, ``(function, blocks, arrays, arguments)``
with arrays as ``(bytes, known)``, and answers each with the bytes of the arrays afterwards.
"""

import ctypes
import pickle
import sys


def main(path):
    library = ctypes.CDLL(path)
    library.shim_memory.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
    while True:
        try:
            function, blocks, arrays, signature, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        library.shim_clear()
        buffers = []
        for content, known in arrays:
            buffer = ctypes.create_string_buffer(content, len(content))
            library.shim_memory(buffer, len(content), known)
            buffers.append(buffer)
        launcher = getattr(library, function)
        launcher.argtypes = signature
        pointers = [ctypes.addressof(b) for b in buffers]
        code = launcher(blocks, None, *pointers, *arguments)
        pickle.dump((code, [b.raw for b in buffers]), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
